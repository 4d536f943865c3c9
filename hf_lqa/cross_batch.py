"""The rule for fine-tuning, and which rules there are by name."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from .first_steps import FirstStepsPolicy, filled_up, weights_of
from .policy import PaperPolicy, require
from .quadratic import end_ratio


@dataclass
class CrossBatchPolicy(FirstStepsPolicy):
    """Differs from `FirstStepsPolicy` in that it goes on: every later step moves the level, and relative rates.

    ``start`` stays as it was last, a scale. Observation number ``k`` (from 0), made of a step that was taken with the
    factor ``f`` (of the level: schedule, ramp and what else shortens it), moves **the level** on a logarithmic scale:

        z      = clip(r / rms(r), -2, 2) - aim            rms: root of the average of r**2, decay 0.9, bias-corrected
        level *= exp(-eta f (z / sqrt(k + 4) + trust v / (1 + k / 12)))
        aim    = 0.5 |r_0| - short log2(2 level / first)  r_0: the lowest averaged ratio of the first steps
        short  = 0.4 (1 + final_factor) (1 - (1 - final_factor) min(1, 100 / total_steps))
        trust  = clip((left - 0.4) / 0.2, 0, 1)           left: lower quartile over all elements of -q_i (below)
        v      = clip(vote / rms(vote), -2, 2)
        vote   = mean over all elements of sign(gradient_{t+1}) sign(theta_{t+1} - theta_0)

    Divided by their own recent size the ratios need no scale; moves fade as evidence accumulates, and as the schedule
    shrinks the steps: a short step's slope says little about a long one. The less of the batch's slope is noise, the
    further beyond the minimum lies the aim: what a step overshoots along steep directions the schedule's end takes
    back, what it gains along flat ones stays. The longer the run, and the less its schedule takes back, the further
    short of the minimum: noise is paid for in every step. A constant aim short of it would be a drift without end where
    the ratios are all noise, as late in training; so the level is drawn towards half of what the first steps found
    (``first``; the logarithm is kept in [-1, 3]). A run whose end is not known is taken for an endless one.

    Where most of a batch's slope is no noise, for nearly all elements (small networks trained from scratch), steep
    directions are at their minimum at nearly any level, and no slope, a sum over all, says what the flat ones want.
    **The vote** does, in which each element counts alike, however steep it is: below zero where most of them would go
    further the way they have come from the weights ``theta_0`` that training began with. At the best fixed rate it is
    about 0. In fine-tuning ``left`` is at most 0.3: whatever the median is, a quarter of the elements is all noise.

    **Relative rates.** What is left of its slope differs between parameters: in fine-tuning from a hundredth in the
    lowest layers, where a batch's slope is all noise, to nine tenths in a fresh head. So parameter ``i`` moves
    ``rate_i`` times as far as the level says. After the first steps (without the first of them)

        rate_i = c abs(q_i)**0.5 first_i,        q_i = sum of end_i / sum of abs(start_i), kept in [-1, -0.02]

    and from then on each follows the slope along all the way it has come from the weights that training began with,

        z_i     = clip(s_i / rms(s_i), -2, 2)        s_i = <gradient_{t+1}, theta_{t+1} - theta_0>_i
        rate_i *= c exp(-eta f z_i / sqrt(k + 4))

    which is below zero where going further that way would have been better. A move's own slope says so with more noise:
    what all moves have in common is a small part of each, and nearly all of their sum. ``c`` makes the mean of
    ``rate_i**2``, weighted as the median, 1: relative rates turn a step, and leave its length to the level. They are
    kept in [1/b, b], ``b = clip(200 / k, 2, 8)``: one matrix that stays far above the level leaves little of the mean
    square to the others. They are applied to the nearest half of a doubling. A parameter that is not observed has that
    of the one before it. Ratios are divided by ``rate_i / first_i`` for the level.

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
    #: Observations in which votes come to count half; what is left of the slope, but for the noisiest share of all
    #: elements, above which they count, and from which on in full.
    _VOTE_FADING: ClassVar[int] = 12
    _NOISIEST: ClassVar[float] = 0.25
    _QUIET: ClassVar[tuple[float, float]] = (0.4, 0.6)
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
    #: What is left of a slope counts for so much at least in a relative rate, whose power of it follows.
    _LEAST_LEFT: ClassVar[float] = 0.02
    _RATE_POWER: ClassVar[float] = 0.5
    #: The least and the most that relative rates may be, as a factor, and what it is times the observations.
    _MAX_RATE: ClassVar[tuple[float, float]] = (2.0, 8.0)
    _NARROWING: ClassVar[float] = 200.0

    eta: float = 0.3
    #: After the first steps.
    observations: int = field(default=0, init=False)
    mean_square: float = field(default=0.0, init=False)
    mean_square_vote: float = field(default=0.0, init=False)
    #: The level at the end of the first steps, and how much votes count from there on, in [0, 1].
    settled: float = field(default=0.0, init=False)
    trust: float = field(default=0.0, init=False)
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

    @property
    def wants_vote(self) -> bool:
        return self.trust > 0

    def wants_end_slope(self, step: int) -> bool:
        if super().wants_end_slope(step):
            return True
        since = step - self._first_steps
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
        vote: float = 0.0,
    ) -> None:
        super().observe_end(starts, ends, sizes, factor, ways, vote)
        if starts:
            self._set_trust(sizes)
        known = len(self.starts)
        if self.step_size is None or starts or len(ends) < known:
            return
        # Parameters that were added later are without a scale.
        sizes = sizes[:known]
        first = filled_up(self.first_rates, known)
        ends = [end * was / rate for end, was, rate in zip(ends, first, self.rates or first, strict=False)]
        if self.observations == 0:
            self.settled = self.step_size
            self._set_relative_rates(sizes)
        ratio = end_ratio(self.starts, ends, weights_of(sizes))
        if not 0 < ratio * ratio < math.inf:
            return
        self.mean_square, z = self._normalised(ratio, self.mean_square)
        eta = self.eta * min(factor, 1.0)
        gain = eta / math.sqrt(self.observations + self._FADING)
        move = gain * (z - self._aim)
        if vote and math.isfinite(vote):
            self.mean_square_vote, v = self._normalised(vote, self.mean_square_vote)
            move += eta * self.trust * v / (1 + self.observations / self._VOTE_FADING)
        self._set_level(self.step_size * math.exp(-move))
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
        return filled_up(self.rates, count) if self.rates else super().relative_rates(count)

    def _set_trust(self, sizes: Sequence[int]) -> None:
        """How much votes count after the first steps. Each element does in a vote, so each does here."""
        ratio = end_ratio(self.start_sums, self.end_sums, sizes[: len(self.start_sums)], 1 - self._NOISIEST)
        none, full = self._QUIET
        self.trust = min(max((-ratio - none) / (full - none), 0.0), 1.0) if ratio < 0 else 0.0

    def _set_relative_rates(self, sizes: Sequence[int]) -> None:
        """The relative rates at the end of the first steps."""
        left = [
            min(max(-end / start, self._LEAST_LEFT), 1.0) if start else 1.0
            for start, end in zip(self.start_sums, self.end_sums, strict=True)
        ]
        first = filled_up(self.first_rates, len(left))
        self.log_rates = [self._RATE_POWER * math.log(x) + math.log(rate) for x, rate in zip(left, first, strict=True)]
        self.mean_squares = [0.0] * len(left)
        self._balance(sizes)

    def _balance(self, sizes: Sequence[int]) -> None:
        """Scale the relative rates to a mean square of 1; one that is not known is that of the parameter before it."""
        known = [i for i, start in enumerate(self.starts) if start]
        if not known:
            return
        weights = weights_of([sizes[i] for i in known])
        squares = (weight * math.exp(2 * self.log_rates[i]) for i, weight in zip(known, weights, strict=True))
        middle = math.log(sum(squares) / sum(weights)) / 2
        least, most = self._MAX_RATE
        bound = math.log(min(max(self._NARROWING / max(self.observations, 1), least), most))
        for i in known:
            self.log_rates[i] = min(max(self.log_rates[i] - middle, -bound), bound)
        before = known[0]
        for i, start in enumerate(self.starts):
            before = i if start else before
            self.log_rates[i] = self.log_rates[before]
        self.rates = self._rounded(self.log_rates)


POLICIES: dict[str, type[PaperPolicy]] = {p.name: p for p in (PaperPolicy, CrossBatchPolicy)}
