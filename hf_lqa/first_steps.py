"""The first steps of the rule for fine-tuning: where the level is found."""

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
    left. Above it, ``q = r' / min((r + r') / 2)`` is how much is left of what is no noise (``r'``: with averages that
    forget faster, decay 0.5; the minimum is over the steps so far, and ``r`` in it damps chance). In the 12 steps,
    while the parabolas of the probes at steps 4, 7 and 10 open upwards, the level moves to where 0.65 of it is left,

        level *= clip(held / level (1 - 0.65) / (1 - q), exp(-0.5), exp(0.5)),

    on the line through ``q = 1`` at level 0 and the measured one at ``held``, the level that ``r'`` is of: the same
    average of the logarithms. What it moves in all is kept ``>= 1``. A parabola that opens downwards takes this growth
    back at once: there, as where a fresh head is learned, the slope is about to change. The other first steps wait for
    that to be over: until then a slope persists at any level.

    Of ``n`` elements the 12 steps leave the level at ``0.25 / sqrt(n)`` or more, unless one overshot (not along plain
    gradients, whose elements are of any size): a step along
    AdamW's first direction, whose elements are 1, is then 0.25 long. The share of its batch's loss that a step changes
    counts the noise of all elements, so the more there are the shorter is a step that changes as much, as ``1 / n``;
    the best rates of sweeps fall as ``1 / sqrt(n)``.

    **The ramp** multiplies the step size by ``min(1, (step + 1) / warmup)``. Once one of the 12 steps ends clearly
    beyond the minimum (``r' > 0.15``; the very first: ``r > 0.5``), it is as long as the first steps from there on, and
    growth by parabolas is taken back: what turns a slope so early is that it steepens.

    **First rates.** Until one of the 12 steps overshoots, a small head moves further than the level says: matrices that
    come after the last one of ``n`` elements or more, of ``n_i`` elements themselves, by

        first_i = min((n / n_i)**(1/3), 8)          n: geometric mean over all matrices, weighted by sqrt(n_i)

    to the nearest half of a doubling; all else by 1. So a fresh head learns before what is below it has followed its
    noise. Without `begin` they are all 1.

    Probes are rare: at step 0, at 4, 7 and 10 until one opens downwards or a step overshoots, and every
    `probe_interval`. The first gives the first level, the next say whether it may grow; later ones are measurements,
    which it does not depend on.

    Args:
        probe_interval: distance between probes, in steps, but for those at steps 4, 7 and 10.
        warmup: steps of the ramp, ``>= 0``, unless one of the first steps overshoots.
    """

    needs_replays: ClassVar[bool] = False
    _SETTLED: ClassVar[float] = 4 / 3
    _SETTLING: ClassVar[float] = 0.5
    #: Below this (negative) ratio a batch's slope is believed; growth in a step, as a power of what its parabola says.
    _BELIEVED: ClassVar[float] = 0.5
    _GROWTH: ClassVar[float] = 1 / 6
    #: Above it: the share of what is no noise to be left, and the largest move in a step, its logarithm.
    _LEFT: ClassVar[float] = 0.65
    _PACE: ClassVar[float] = 0.5
    #: First rates: power of the sizes' ratio, and the largest.
    _SIZE_POWER: ClassVar[float] = 1 / 3
    _MAX_FIRST_RATE: ClassVar[float] = 8.0
    #: Of relative rates, first or later: each value that occurs is one more param group in the base optimizer.
    _RATES_TO_A_DOUBLING: ClassVar[int] = 2
    #: Above this (positive) ratio the first steps overshoot.
    _OVERSHOT: ClassVar[float] = 0.15
    #: ... if there is only one, of one batch.
    _OVERSHOT_AT_ONCE: ClassVar[float] = 0.5
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
    #: The lowest averaged ratio, and the lowest mean of it and of that which forgets faster.
    lowest: float = field(default=0.0, init=False)
    lowest_mean: float = field(default=0.0, init=False)
    #: Whether the direction's elements are alike in size, as `begin` says.
    elements_alike: bool = field(default=False, init=False)
    #: Whether one of the first steps overshot.
    overshot: bool = field(default=False, init=False)
    #: Relative rate of each parameter until then; nothing where it is 1 for all.
    first_rates: list[float] = field(default_factory=list, init=False)
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

    def begin(self, shapes: Sequence[Sequence[int]]) -> None:
        self.elements_alike = True
        sizes = [math.prod(shape) if len(shape) == 2 else 0 for shape in shapes]
        weights = weights_of(sizes)
        total = sum(weights)
        typical = sum(w * math.log(n) for w, n in zip(weights, sizes, strict=True) if n) / (total or 1.0)
        body = max((i for i, n in enumerate(sizes) if n and math.log(n) >= typical), default=-1)
        log_rates = [
            min(self._SIZE_POWER * (typical - math.log(n)), math.log(self._MAX_FIRST_RATE)) if n and i > body else 0.0
            for i, n in enumerate(sizes)
        ]
        rates = self._rounded(log_rates)
        self.first_rates = rates if any(rate != 1 for rate in rates) else []

    def relative_rates(self, count: int) -> list[float]:
        return filled_up(self.first_rates, count) if self.first_rates else []

    def _rounded(self, log_rates: Sequence[float]) -> list[float]:
        steps = self._RATES_TO_A_DOUBLING / math.log(2)
        return [math.exp(round(rate * steps) / steps) for rate in log_rates]

    def wants_probe(self, step: int) -> bool:
        # One that opened downwards, or a step that overshot, has the last word.
        if super().wants_probe(step) or (step in self._FIRST_PROBES and self.convex is not False):
            return True
        # A gradient may grow by orders of magnitude in a step; each of the first is looked at.
        return self.follows_step and not self.elements_alike and step < self._SETTLING_STEPS

    def wants_end_slope(self, step: int) -> bool:
        return step < self._first_steps

    def wants_start_slope(self, step: int) -> bool:
        return step < self._first_steps

    def factor(self, step: int) -> float:
        length = max(self.warmup, self._first_steps) if self.overshot else self.warmup
        return min(1.0, (step + 1) / length) if length else 1.0

    @property
    def searches(self) -> bool:
        return super().searches and self.first_observations < self._SETTLING_STEPS

    def _radius_of(self, step_size: float) -> float:
        return step_size / self._SETTLED

    def observe_probe(self, fit: Fit, radius: float, by_loss: bool = True) -> None:
        self._adapt_radius(fit)
        if self.step_size is None and math.isfinite(radius) and fit.verdict is not Verdict.NON_FINITE:
            if not by_loss:
                self.follows_step = True
                radius = min(radius, self.tau * (fit.step_size or math.inf))
            self.first_radius = radius
            self._set_level(self._SETTLED * radius)
            if self.step_size is None:
                self.step_size = radius
        elif not by_loss and self.step_size is not None:
            shorter = self._SETTLED * min(radius, self.tau * (fit.step_size or math.inf)) / self.step_size
            self.growth *= shorter
            self._set_level(self.step_size * shorter)
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
        vote: float = 0.0,
    ) -> None:
        if self.step_size is None or not starts or len(starts) != len(self.starts or starts):
            return
        known = [end for start, end in zip(starts, ends, strict=True) if start]
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
        weights = weights_of(sizes)
        ratio = end_ratio(self.starts, self.ends, weights)
        quick = end_ratio(self.quick_starts, self.quick_ends, weights)
        settling = count <= self._SETTLING_STEPS
        beyond = quick > self._OVERSHOT if count > 1 else ratio > self._OVERSHOT_AT_ONCE
        if settling and beyond:
            self.overshot, self.first_rates = True, []
            self._take_back()
        if count == 1:
            self.first_slope = slope
            return
        ratio = 0.0 if math.isnan(ratio) else ratio
        self.lowest = min(self.lowest, ratio)
        if not math.isnan(quick):
            self.lowest_mean = min(self.lowest_mean, (ratio + quick) / 2)
        assert self.step_size is not None
        level = self.step_size
        if settling and count > 2 and slope > 0:
            settled = self._SETTLED * self.first_radius * self.first_slope / slope
            level *= (settled * self.growth * math.exp(self.convex_growth) / level) ** self._SETTLING
        if ratio < -self._BELIEVED:
            growth = (self._BELIEVED / (1 + ratio)) ** self._GROWTH
            self.growth, level = self.growth * growth, level * growth
        elif settling and self.convex and self.lowest_mean < 0:
            move = self._convex_move(quick / self.lowest_mean)
            self.convex_growth, level = self.convex_growth + move, level * math.exp(move)
        if count == self._SETTLING_STEPS and self.elements_alike and not self.overshot:
            level = max(level, self._LENGTH / math.sqrt(sum(sizes)))
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


def _averaged(average: Sequence[float], new: Sequence[float], decay: float) -> list[float]:
    return [decay * old + (1 - decay) * x for old, x in zip(average, new, strict=True)]


def filled_up(rates: list[float], count: int) -> list[float]:
    """Relative rates of `count` parameters: 1 for those that `rates` do not know."""
    return rates + [1.0] * (count - len(rates))


def weights_of(sizes: Sequence[int]) -> list[float]:
    """How much each parameter counts: as a matrix's side, or the one table of word vectors would outvote all layers."""
    return [math.sqrt(size) for size in sizes]
