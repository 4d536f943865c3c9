"""How measurements become the step size: what the optimizer asks a policy, and the published rule.

A policy sees numbers only. It is told the shapes of what moves (`begin`), and says before a probe how far to probe
(`radius`); after it, `observe_probe` takes the fit; at the next training step, `observe_end` takes the slopes at both
ends of a step: at its start on the step's own batch, at its end on the next one, and along the whole way from the
weights that training began with.
`step_size` is what the next step should use, before schedule and ramp; `None` until something was measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import Any, ClassVar

from .quadratic import Fit, Verdict


def require(condition: bool, name: str, value: object, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{name}={value!r}: {allowed}")


@dataclass
class PaperPolicy:
    """The published rule: at every step, the minimiser of this batch's parabola (arXiv 2004.03260, Algorithm 1).

        step_size = -slope / curvature,     the last step size where the fit gave none

    Before any fit was usable the probe radius itself is the step size: along it the loss falls to first order by the
    share `tau`. The minimiser is clamped at ``2 |loss| / |slope|``, where a parabola that stays positive must have
    turned: no loss that is bounded below by 0 has its minimum beyond.

    Args:
        tau: the probe radius is where the loss changes by this share to first order, ``tau |loss| / |slope|``;
            in (0, 1).
        probe_interval: probe every so many steps, ``>= 1``.
        probe_radius: a fixed probe radius, in units of the direction, ``> 0``; `None` for the rule above.

    Raises:
        ValueError: an argument is out of its range.
    """

    name: ClassVar[str] = "paper"
    #: Whether it has no step sizes without losses at other weights.
    needs_replays: ClassVar[bool] = True
    _MAX_RADIUS_SCALE: ClassVar[float] = 16.0
    #: Length of a step, the norm of what it does to all weights, where the loss gives none. Along AdamW's first
    #: direction, whose elements are 1, it is a rate of ``0.25 / sqrt(n)``: the best ones of fine-tuning are 0.3 to 7
    #: times as large.
    _LENGTH: ClassVar[float] = 0.25
    #: The share of it below which a first probe does not move the weights; in the benchmark's runs it is 0.04 to 21.
    _NOTHING: ClassVar[float] = 1e-3
    #: The most radii that a first probe tries.
    MAX_TRIES: ClassVar[int] = 6

    tau: float = 0.03
    probe_interval: int = 1
    probe_radius: float | None = None
    step_size: float | None = field(default=None, init=False)
    #: Whether the first loss was no scale. Then radii follow the step size.
    follows_step: bool = field(default=False, init=False)
    #: Factor of the radius, doubled while the losses' differences drown in rounding errors.
    radius_scale: float = field(default=1.0, init=False)

    def __post_init__(self) -> None:
        require(isinstance(self.tau, (int, float)) and 0 < self.tau < 1, "tau", self.tau, "must be in (0, 1)")
        require(
            isinstance(self.probe_interval, int) and self.probe_interval >= 1,
            "probe_interval",
            self.probe_interval,
            "must be an integer >= 1",
        )
        require(
            self.probe_radius is None or (math.isfinite(self.probe_radius) and self.probe_radius > 0),
            "probe_radius",
            self.probe_radius,
            "must be a finite number > 0, or None for the rule",
        )

    def wants_probe(self, step: int) -> bool:
        """Whether step number `step` (from 0) should be probed. The same on all ranks, as all that a policy knows."""
        return self.step_size is None or step % self.probe_interval == 0

    def wants_end_slope(self, step: int) -> bool:
        """Whether the slope at the end of step `step` is to be observed: a copy of the weights until the next step."""
        return False

    def wants_start_slope(self, step: int) -> bool:
        """Whether `observe_end` wants to know the slope at the start of that step, too."""
        return False

    @property
    def wants_vote(self) -> bool:
        """Whether `observe_end` wants to know a vote."""
        return False

    def factor(self, step: int) -> float:
        """What multiplies the step size at step `step`, beside the schedule."""
        return 1.0

    def begin(self, shapes: Sequence[Sequence[int]]) -> None:
        """Take note of the parameters' shapes: to be called before anything is measured. Empty of one that stays."""

    def relative_rates(self, count: int) -> list[float]:
        """What multiplies the step size of each of `count` parameters, beside that; nothing where it is 1 for all."""
        return []

    def radius(self, loss: float, slope: float) -> float | None:
        """The probe radius in units of the direction, from the training loss and ``<gradient, direction>``.

        `None` where there is none: no finite positive distance changes this loss by the share `tau`.
        """
        if self.probe_radius is not None:
            return self.probe_radius
        if slope == 0 or not (math.isfinite(loss) and math.isfinite(slope)):
            return None
        radius = self.tau * abs(loss) / abs(slope)
        if self.follows_step and self.step_size is not None:
            radius = self._radius_of(self.step_size)
        radius *= self.radius_scale
        return radius if math.isfinite(radius) and radius > 0 else None

    def initial_radius(self, loss: float, slope: float, norm: float) -> float | None:
        """The same for a first probe, whose move may not be nothing beside the weights: ``0.25 / norm`` where it is.

        Args:
            norm: of the direction, over all weights.
        """
        radius = self.radius(loss, slope)
        nothing = self.probe_radius is None and (radius or 0.0) * norm < self._NOTHING * self._LENGTH
        if nothing and 0 < abs(slope) < math.inf and math.isfinite(loss) and 0 < norm < math.inf:
            return self._LENGTH / norm
        return radius

    @property
    def searches(self) -> bool:
        """Whether a probe that went too far (`hf_lqa.quadratic.is_beyond`) is taken again nearer."""
        return self.step_size is None or self.follows_step

    def _radius_of(self, step_size: float) -> float:
        """The radius that gives `step_size`, where the loss is no scale."""
        return self.tau * step_size

    def max_step(self, loss: float, slope: float) -> float:
        """The largest step size that a fit may give: ``2 |loss| / |slope|``, in units of the direction.

        Twice the last step size where the first loss was no scale.
        """
        if self.follows_step and self.step_size is not None:
            return 2 * self.step_size
        bound = 2 * abs(loss) / abs(slope) if slope != 0 else math.inf
        return bound if bound > 0 else math.inf

    def observe_probe(self, fit: Fit, radius: float, by_loss: bool = True) -> None:
        """Take the fit of a probe at `radius`; NaN where there was none, as where the gradient is 0.

        Args:
            by_loss: whether that is `radius`'s; else a first probe had to look for another.
        """
        self._adapt_radius(fit)
        self.follows_step |= not by_loss
        if fit.step_size:
            self.step_size = fit.step_size
        elif math.isfinite(radius) and fit.verdict is not Verdict.NON_FINITE:
            held = self.step_size is not None and (not self.follows_step or fit.verdict is Verdict.BELOW_NOISE)
            self.step_size = self.step_size if held else radius

    def observe_end(
        self,
        starts: Sequence[float],
        ends: Sequence[float],
        sizes: Sequence[int],
        factor: float,
        ways: Sequence[float] = (),
        vote: float = 0.0,
    ) -> None:
        """Take the slopes at both ends of a step, ``<gradient, move> / step_size`` of each parameter.

        To be called before the next step: a move's relative rates are taken to be what they are now.

        Args:
            starts: at its start, on the step's own batch; loss per unit step, negative where the loss falls, 0 where
                it is not known. Empty unless `wants_start_slope`.
            ends: at its end, on the next batch; NaN where it is not known.
            sizes: number of elements of each parameter.
            factor: what multiplied the level in that step: schedule and ramp.
            ways: on the next batch, too, ``<gradient, theta - theta_0>`` of each parameter, in units of the loss: its
                derivative by the logarithm of how far the parameter has come from ``theta_0``, the weights that
                training began with. Negative where the loss falls further that way, 0 where it is not known. Empty
                where `wants_start_slope`.
            vote: on the next batch, too, the mean of ``sign(gradient) sign(theta - theta_0)`` over all elements, in
                [-1, 1]; 0 unless `wants_vote`.
        """

    def plan(self, total_steps: int, final_factor: float = 0.0) -> None:
        """Take note of what is known of the schedule: to be called before the first step.

        Args:
            total_steps: how many steps training has, ``>= 1``.
            final_factor: the schedule's factor at its end, in [0, 1]: 0 for a linear one, 1 for a constant one.

        Raises:
            ValueError: an argument is out of its range.
        """
        integer = isinstance(total_steps, Integral) and not isinstance(total_steps, bool)
        require(integer and total_steps >= 1, "total_steps", total_steps, "must be an integer >= 1")
        require(
            isinstance(final_factor, Real) and 0 <= final_factor <= 1, "final_factor", final_factor, "must be in [0, 1]"
        )

    def _adapt_radius(self, fit: Fit) -> None:
        if fit.verdict is Verdict.BELOW_NOISE:
            self.radius_scale = min(2 * self.radius_scale, self._MAX_RADIUS_SCALE)
        elif fit.verdict.usable:
            self.radius_scale = max(self.radius_scale / 2, 1.0)
        elif fit.verdict is Verdict.NON_FINITE:
            self.radius_scale = 1.0

    def state_dict(self) -> dict[str, Any]:
        """What changes in training, as numbers and lists of numbers, in a form that JSON can hold."""
        return {f.name: getattr(self, f.name) for f in fields(self) if not f.init}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for f in fields(self):
            if not f.init:
                setattr(self, f.name, state[f.name])
