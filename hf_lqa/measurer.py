"""What is measured at a step: its gradients, the way that training has come, and the loss around the weights."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .checks import GradientChecks
from .closures import Caller, relative_noise
from .groups import params_of
from .prober import Probed, Prober, Step
from .rule import Measurement, Rule
from .rule.radius import RadiusConfig
from .slopes import SlopeMeter, Snapshot, flat, mean_over_ranks


@dataclass(frozen=True)
class Findings:
    """What was measured at a step, of which nothing is decided yet.

    Attributes:
        returned: what the closure returned, or its ``loss``; `None` where that is not known.
        moves: whether any parameter has a gradient.
        finite: whether all gradients, and the slope along the direction, are finite.
        measurement: of the way that training has come; `None` where none was due.
        probed: what a probe has found; `None` where none was taken.
    """

    returned: Any
    moves: bool = True
    finite: bool = True
    measurement: Measurement | None = None
    probed: Probed | None = None


class Measurer:
    """Takes what a rule wants to know of a step, and changes nothing that the step depends on.

    Args:
        params: an optimizer's.
        config: constants of the probes' radius.
        rule: that says when to probe and to measure.
        counts: the optimizer's; forwards and findings are counted there.

    Attributes:
        checks: whether gradients are finite, and what a loop did to them.
        prober: takes probes.
        meter: compares gradients with the way that training has come.
        reduce: mean of a vector over the data-parallel ranks; every decision is made on its results.
    """

    def __init__(self, params: list[Tensor], config: RadiusConfig, rule: Rule, counts: dict[str, int]):
        self.checks = GradientChecks(params)
        self.prober = Prober(config, rule, self.checks.watch, counts)
        self.meter = SlopeMeter()
        self.reduce: Callable[[Tensor], Tensor] = mean_over_ranks
        self._rule, self._counts = rule, counts
        self._caller = Caller()

    def measure(
        self, base: torch.optim.Optimizer, closure: Callable[[], Any] | None, multiplier: float, factor: float
    ) -> Findings:
        """What is to be known before the next step of `base`.

        Args:
            closure: as of `LQA.step`.
            multiplier: the largest ``lr`` of the groups at this step.
            factor: what multiplies the base step size in it.

        Raises:
            ValueError: as `LQA.step`.
        """
        number, given = self._counts["steps"], closure is not None
        # Checkpoints of sharded optimizers make one step at rate 0, to have a state to load into.
        wants_probe = self._rule.wants_probe(number) and multiplier > 0
        returned, closure, asked = self._caller.ask(closure, params_of(base), wants_probe)
        self.checks.watch.close()
        params = params_of(base)
        if all(p.grad is None for p in params):
            self._caller.warn_of_no_gradient(given)
            return Findings(returned, moves=False)
        checks = self.checks.pending(params, wants_probe)
        slopes = self.meter.pending(multiplier > 0 and self._rule.wants_measurement(number))
        numbers = self.read(params, *checks, *slopes)
        checked = self.checks.found(numbers[: len(checks)])
        if not checked.finite or multiplier <= 0:
            return Findings(returned, finite=checked.finite)
        measured = self.meter.measurement(numbers[len(checks) :], len(params), factor, number)
        if not wants_probe:
            return Findings(returned, measurement=measured)
        step = Step(number, checked, relative_noise(closure, params), lambda *values: self.read(params, *values))
        probed = self.prober.take(base, params, closure, step, multiplier)
        self._counts["probe_forwards"] += asked
        finite = probed is None or math.isfinite(probed.slope)
        return Findings(returned, finite=finite, measurement=measured, probed=probed)

    def open(self, params: list[Tensor], probe: bool) -> None:
        """Begin anew before the next backward pass, after which a probe is due or not."""
        self.checks.open(params, probe)
        if not probe:
            self.prober.forget()

    def read(self, params: list[Tensor], *values: Tensor | float | list[float]) -> list[float]:
        """Scalars and vectors as Python floats, averaged over ranks: one collective, one synchronisation."""
        device = next(v.device for v in itertools.chain(values, params) if isinstance(v, Tensor))
        return self.reduce(flat(values, device)).tolist()

    def state_dict(self) -> dict[str, Any]:
        """What is kept of former steps, but for the weights that training began with, in a form that JSON can hold."""
        return {
            "beginning": self.meter.places,
            "radius": self.prober.state_dict(),
            "gradients": self.checks.watch.state_dict(),
            "backpropagates": self._caller.backpropagates is True,
        }

    def load_state_dict(self, state: dict[str, Any], beginning: Snapshot | None) -> None:
        """Load what `state_dict` returned, with the weights that training began with."""
        self.meter.beginning = beginning
        self.prober.load_state_dict(state["radius"])
        self.checks.watch.load_state_dict(state["gradients"])
        self._caller.backpropagates = state["backpropagates"] or None
