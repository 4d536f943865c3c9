"""`LQA`: any `torch.optim.Optimizer`, with its learning rate measured instead of given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from . import verification
from .checkpoint import ProbeRecord, packed, take_snapshot, unpacked
from .groups import Division, check_base, largest_lr, params_of, rescaled, with_gradient
from .measurer import Measurer
from .quadratic import Verdict
from .rule import Measurement, Rule, build
from .rule.records import require_steps


def lqa_inside(optimizer: Any) -> LQA | None:
    """The `LQA` inside whatever Accelerate has wrapped around it; `None` if there is none."""
    while optimizer is not None and not isinstance(optimizer, LQA):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer


def _of_base(name: str) -> Any:
    """An attribute shared with the base, also when somebody (FSDP2 under Accelerate, a checkpoint) replaces it."""
    return property(lambda self: getattr(self.base, name), lambda self, value: setattr(self.base, name, value))


class LQA(torch.optim.Optimizer):
    """A `torch.optim.Optimizer` around another, the base, whose learning rate it measures.

    ::

        optimizer = LQA(torch.optim.AdamW(model.parameters(), lr=1.0), total_steps=1000)
        closure = ReplayedLoss(model)
        closure.record(compute_loss, batch).backward()
        optimizer.step(closure)

    A group's ``lr`` is a *multiplier*: 1.0 by default, scaled by schedules. A step moves tensor ``i`` of group ``g`` by

        step_size * multiplier_i * (lr_g / max lr) * d      step_size = base step size * ramp * max lr / unit

    where ``d`` is the base optimizer's update at unit learning rate, ``multiplier_i`` the rule's per-tensor multiplier,
    ``max lr`` the largest ``lr`` at this step, and ``unit`` the largest before schedules, but at least 1: groups of 1
    and 16 are those of 1/16 and 1. Without a probe this is ``base.step()`` at that rate, if all gradients are finite.

    Args:
        base: the optimizer whose direction is used, and whose param groups and state are shared. Its updates must be
            proportional to its ``lr``.
        rule: ``"displacement"`` (the default) or ``"paper"`` (arXiv 2004.03260, Algorithm 1).
        total_steps: how many steps training has, ``>= 1``; the more, the lower the base step size. `None`: 1,000.
        options: the rule's, see `hf_lqa.rule.build`.

    Attributes:
        step_size: last applied, schedule included, to the group with the largest multiplier; `None` before any.
        last_probe, last_measurement: the last `ProbeRecord` and `Measurement`, `None` before any.
        counts: number of ``steps``, ``skipped`` steps, ``probe_forwards``, first probes that ``searched`` a radius
            because the loss's value said none, and of each verdict; and what `hf_lqa.verification` has found out.
        measurer: takes what the rule wants to know of a step.

    Raises:
        ValueError: `base` cannot be stepped (`check_base`), or `rule`, `total_steps` or an option is not valid.
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
        self.armed: Callable[[], Tensor] | None = None
        # Not super().__init__(): the groups are the base's own objects, which are complete already.
        self.defaults = base.defaults
        super().__setstate__({})

    param_groups, state = _of_base("param_groups"), _of_base("state")

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k != "armed"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "armed": None})

    def __repr__(self) -> str:
        return f"LQA ({self.rule.name}) around {self.base!r}"

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.base.add_param_group(param_group)

    def plan(self, total_steps: int) -> None:
        """Say before the first step how many training has. A `ValueError` unless that is an integer ``>= 1``."""
        require_steps(total_steps)
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
    def wants_probe(self) -> bool:
        """Whether the next step will call its closure. Nothing needs to be recorded for one that will not."""
        return self.rule.wants_probe(self.counts["steps"])

    def arm(self, closure: Callable[[], Tensor] | None) -> None:
        """Provide the closure of the next `step`, for loops that call it without (`None`: take it back)."""
        self.armed = closure

    def observe_clipping(self, grad_norm: Tensor | float, max_norm: float, whole: bool = False) -> None:
        """Tell the next `step` that its gradients had the norm `grad_norm` and were then clipped to `max_norm`.

        A probe's slope is then that of the loss. Untold, what clipping does is found out, which costs a little more.

        Args:
            whole: whether the norm is that of all gradients, which are then not looked at again.
        """
        self.measurer.checks.tell(grad_norm, max_norm, whole)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Advance the base optimizer once, at the step size that was measured, unless a gradient is not finite.

        Args:
            closure: returns the loss. One of two kinds, of which the first is called on probe steps only.

                - Without gradient, as a 0-dim tensor, the same whenever it is called at the same weights
                  (`ReplayedLoss` makes one). An attribute ``loss`` is taken for the loss at the origin.
                - PyTorch's convention: it clears the gradients and calls ``backward``. Called once at every step, and
                  twice more on probe steps, with the same random numbers and nothing left of it.

                If it raises, everything is as before. Without one nothing is probed; the rule ``"paper"`` needs one.

        Returns:
            What the closure returned, or its ``loss``; `None` where that is not known.

        Raises:
            ValueError: no closure, and the rule cannot begin without; or a closure that cannot be called.
        """
        # Everything is measured first and decided afterwards, so that a closure that raises has changed nothing.
        multiplier = max(float(group["lr"]) for group in self.param_groups)
        factor = self.rule.factor(self.counts["steps"]) * multiplier / self._largest_lr
        found = self.measurer.measure(self.base, closure if closure is not None else self.armed, multiplier, factor)
        self.armed = None
        if not found.finite:
            self.counts["skipped"] += 1
            self.counts["steps"] += multiplier > 0
        elif multiplier <= 0 or not found.moves:
            # A scheduler's warm-up starts at 0: the base sees the gradient, nothing moves, nothing is measured.
            self.base.step()
            self.step_size = 0.0
        else:
            if self.rule.step_size is None:
                self._largest_lr = max(self._largest_lr, largest_lr(self.base))
            if found.measurement is not None:
                self.last_measurement = found.measurement
                self.rule.observe(found.measurement)
            if found.probed is not None:
                self.last_probe = found.probed.record or self.last_probe
                self.measurer.prober.observed(found.probed)
            self._advance(multiplier)
        self.measurer.open(params_of(self.base), self.wants_probe)
        return found.returned

    def _advance(self, multiplier: float) -> None:
        """`base.step()` at rates ``base step size * ramp * multiplier_i * lr / unit``."""
        scale = (self.rule.step_size or 0.0) * self.rule.factor(self.counts["steps"]) / self._largest_lr
        if self.rule.measures and self.measurer.meter.beginning is None and scale > 0:
            self.measurer.meter.begin(params_of(self.base), with_gradient(self.base))
        with rescaled(self.base, scale, self.multipliers, self._division):
            self.base.step()
        self.step_size = scale * multiplier
        self.counts["steps"] += 1

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's `state_dict`, with LQA's own state in the first param group under ``"lqa"``.

        There it survives every checkpoint format that keeps optimizers. The first weights travel with the state.
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
