"""`LQA`: any `torch.optim.Optimizer`, with its learning rate measured instead of given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from . import verification
from .checkpoint import ProbeRecord, packed, take_snapshot, unpacked
from .groups import Division, check_base, largest_lr, rescaled, with_gradient
from .measurer import Findings, Measurer, params_of
from .quadratic import Verdict
from .rule import Measurement, Rule, build
from .rule.records import require


def lqa_inside(optimizer: Any) -> LQA | None:
    """The `LQA` inside whatever Accelerate has wrapped around it; `None` if there is none."""
    while optimizer is not None and not isinstance(optimizer, LQA):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer


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
        check_base(base)
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
        self.measurer = Measurer(params_of(base), radius, self.rule, self.counts)
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

    def observe_clipping(self, grad_norm: Tensor | float, max_norm: float, whole: bool = False) -> None:
        """Tell the next `step` that its gradients had the norm `grad_norm` and were then clipped to `max_norm`.

        With it a probe's slope is that of the loss, not of the clipped gradients. Without it what clipping does is
        found by comparing gradients with what they were at the end of the backward pass, which costs a little more.

        Args:
            whole: whether the norm is that of all gradients, which are then not looked at again.
        """
        self.measurer.checks.tell(grad_norm, max_norm, whole)

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
        # Everything is measured first and decided afterwards, so that a closure that raises has changed nothing.
        multiplier = max(float(group["lr"]) for group in self.param_groups)
        factor = self.rule.factor(self.counts["steps"]) * multiplier / self._largest_lr
        found = self.measurer.measure(self.base, closure if closure is not None else self.armed, multiplier, factor)
        if not found.finite:
            self.counts["skipped"] += 1
            self.counts["steps"] += multiplier > 0
        elif multiplier <= 0 or not found.moves:
            # A scheduler's warm-up starts at 0: the base sees the gradient, nothing moves, nothing is measured.
            self.base.step()
            self.step_size = 0.0
        else:
            self._update(found)
            self._advance(multiplier)
        self.armed = None
        self.measurer.open(params_of(self.base), self.wants_probe)
        return found.returned

    def _update(self, found: Findings) -> None:
        """Let the rule follow what was measured."""
        if self.rule.step_size is None:
            self._largest_lr = max(self._largest_lr, largest_lr(self.base))
        if found.measurement is not None:
            self.last_measurement = found.measurement
            self.rule.observe(found.measurement)
        if found.probed is not None:
            self.last_probe = found.probed.record or self.last_probe
            self.measurer.prober.observed(found.probed)

    def _advance(self, multiplier: float) -> None:
        """`base.step()` at rates ``base step size * ramp * multiplier_i * lr / unit``."""
        scale = (self.rule.step_size or 0.0) * self.rule.factor(self.counts["steps"]) / self._largest_lr
        meter = self.measurer.meter
        if meter.beginning is None and scale > 0:
            meter.begin(params_of(self.base), with_gradient(self.base))
        with rescaled(self.base, scale, self.multipliers, self._division):
            self.base.step()
        self.step_size = scale * multiplier
        self.counts["steps"] += 1

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
            "probe": None if self.last_probe is None else self.last_probe.to_plain(),
            "largest_lr": self._largest_lr,
            "measurer": self.measurer.state_dict(),
        }
        return packed(self.base.state_dict(), own, params_of(self.base), self.measurer.meter.beginning)

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
        self._largest_lr = own["largest_lr"]
        kept, params = own["measurer"], params_of(self.base)
        self.measurer.load_state_dict(kept, take_snapshot(self.state, params, kept["beginning"]))
        self.measurer.open(params, self.wants_probe)
