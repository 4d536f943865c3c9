"""The rule for fine-tuning, and which rules there are by name."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from .policy import PaperPolicy, require
from .quadratic import Fit, Verdict, end_ratio


@dataclass
class FirstStepsPolicy(PaperPolicy):
    """Differs from `PaperPolicy` in where the parabola's second condition comes from: the next batch's gradient.

    A batch's own parabola counts the batch's own noise as progress. The slope at the *end* of a step, measured by the
    gradient of the batch after it (which training computes anyway), does not: along the line, the parabola of fresh
    data has its minimum where that slope is 0. What is left of the slope at the end of a step,

        r = median of end_i / |start_i|         start_i = <gradient_t, move_t>_i, end_i = <gradient_{t+1}, move_t>_i

    over the parameters ``i``, weighted by the root of their number of elements, is -1 where a step was far too short,
    0 at the minimum, positive beyond (`hf_lqa.quadratic.end_ratio`). ``start`` and ``end`` are averages (decay 0.8).

    **The first steps** are an eighth of the run's, at least 12 and at most 24. In 12 of them the level follows the
    slope per unit step as the base optimizer's moments settle, to where a step changes its batch's loss to first order
    by the share ``4/3 tau``:

        target = 4/3 radius |start_0| / mean |start_t|,        level *= (target / level)**0.5

    and it grows where the slope at the end of a step can be believed. Below ``r = -0.5`` little of the batch's slope
    is noise: it grows by ``(0.5 / (1 + r))**(1/6)`` a step, in all first steps, towards where half of the slope is
    left. Above it, ``q = r' / r_0`` is how much is left of what is no noise (``r_0``: the lowest averaged ratio so far;
    ``r'``: with averages that forget faster, decay 0.5). In the 12 steps, while the parabolas of the probes at steps 4,
    7 and 10 open upwards, the level moves to where 0.7 of it is left,

        level *= clip(held / level (1 - 0.7) / (1 - q), exp(-0.5), exp(0.5)),

    on the line through ``q = 1`` at level 0 and the measured one at ``held``, the level that ``r'`` is of: the same
    average of the logarithms. What it moves in all is kept ``>= 1``. A parabola that opens downwards takes this growth
    back at once: there, as where a fresh head is learned, the slope is about to change. The other first steps wait for
    that to be over: until then a slope persists at any level.

    **The ramp** multiplies the step size by ``min(1, (step + 1) / warmup)``. Once one of the 12 steps ends clearly
    beyond the minimum (``r' > 0.15``), it is as long as the first steps from there on, and growth by parabolas is taken
    back: what turns a slope so early is that it steepens.

    Probes are rare: at step 0, at 4, 7 and 10 until one opens downwards or a step overshoots, and every
    `probe_interval`. The first gives the first level, the next say whether it may grow; later ones are measurements,
    which it does not depend on.

    Args:
        probe_interval: distance between probes, in steps, but for those at steps 4, 7 and 10.
        warmup: steps of the ramp, ``>= 0``, unless one of the first steps overshoots.
    """

    _SETTLED: ClassVar[float] = 4 / 3
    _SETTLING: ClassVar[float] = 0.5
    #: Below this (negative) ratio a batch's slope is believed; growth in a step, as a power of what its parabola says.
    _BELIEVED: ClassVar[float] = 0.5
    _GROWTH: ClassVar[float] = 1 / 6
    #: Above it: the share of the lowest ratio to be left, and the largest move in a step, its logarithm.
    _LEFT: ClassVar[float] = 0.7
    _PACE: ClassVar[float] = 0.5
    #: Above this (positive) ratio the first steps overshoot.
    _OVERSHOT: ClassVar[float] = 0.15
    #: Of the averages, and of those of what is left.
    _FIRST_DECAY: ClassVar[float] = 0.8
    _QUICK_DECAY: ClassVar[float] = 0.5
    #: Steps in which the level follows the slope; most first steps, and their share of a run.
    _SETTLING_STEPS: ClassVar[int] = 12
    _MAX_FIRST_STEPS: ClassVar[int] = 24
    _FIRST_SHARE: ClassVar[float] = 1 / 8
    _FIRST_PROBES: ClassVar[tuple[int, ...]] = (4, 7, 10)

    probe_interval: int = 100
    warmup: int = 3
    first_observations: int = field(default=0, init=False)
    #: Radius and slope of step 0, growth so far.
    first_radius: float = field(default=0.0, init=False)
    first_slope: float = field(default=0.0, init=False)
    growth: float = field(default=1.0, init=False)
    #: Logarithm of the growth that parabolas must consent to, and its quick average.
    convex_growth: float = field(default=0.0, init=False)
    held_growth: float = field(default=0.0, init=False)
    #: Whether the parabolas of the probes after the first opened upwards, and no step overshot; `None`: there was none
    #: that says.
    convex: bool | None = field(default=None, init=False)
    #: The lowest averaged ratio.
    lowest: float = field(default=0.0, init=False)
    #: Whether one of the first steps overshot.
    overshot: bool = field(default=False, init=False)
    #: Averages of each parameter's slopes.
    starts: list[float] = field(default_factory=list, init=False)
    ends: list[float] = field(default_factory=list, init=False)
    quick_starts: list[float] = field(default_factory=list, init=False)
    quick_ends: list[float] = field(default_factory=list, init=False)
    #: Sums of them, start slopes without their signs.
    start_sums: list[float] = field(default_factory=list, init=False)
    end_sums: list[float] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self._first_steps = self._MAX_FIRST_STEPS
        super().__post_init__()
        require(isinstance(self.warmup, int) and self.warmup >= 0, "warmup", self.warmup, "must be an integer >= 0")

    def plan(self, total_steps: int, final_factor: float = 0.0) -> None:
        super().plan(total_steps, final_factor)
        share = int(self._FIRST_SHARE * total_steps)
        self._first_steps = min(max(share, self._SETTLING_STEPS), self._MAX_FIRST_STEPS)

    def cadence(self) -> str:
        first = ", ".join(str(step + 1) for step in self._FIRST_PROBES)
        until = "until a parabola opens downwards or a step overshoots"
        return f"probes at step 1, at {first} {until}, and every {self.probe_interval}"

    def wants_probe(self, step: int) -> bool:
        # One that opened downwards, or a step that overshot, has the last word.
        return super().wants_probe(step) or (step in self._FIRST_PROBES and self.convex is not False)

    def wants_end_slope(self, step: int) -> bool:
        return step < self._first_steps

    def wants_start_slope(self, step: int) -> bool:
        return step < self._first_steps

    def factor(self, step: int) -> float:
        length = max(self.warmup, self._first_steps) if self.overshot else self.warmup
        return min(1.0, (step + 1) / length) if length else 1.0

    def observe_probe(self, fit: Fit, radius: float) -> None:
        self._adapt_radius(fit)
        if self.step_size is None and math.isfinite(radius) and fit.verdict is not Verdict.NON_FINITE:
            self.first_radius = radius
            self._set_level(self._SETTLED * radius)
            if self.step_size is None:
                self.step_size = radius
        elif self.step_size is not None and self.first_observations < self._SETTLING_STEPS:
            if fit.verdict in (Verdict.NON_CONVEX, Verdict.NON_DESCENT):
                self._take_back()
            elif fit.verdict.usable and self.convex is None:
                self.convex = True

    def observe_end(
        self,
        starts: Sequence[float],
        ends: Sequence[float],
        sizes: Sequence[int],
        factor: float,
        ways: Sequence[float] = (),
    ) -> None:
        known = [end for start, end in zip(starts, ends, strict=False) if start]
        if self.step_size is None or not starts or len(starts) != len(self.starts or starts):
            return
        if not all(map(math.isfinite, (*starts, *known))):
            return
        # Of those that did not move, or are not observed, nothing is known.
        ends = [end if start else 0.0 for start, end in zip(starts, ends, strict=True)]
        self.first_observations += 1
        if self.first_observations == 1:
            zeros = [0.0] * len(starts)
            self.starts = self.ends = self.quick_starts = self.quick_ends = self.start_sums = self.end_sums = zeros
        else:
            # AdamW's first direction is the sign of one batch's gradient, and left out.
            self.start_sums = [old + abs(new) for old, new in zip(self.start_sums, starts, strict=True)]
            self.end_sums = [old + new for old, new in zip(self.end_sums, ends, strict=True)]
            self.quick_starts = _averaged(self.quick_starts, starts, self._QUICK_DECAY)
            self.quick_ends = _averaged(self.quick_ends, ends, self._QUICK_DECAY)
        self.starts = _averaged(self.starts, starts, self._FIRST_DECAY)
        self.ends = _averaged(self.ends, ends, self._FIRST_DECAY)
        self._find_level(sizes)

    def _find_level(self, sizes: Sequence[int]) -> None:
        """Move the level by the averages, which are those of an exponential decay from zero."""
        count = self.first_observations
        slope = abs(sum(self.starts)) / (1 - self._FIRST_DECAY**count)
        if count == 1:
            self.first_slope = slope
            return
        weights = _weights(sizes)
        ratio = end_ratio(self.starts, self.ends, weights)
        ratio = 0.0 if math.isnan(ratio) else ratio
        self.lowest = min(self.lowest, ratio)
        quick = end_ratio(self.quick_starts, self.quick_ends, weights)
        settling = count <= self._SETTLING_STEPS
        if settling and quick > self._OVERSHOT:
            self.overshot = True
            self._take_back()
        assert self.step_size is not None
        level = self.step_size
        if settling and count > 2 and slope > 0:
            settled = self._SETTLED * self.first_radius * self.first_slope / slope
            level *= (settled * self.growth * math.exp(self.convex_growth) / level) ** self._SETTLING
        if ratio < -self._BELIEVED:
            growth = (self._BELIEVED / (1 + ratio)) ** self._GROWTH
            self.growth, level = self.growth * growth, level * growth
        elif settling and self.convex and self.lowest < 0:
            move = self._convex_move(quick / self.lowest)
            self.convex_growth, level = self.convex_growth + move, level * math.exp(move)
        self._set_level(level)

    def _convex_move(self, left: float) -> float:
        """Logarithm of the move to where `_LEFT` of the slope is left, if `left` of it is at the level held so far."""
        self.held_growth += (1 - self._QUICK_DECAY) * (self.convex_growth - self.held_growth)
        if math.isnan(left):
            return 0.0
        target = self.held_growth + math.log((1 - self._LEFT) / (1 - left)) if left < 1 else math.inf
        return max(min(target - self.convex_growth, self._PACE), -self._PACE, -self.convex_growth)

    def _take_back(self) -> None:
        """End the growth that parabolas must consent to, and take it out of the level."""
        assert self.step_size is not None
        self._set_level(self.step_size * math.exp(-self.convex_growth))
        self.convex, self.convex_growth = False, 0.0

    def _set_level(self, level: float) -> None:
        if 0 < level < math.inf:
            self.step_size = level


@dataclass
class CrossBatchPolicy(FirstStepsPolicy):
    """Differs from `FirstStepsPolicy` in that it goes on: every later step moves the level, and relative rates.

    ``start`` stays as it was last, a scale. Observation number ``k`` (from 0), made of a step that was taken with the
    factor ``f`` (of the level: schedule, ramp and what else shortens it), moves **the level** on a logarithmic scale:

        z      = clip(r / rms(r), -2, 2) - aim            rms: root of the average of r**2, decay 0.9, bias-corrected
        level *= exp(-eta f z / sqrt(k + 4))
        aim    = 0.5 |r_0| - short log2(2 level / first)  r_0: the lowest averaged ratio of the first steps
        short  = 0.4 (1 + final_factor) (1 - (1 - final_factor) min(1, 100 / total_steps))

    Divided by their own recent size the ratios need no scale; moves fade as evidence accumulates, and as the schedule
    shrinks the steps: a short step's slope says little about a long one. The less of the batch's slope is noise, the
    further beyond the minimum lies the aim: what a step overshoots along steep directions the schedule's end takes
    back, what it gains along flat ones stays. The longer the run, and the less its schedule takes back, the further
    short of the minimum: noise is paid for in every step. A constant aim short of it would be a drift without end where
    the ratios are all noise, as late in training; so the level is drawn towards half of what the first steps found
    (``first``; the logarithm is kept in [-1, 3]). A run whose end is not known is taken for an endless one.

    **Relative rates.** What is left of its slope differs between parameters: in fine-tuning from a hundredth in the
    lowest layers, where a batch's slope is all noise, to nine tenths in a fresh head. So parameter ``i`` moves
    ``rate_i`` times as far as the level says. After the first steps (without the first of them)

        rate_i = c abs(q_i)**0.5,        q_i = sum of end_i / sum of abs(start_i), kept in [-1, -0.02]

    and from then on each follows the slope along all the way it has come from the weights that training began with,

        z_i     = clip(s_i / rms(s_i), -2, 2)        s_i = <gradient_{t+1}, theta_{t+1} - theta_0>_i
        rate_i *= c exp(-eta f z_i / sqrt(k + 4))

    which is below zero where going further that way would have been better. A move's own slope says so with more noise:
    what all moves have in common is a small part of each, and nearly all of their sum. ``c`` makes the mean of
    ``rate_i**2``, weighted as the median, 1: relative rates turn a step, and leave its length to the level. They are
    kept in [1/4, 4] and applied to the nearest half of a doubling. A parameter that is not observed has that of the one
    before it. Ratios are divided by ``rate_i`` for the level.

    **The applied step size** is, times the schedule's factor and `relative_rates`,

        level * ramp * clip(rms(r) / (0.1 abs(r_0)), 0.1, 1)

    The last factor (from 10 observations on) is 1 in most runs. Slopes that have shrunk to less than a tenth of what at
    first was no noise are those of a run that has converged: what is left is noise, to which a step adds its length.

    As moves fade, so does the need to observe: a distance of ``n`` steps is kept for 16 observations, then ``n + 1``.

    Args:
        eta: gain; in (0, 1].
    """

    name: ClassVar[str] = "cross_batch"
    _BEYOND: ClassVar[float] = 0.5
    _SHORT: ClassVar[float] = 0.4
    #: Share of the first steps' level to which one that aims short is drawn, and bounds of its doublings from there.
    _LEAST: ClassVar[float] = 0.5
    _PULL: ClassVar[tuple[float, float]] = (-1.0, 3.0)
    #: Steps of a linear schedule with which the minimum itself is the aim, if all of a slope is noise.
    _HORIZON: ClassVar[int] = 100
    _DECAY: ClassVar[float] = 0.9
    #: Of the lowest ratio, the share below which slopes are those of a run that has converged; observations to say so.
    _CONVERGED: ClassVar[float] = 0.1
    _OBSERVED: ClassVar[int] = 10
    #: At most they are shortened by this: a move that is lost in rounding would have no slope to come back by.
    _LEAST_FACTOR: ClassVar[float] = 0.1
    _MAX_Z: ClassVar[float] = 2.0
    _FADING: ClassVar[int] = 4
    #: Observations at each distance between them.
    _DENSE: ClassVar[int] = 16
    #: What is left of a slope counts for so much at least in a relative rate, whose power of it, largest factor and
    #: number of values to a doubling follow: each value that occurs is one more param group in the base optimizer.
    _LEAST_LEFT: ClassVar[float] = 0.02
    _RATE_POWER: ClassVar[float] = 0.5
    _MAX_RATE: ClassVar[float] = 4.0
    _RATES_TO_A_DOUBLING: ClassVar[int] = 2

    eta: float = 0.3
    #: After the first steps.
    observations: int = field(default=0, init=False)
    mean_square: float = field(default=0.0, init=False)
    #: The level at the end of the first steps.
    settled: float = field(default=0.0, init=False)
    #: Of each parameter: average of its squared `ways`; its relative rate, first as a logarithm, then as it is applied.
    mean_squares: list[float] = field(default_factory=list, init=False)
    log_rates: list[float] = field(default_factory=list, init=False)
    rates: list[float] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self._short = 2 * self._SHORT
        super().__post_init__()
        require(isinstance(self.eta, (int, float)) and 0 < self.eta <= 1, "eta", self.eta, "must be in (0, 1]")

    def plan(self, total_steps: int, final_factor: float = 0.0) -> None:
        super().plan(total_steps, final_factor)
        taken_back = (1 - final_factor) * min(1.0, self._HORIZON / total_steps)
        self._short = self._SHORT * (1 + final_factor) * (1 - taken_back)

    @property
    def _aim(self) -> float:
        """Where ``r / rms(r)`` should be; positive beyond the minimum."""
        assert self.step_size is not None
        doublings = math.log2(self.step_size) - math.log2(self.settled) - math.log2(self._LEAST)
        return self._BEYOND * abs(self.lowest) - self._short * min(max(doublings, self._PULL[0]), self._PULL[1])

    def wants_end_slope(self, step: int) -> bool:
        since = step - self._first_steps
        if since < 0:
            return True
        # Distances 1 to n - 1 take 16 (1 + 2 + ... + (n - 1)) steps.
        distance = int((1 + math.sqrt(1 + 8 * since / self._DENSE)) / 2)
        return step % distance == 0

    def factor(self, step: int) -> float:
        ramp = super().factor(step)
        if self.observations < self._OBSERVED or not self.lowest:
            return ramp
        shrunk = self._rms(self.mean_square, self.observations) / (self._CONVERGED * abs(self.lowest))
        return ramp * min(max(shrunk, self._LEAST_FACTOR), 1.0)

    def observe_end(
        self,
        starts: Sequence[float],
        ends: Sequence[float],
        sizes: Sequence[int],
        factor: float,
        ways: Sequence[float] = (),
    ) -> None:
        super().observe_end(starts, ends, sizes, factor, ways)
        known = len(self.starts)
        if self.step_size is None or starts or len(ends) < known:
            return
        # Parameters that were added later are without a scale.
        sizes = sizes[:known]
        ends = [end / rate for end, rate in zip(ends, self.rates or [1.0] * known, strict=False)]
        if self.observations == 0:
            self.settled = self.step_size
            self._set_relative_rates(sizes)
        ratio = end_ratio(self.starts, ends, _weights(sizes))
        if not 0 < ratio * ratio < math.inf:
            return
        self.mean_square, z = self._normalised(ratio, self.mean_square)
        gain = self.eta * min(factor, 1.0) / math.sqrt(self.observations + self._FADING)
        self._set_level(self.step_size * math.exp(-gain * (z - self._aim)))
        for i, slope in enumerate(ways[:known]):
            if 0 < slope * slope < math.inf:
                self.mean_squares[i], z = self._normalised(slope, self.mean_squares[i])
                self.log_rates[i] -= gain * z
        self._balance(sizes)
        self.observations += 1

    def _normalised(self, slope: float, mean_square: float) -> tuple[float, float]:
        """The average of squares with `slope`'s in it, and `slope` over its root, clipped."""
        mean_square = self._DECAY * mean_square + (1 - self._DECAY) * slope * slope
        z = slope / self._rms(mean_square, self.observations + 1)
        return mean_square, min(max(z, -self._MAX_Z), self._MAX_Z)

    def _rms(self, mean_square: float, count: int) -> float:
        return math.sqrt(mean_square / (1 - self._DECAY**count))

    def relative_rates(self, count: int) -> list[float]:
        return self.rates + [1.0] * (count - len(self.rates)) if self.rates else []

    def _set_relative_rates(self, sizes: Sequence[int]) -> None:
        """The relative rates at the end of the first steps."""
        left = [
            min(max(-end / start, self._LEAST_LEFT), 1.0) if start else 1.0
            for start, end in zip(self.start_sums, self.end_sums, strict=True)
        ]
        self.log_rates = [self._RATE_POWER * math.log(x) for x in left]
        self.mean_squares = [0.0] * len(left)
        self._balance(sizes)

    def _balance(self, sizes: Sequence[int]) -> None:
        """Scale the relative rates to a mean square of 1; one that is not known is that of the parameter before it."""
        known = [i for i, start in enumerate(self.starts) if start]
        if not known:
            return
        weights = _weights([sizes[i] for i in known])
        squares = (weight * math.exp(2 * self.log_rates[i]) for i, weight in zip(known, weights, strict=True))
        middle, bound = math.log(sum(squares) / sum(weights)) / 2, math.log(self._MAX_RATE)
        for i in known:
            self.log_rates[i] = min(max(self.log_rates[i] - middle, -bound), bound)
        before = known[0]
        for i, start in enumerate(self.starts):
            before = i if start else before
            self.log_rates[i] = self.log_rates[before]
        steps = self._RATES_TO_A_DOUBLING / math.log(2)
        self.rates = [math.exp(round(rate * steps) / steps) for rate in self.log_rates]


def _averaged(average: Sequence[float], new: Sequence[float], decay: float) -> list[float]:
    return [decay * old + (1 - decay) * x for old, x in zip(average, new, strict=True)]


def _weights(sizes: Sequence[int]) -> list[float]:
    """How much each parameter counts: as a matrix's side, or the one table of word vectors would outvote all layers."""
    return [math.sqrt(size) for size in sizes]


POLICIES: dict[str, type[PaperPolicy]] = {p.name: p for p in (PaperPolicy, CrossBatchPolicy)}
