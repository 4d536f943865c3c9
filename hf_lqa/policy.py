"""How measurements become the step size: the published rule, and the one that is the default for fine-tuning.

A policy sees floats only. Before a probe it says how far to probe (`radius`); after it, `observe_probe` takes the fit;
at the next training step, `observe_end` takes the slope that the next batch's gradient measured at the end of a step.
`step_size` is what the next step should use, before schedule and ramp; `None` until something was measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from .quadratic import Fit, Verdict


def _require(condition: bool, name: str, value: object, allowed: str) -> None:
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
    _MAX_RADIUS_SCALE: ClassVar[float] = 16.0

    tau: float = 0.03
    probe_interval: int = 1
    probe_radius: float | None = None
    step_size: float | None = field(default=None, init=False)
    #: Factor of the radius, doubled while the losses' differences drown in rounding errors.
    radius_scale: float = field(default=1.0, init=False)

    def __post_init__(self) -> None:
        _require(isinstance(self.tau, (int, float)) and 0 < self.tau < 1, "tau", self.tau, "must be in (0, 1)")
        _require(
            isinstance(self.probe_interval, int) and self.probe_interval >= 1,
            "probe_interval",
            self.probe_interval,
            "must be an integer >= 1",
        )
        _require(
            self.probe_radius is None or (math.isfinite(self.probe_radius) and self.probe_radius > 0),
            "probe_radius",
            self.probe_radius,
            "must be a finite number > 0, or None for the rule",
        )

    def wants_probe(self, step: int) -> bool:
        """Whether step number `step` (from 0) should be probed. The same on all ranks: it depends on counts alone."""
        return self.step_size is None or step % self.probe_interval == 0

    def wants_end_slope(self, step: int) -> bool:
        """Whether the slope at the end of step `step` is to be observed: a copy of the weights until the next step."""
        return False

    def factor(self, step: int) -> float:
        """What multiplies the step size at step `step`, beside the schedule."""
        return 1.0

    def radius(self, loss: float, slope: float) -> float | None:
        """The probe radius in units of the direction, from the training loss and ``<gradient, direction>``.

        `None` where there is none: no finite positive distance changes this loss by the share `tau`.
        """
        if self.probe_radius is not None:
            return self.probe_radius
        if slope == 0 or not (math.isfinite(loss) and math.isfinite(slope)):
            return None
        radius = self.radius_scale * self.tau * abs(loss) / abs(slope)
        return radius if math.isfinite(radius) and radius > 0 else None

    def max_step(self, loss: float, slope: float) -> float:
        """The largest step size that a fit may give: ``2 |loss| / |slope|``, in units of the direction."""
        bound = 2 * abs(loss) / abs(slope) if slope != 0 else math.inf
        return bound if bound > 0 else math.inf

    def observe_probe(self, fit: Fit, radius: float) -> None:
        """Take the fit of a probe at `radius`."""
        self._adapt_radius(fit)
        if fit.step_size:
            self.step_size = fit.step_size
        elif self.step_size is None and fit.verdict is not Verdict.NON_FINITE:
            self.step_size = radius

    def observe_end(self, slope: float, factor: float) -> None:
        """Take the next batch's slope at the end of a step, ``<gradient, move> / step_size``.

        `factor` is what multiplied the level in that step: schedule and warm-up.
        """

    def plan(self, total_steps: int) -> None:
        """Take note of how many steps training has, where that is known."""

    def _adapt_radius(self, fit: Fit) -> None:
        if fit.verdict is Verdict.BELOW_NOISE:
            self.radius_scale = min(2 * self.radius_scale, self._MAX_RADIUS_SCALE)
        elif fit.verdict.usable:
            self.radius_scale = max(self.radius_scale / 2, 1.0)
        elif fit.verdict is Verdict.NON_FINITE:
            self.radius_scale = 1.0

    def cadence(self) -> str:
        """When it probes, in words."""
        return f"a probe every {self.probe_interval} steps" if self.probe_interval > 1 else "a probe at every step"

    def state_dict(self) -> dict[str, Any]:
        """What changes in training, as floats, in a form that every checkpoint format can hold."""
        return {f.name: getattr(self, f.name) for f in fields(self) if not f.init}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for f in fields(self):
            if not f.init:
                setattr(self, f.name, state[f.name])


@dataclass
class CrossBatchPolicy(PaperPolicy):
    """Differs from `PaperPolicy` in where the parabola's second condition comes from: the next batch's gradient.

    A batch's own parabola counts the batch's own noise as progress. The slope at the *end* of a step, measured by the
    gradient of the batch after it (which training computes anyway), does not: along the line, the parabola of fresh
    data has its minimum where that slope is 0. The level is moved towards that zero on a logarithmic scale. Observation
    number ``k`` (from 0), made of a step that was taken with the factor ``f`` (schedule times warm-up), is

        y      = <gradient_{t+1}, theta_{t+1} - theta_t> / step_size_t        < 0: a fresh batch says "further"
        z      = y / rms(y), clipped to [-2, 2];     rms: exponential average of y**2 with decay 0.9, bias-corrected
        level *= exp(-eta f z / sqrt(k + 4))

    Divided by their own recent size the slopes need no unit; moves fade as evidence accumulates, and as the schedule
    shrinks the steps: a short step's slope says little about a long one.

    The first level is the probe radius. It is ramped up linearly during `warmup` steps, and the first 12 steps are not
    observed: while a fresh head and biases are learned, the end slope is negative at every rate. Where the number of
    steps is known and small (`plan`), there is no time for a timid start: the ramp is shorter and the first level
    higher.

    The applied step size is ``level * min(1, (step + 1) / warmup)``, times the schedule's factor.

    As moves fade, so does the need to observe: a distance of ``n`` steps is kept for 16 observations, then ``n + 1``.

    Probes are dense at the start and rare later: at steps 0, 4, 16, 64, ... and every `probe_interval`. They give the
    first level; later ones are measurements, which the level does not depend on.

    Args:
        probe_interval: the longest distance between probes, in steps.
        eta: gain; in (0, 1].
        warmup: steps of the ramp, ``>= 0``, not observed; `None`: as said above.
    """

    name: ClassVar[str] = "cross_batch"
    _DECAY: ClassVar[float] = 0.9
    _MAX_Z: ClassVar[float] = 2.0
    _FADING: ClassVar[int] = 4
    _BURN_IN: ClassVar[int] = 12
    #: Observations at each distance between them.
    _DENSE: ClassVar[int] = 16

    tau: float | None = None  # type: ignore[assignment]
    probe_interval: int = 100
    eta: float = 0.3
    warmup: int | None = None
    observations: int = field(default=0, init=False)
    mean_square: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self._planned = self.tau is None, self.warmup is None
        self._observe_from = self._BURN_IN if self.warmup is None else self.warmup
        self.tau = 0.03 if self.tau is None else self.tau
        self.warmup = 12 if self.warmup is None else self.warmup
        super().__post_init__()
        _require(isinstance(self.eta, (int, float)) and 0 < self.eta <= 1, "eta", self.eta, "must be in (0, 1]")
        _require(isinstance(self.warmup, int) and self.warmup >= 0, "warmup", self.warmup, "must be an integer >= 0")

    def plan(self, total_steps: int) -> None:
        tau, warmup = self._planned
        if tau:
            self.tau = min(0.1, max(0.03, 10 / max(total_steps, 1)))
        if warmup:
            self.warmup = max(3, min(12, round(0.06 * total_steps)))

    def cadence(self) -> str:
        return f"probes at steps 1, 5, 17, 65, ... and every {self.probe_interval}"

    def wants_probe(self, step: int) -> bool:
        if self.step_size is None or step % self.probe_interval == 0:
            return True
        # Powers of 4: a single bit, at an even place.
        return step < self.probe_interval and step & (step - 1) == 0 and step.bit_length() % 2 == 1 and step > 1

    def wants_end_slope(self, step: int) -> bool:
        since = step - (self._observe_from - 1)
        if since < 0:
            return False
        # Distances 1 to n - 1 take 16 (1 + 2 + ... + (n - 1)) steps.
        distance = int((1 + math.sqrt(1 + 8 * since / self._DENSE)) / 2)
        return step % distance == 0

    def factor(self, step: int) -> float:
        return min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0

    def observe_probe(self, fit: Fit, radius: float) -> None:
        self._adapt_radius(fit)
        if self.step_size is None and math.isfinite(radius) and fit.verdict is not Verdict.NON_FINITE:
            self.step_size = radius

    def observe_end(self, slope: float, factor: float) -> None:
        square = slope * slope
        if self.step_size is None or not 0 < square < math.inf:
            return
        self.mean_square = self._DECAY * self.mean_square + (1 - self._DECAY) * square
        rms = math.sqrt(self.mean_square / (1 - self._DECAY ** (self.observations + 1)))
        z = min(max(slope / rms, -self._MAX_Z), self._MAX_Z)
        gain = self.eta * min(factor, 1.0) / math.sqrt(self.observations + self._FADING)
        level = self.step_size * math.exp(-gain * z)
        if 0 < level < math.inf:
            self.step_size = level
        self.observations += 1


#: What the optimizer talks to.
Policy = PaperPolicy
POLICIES: dict[str, type[PaperPolicy]] = {p.name: p for p in (PaperPolicy, CrossBatchPolicy)}
