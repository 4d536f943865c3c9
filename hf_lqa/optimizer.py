"""`LQA`: any `torch.optim.Optimizer`, with its learning rate measured instead of given."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable
from dataclasses import asdict
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from . import verification
from .checkpoint import ProbeRecord, packed, take_snapshot, unpacked
from .checks import GradientChecks
from .closures import Caller, relative_noise
from .groups import Division, growth, largest_lr, rescaled, with_gradient
from .prober import Prober, Step
from .quadratic import Verdict
from .rule import Measurement, Rule, build
from .rule.records import require
from .slopes import SlopeMeter, flat, mean_over_ranks


def lqa_inside(optimizer: Any) -> LQA | None:
    """The `LQA` inside whatever Accelerate has wrapped around it; `None` if there is none."""
    while optimizer is not None and not isinstance(optimizer, LQA):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer


def _check_base(base: torch.optim.Optimizer) -> None:
    """Raise a `ValueError` if `base` is none that `LQA` can step, and warn if its rate looks like one."""
    if isinstance(base, torch.optim.LBFGS):
        raise ValueError("base=LBFGS: it evaluates the loss itself in every step; use a first-order optimizer")
    if not any(group["params"] for group in base.param_groups):
        raise ValueError("base has no parameters: every parameter of the model is frozen (requires_grad=False)")
    if any("lr" not in group for group in base.param_groups):
        raise ValueError(f"base={type(base).__name__}: its param groups have no 'lr', which LQA sets")
    if max(float(group["lr"]) for group in base.param_groups) < 0.1:
        warnings.warn(
            f"The base optimizer's lr is {float(base.param_groups[0]['lr'])}. Under LQA it multiplies the step size"
            " that was measured: construct the base optimizer with lr=1.0 unless that is what you want.",
            stacklevel=3,
        )


class LQA(torch.optim.Optimizer):
    """A `torch.optim.Optimizer` around another, the base, whose learning rate it measures.

    ::

        optimizer = LQA(torch.optim.AdamW(model.parameters(), lr=1.0), total_steps=1000)
        closure = ReplayedLoss(model)
        closure.record(compute_loss, batch).backward()
        optimizer.step(closure)

    A group's ``lr`` is a *multiplier*: 1.0 by default, scaled by learning-rate schedulers, different between groups if
    some should learn slower. A step moves tensor ``i`` of group ``g`` by

        step_size * multiplier_i * (lr_g / max lr) * d      step_size = base step size * ramp * max lr / unit

    where ``d`` is the base optimizer's update at unit learning rate, ``multiplier_i`` the rule's per-tensor multiplier,
    and ``max lr`` the largest ``lr`` at this step. ``unit`` is the largest one before schedules, when the first step is
    measured, but at least 1: groups of 1 and 16 are those of 1/16 and 1. On steps without a probe this is
    ``base.step()`` at that learning rate, if all gradients are finite, and nothing else.

    Args:
        base: the optimizer whose direction is used. Its updates must be proportional to its ``lr``. Param groups and
            state are shared with it.
        rule: ``"displacement"`` (the default) or ``"paper"`` (arXiv 2004.03260, Algorithm 1).
        total_steps: how many steps training has, ``>= 1``; the longer it is, the lower the base step size. `None` is
            taken for 1,000.
        options: the rule's, see `hf_lqa.rule.build`.

    Attributes:
        step_size: the step size last applied, in units of the direction, schedule included: that of the group with the
            largest multiplier. `None` before any.
        last_probe: the `ProbeRecord` of the last probe, `None` before any.
        last_measurement: the `Measurement` that was last taken of the way that training has come, `None` before any.
        counts: number of ``steps``, ``skipped`` steps, ``probe_forwards``, first probes that ``searched`` a radius
            because the loss's value said none, and of each verdict; and what `hf_lqa.verification` has found out.

    Raises:
        ValueError: `base` has no parameters or no ``lr`` or needs a closure itself (LBFGS), `rule` is unknown, or an
            option is unknown or out of range, as `total_steps` may be.
    """

    def __init__(
        self,
        base: torch.optim.Optimizer,
        rule: str = "displacement",
        *,
        total_steps: int | None = None,
        **options: Any,
    ):
        _check_base(base)
        self.base = base
        self.rule: Rule
        self.rule, radius = build(rule, options)
        if total_steps is not None:
            self.plan(total_steps)
        self.step_size: float | None = None
        self.last_probe: ProbeRecord | None = None
        self.last_measurement: Measurement | None = None
        self.counts: dict[str, int] = dict.fromkeys(
            ["steps", "skipped", "probe_forwards", "searched", *verification.COUNTS, *(v.value for v in Verdict)], 0
        )
        #: Mean of a scalar over the data-parallel ranks; every decision is made on its results.
        self.reduce: Callable[[Tensor], Tensor] = mean_over_ranks
        self.checks = GradientChecks(self._params)
        self.prober = Prober(radius, self.rule, self.checks.watch, self.counts)
        self._meter = SlopeMeter()
        self._caller = Caller()
        self._division = Division()
        self._largest_lr = max(1.0, largest_lr(base))
        #: The closure of the next step, see `arm`.
        self.armed: Callable[[], Tensor] | None = None
        # Not super().__init__(): the groups are the base's own objects, which are complete already.
        self.defaults = base.defaults
        super().__setstate__({})

    # Shared with the base optimizer, also when somebody (FSDP2 under Accelerate, a checkpoint) replaces them.
    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base.param_groups = groups

    @property
    def state(self) -> Any:
        return self.base.state

    @state.setter
    def state(self, state: Any) -> None:
        self.base.state = state

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k != "armed"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "armed": None})

    def __repr__(self) -> str:
        return f"LQA ({self.rule.name}) around {self.base!r}"

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.base.add_param_group(param_group)

    def plan(self, total_steps: int) -> None:
        """Say how many steps training has, ``>= 1``: to be called before the first step.

        Raises:
            ValueError: that is out of range.
        """
        integer = isinstance(total_steps, Integral) and not isinstance(total_steps, bool)
        require(integer and total_steps >= 1, "total_steps", total_steps, "must be an integer >= 1")
        self.rule.total_steps = int(total_steps)

    @property
    def _params(self) -> list[Tensor]:
        """Of all param groups, in their order: what places count."""
        return [p for group in self.param_groups for p in group["params"]]

    @property
    def base_step_size(self) -> float | None:
        """The step size before schedule, ramp and multipliers; `None` until the first step is measured."""
        return self.rule.step_size

    @property
    def multipliers(self) -> list[float]:
        """The per-tensor multipliers, in the param groups' order; nothing where all are 1."""
        return self.rule.multipliers(sum(len(group["params"]) for group in self.param_groups))

    @property
    def rejected(self) -> int:
        """Number of probes so far whose fit gave no step size."""
        return sum(self.counts[verdict.value] for verdict in Verdict if not verdict.usable)

    @property
    def wants_probe(self) -> bool:
        """Whether the next step will call its closure. Nothing needs to be recorded for one that will not."""
        return self.rule.wants_probe(self.counts["steps"])

    def arm(self, closure: Callable[[], Tensor] | None) -> None:
        """Provide the closure of the next `step`, for loops that call it without (`None`: take it back)."""
        self.armed = closure

    def observe_clipping(self, grad_norm: Tensor | float, max_norm: float) -> None:
        """Tell the next `step` that its gradients had the norm `grad_norm` and were then clipped to `max_norm`.

        With it a probe's slope is that of the loss, not of the clipped gradients. Without it what clipping does is
        found by comparing gradients with what they were at the end of the backward pass, which costs a little more.
        """
        self.checks.tell(grad_norm, max_norm)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Advance the base optimizer once, at the step size that was measured, unless a gradient is not finite.

        Args:
            closure: one of two kinds.

                - It returns the loss at the present weights as a 0-dim tensor, without gradient and the same whenever
                  it is called at the same weights (`ReplayedLoss` makes one). If it has an attribute ``loss``, that is
                  taken for the loss at the origin. Called on probe steps only.
                - PyTorch's convention: it clears the gradients, calls ``backward`` and returns the loss. Called once at
                  every step, and twice more on probe steps, with the same random numbers and nothing left of it.

                A closure that raises leaves everything as it was before the step. Without one nothing is probed, which
                the rule ``"paper"`` cannot do without.

        Returns:
            What the closure returned, or its ``loss``; `None` where that is not known.

        Raises:
            ValueError: no closure, and the rule cannot begin without; or a closure that cannot be called.
        """
        closure = closure if closure is not None else self.armed
        given = closure is not None
        multiplier = max(float(group["lr"]) for group in self.param_groups)
        # Checkpoints of sharded optimizers make one step at rate 0, to have a state to load into.
        wants_probe = self.wants_probe and multiplier > 0
        returned, closure, asked = self._caller.ask(closure, self._params, wants_probe)
        self.checks.watch.close()
        params, number = self._params, self.counts["steps"]
        if all(p.grad is None for p in params):
            self._caller.warn_of_no_gradient(given)
            return self._stand(returned)
        # Everything is measured first and decided afterwards, so that a closure that raises has changed nothing.
        checks = self.checks.pending(params, wants_probe)
        slopes = self._meter.pending(multiplier > 0 and self.rule.wants_measurement(number))
        numbers = self._read(*checks, *slopes)
        checked = self.checks.found(numbers[: len(checks)])
        if not checked.finite:
            return self._skip(returned, counted=multiplier > 0)
        if multiplier <= 0:
            # A scheduler's warm-up starts at 0: the base sees the gradient, nothing moves, nothing is measured.
            return self._stand(returned)
        if self.rule.step_size is None:
            self._largest_lr = max(self._largest_lr, largest_lr(self.base))
            shapes = [p.shape if p.requires_grad else () for p in params]
            self.rule.begin(shapes, [p.numel() for p in params], growth(self.base))
        probed = None
        if wants_probe:
            step = Step(number, checked, relative_noise(closure, params), self._read)
            probed = self.prober.take(self.base, params, closure, step, multiplier)
            self.counts["probe_forwards"] += asked
            if probed is not None and not math.isfinite(probed.slope):
                return self._skip(returned)
        factor = self.rule.factor(number) * multiplier / self._largest_lr
        measured = self._meter.measurement(numbers[len(checks) :], len(params), factor, number)
        if measured is not None:
            self.last_measurement = measured
            self.rule.observe(measured)
        if probed is not None:
            self.last_probe = probed.record or self.last_probe
            self.prober.observed(probed)
        self._advance(multiplier)
        return self._end(returned)

    def _advance(self, multiplier: float) -> None:
        """`base.step()` at rates ``base step size * ramp * multiplier_i * lr / unit``."""
        scale = (self.rule.step_size or 0.0) * self.rule.factor(self.counts["steps"]) / self._largest_lr
        if self._meter.beginning is None and scale > 0:
            self._meter.begin(self._params, with_gradient(self.base))
        with rescaled(self.base, scale, self.multipliers, self._division):
            self.base.step()
        self.step_size = scale * multiplier
        self.counts["steps"] += 1

    def _stand(self, returned: Any) -> Any:
        """Let the base optimizer step where nothing is to move."""
        self.base.step()
        self.step_size = 0.0
        return self._end(returned)

    def _skip(self, returned: Any, counted: bool = True) -> Any:
        """Leave weights and base optimizer alone: a gradient is not finite. `counted`: among the steps."""
        self.counts["steps"] += counted
        self.counts["skipped"] += 1
        return self._end(returned)

    def _end(self, returned: Any) -> Any:
        self.armed = None
        probe = self.wants_probe
        self.checks.open(self._params, probe)
        if not probe:
            self.prober.forget()
        return returned

    def _read(self, *values: Tensor | float | list[float]) -> list[float]:
        """Scalars and vectors as Python floats, averaged over ranks: one collective, one synchronisation."""
        weights = itertools.chain.from_iterable(group["params"] for group in self.param_groups)
        device = next(v.device for v in itertools.chain(values, weights) if isinstance(v, Tensor))
        return self.reduce(flat(values, device)).tolist()

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's `state_dict`, with LQA's own state in the first param group under ``"lqa"``.

        There it survives every checkpoint format that keeps optimizers, FSDP's included. The weights that training
        began with travel with the state of the parameters.
        """
        own = {
            "rule": {"name": self.rule.name, "state": self.rule.state_dict()},
            "counts": dict(self.counts),
            "step_size": self.step_size,
            "measurement": None if self.last_measurement is None else asdict(self.last_measurement),
            "beginning": self._meter.places,
            "probe": None if self.last_probe is None else self.last_probe.to_plain(),
            "radius": self.prober.state_dict(),
            "largest_lr": self._largest_lr,
            "gradients": self.checks.watch.state_dict(),
            "backpropagates": self._caller.backpropagates is True,
        }
        return packed(self.base.state_dict(), own, self._params, self._meter.beginning)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned.

        Raises:
            ValueError: it was saved by an optimizer other than LQA, by another version of it, or with another rule.
        """
        base, own = unpacked(state_dict, self.rule.name)
        self.base.load_state_dict(base)
        self.rule.load_state_dict(own["rule"]["state"])
        self.counts.update(own["counts"])
        self.step_size = own["step_size"]
        self.last_probe = None if own["probe"] is None else ProbeRecord.from_plain(own["probe"])
        self.last_measurement = None if own["measurement"] is None else Measurement(**own["measurement"])
        self._meter.beginning = take_snapshot(self.state, self._params, own["beginning"])
        self.prober.load_state_dict(own["radius"])
        self._largest_lr = own["largest_lr"]
        self.checks.watch.load_state_dict(own["gradients"])
        self._caller.backpropagates = own["backpropagates"] or None
        self.checks.open(self._params, self.wants_probe)
