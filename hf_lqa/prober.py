"""Probes: the loss a little ahead of and behind the weights along the base optimizer's direction, and what they say."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import verification
from .checkpoint import ProbeRecord
from .checks import Checked
from .direction import Direction
from .gradients import CONTRADICTION, GradientWatch
from .groups import growth, rescaled, same, with_gradient
from .quadratic import Fit, Verdict, fit_losses, is_beyond
from .rule import Rule
from .rule.radius import Radius, RadiusConfig, adapted, first_radius, max_step, radius
from .rule.records import Probe

#: Two probes contradict the gradients by the same factor if these differ by no more than this share.
_THE_SAME = 0.1


@dataclass(frozen=True)
class Step:
    """What a probe is told of the step that it is taken at.

    Attributes:
        number: from 0.
        checked: what is known of its gradients.
        noise: rounding error of a loss, relative to its value.
        read: means over ranks of tensors and numbers.
    """

    number: int
    checked: Checked
    noise: float
    read: Callable[..., list[float]]


@dataclass(frozen=True)
class Probed:
    """What a probe has found.

    Attributes:
        record: what it measured; `None` where the direction alone was looked at.
        slope: ``<gradient, direction>``; the step is skipped if it is not finite.
        begun: the step size that shapes give, in units of the direction; NaN after the first probe, and where it is
            not known.
    """

    record: ProbeRecord | None
    slope: float
    begun: float


@dataclass
class Prober:
    """Takes an optimizer's probes, and remembers how far they should go.

    Args:
        config: constants of the radius.
        rule: that the probes are for.
        watch: what gradients were before a loop clipped them.
        counts: the optimizer's; forwards and findings are counted there.
    """

    config: RadiusConfig
    rule: Rule
    watch: GradientWatch
    counts: dict[str, int]
    state: Radius = field(default=Radius(), init=False)
    #: Wall-clock time spent in probes.
    seconds: float = field(default=0.0, init=False)
    # Of a probe, where the next step has one, too: fresh memory costs more than the copying.
    _origin: tuple[list[Tensor], list[Tensor]] = field(default=([], []), init=False)

    def forget(self) -> None:
        """Let go of memory that only a probe at the next step would use again."""
        self._origin = [], []

    def state_dict(self) -> dict[str, Any]:
        return asdict(self.state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = Radius(**state)

    def observed(self, probed: Probed) -> None:
        """Let the rule and later radii follow what a probe has found."""
        record = probed.record
        if record is None:
            if math.isfinite(probed.begun):
                self.rule.start(probed.begun)
            return
        self.counts[record.fit.verdict.value] += 1
        self.counts["searched"] += not record.by_loss
        self.state = adapted(self.config, self.state, record.fit, record.by_loss)
        # A radius that was given says nothing of the loss.
        by_loss = record.by_loss and self.config.fixed is None
        bound = max_step(Radius(), record.loss_center, record.fit.slope, None) if record.by_loss else math.inf
        follows = self.state.follows_step
        self.rule.observe_probe(Probe(record.fit, record.radius, probed.begun, by_loss, follows, bound))

    def take(
        self,
        base: torch.optim.Optimizer,
        params: list[Tensor],
        closure: Callable[[], Tensor] | None,
        step: Step,
        multiplier: float,
    ) -> Probed | None:
        """What is to be known before a step that a probe is due at; `None` where nothing is.

        Args:
            params: of all param groups of `base`, in their order.
            closure: the loss. Without one no loss is computed, and before the first step the direction is looked at.
            multiplier: the largest ``lr`` of the groups at this step, which no direction shall have.

        Raises:
            ValueError: the rule cannot begin without a closure.
        """
        if self.rule.step_size is None:
            shapes = [p.shape if p.requires_grad else () for p in params]
            self.rule.begin(shapes, [p.numel() for p in params], growth(base))
        elif closure is None:
            return None
        multipliers = self.rule.multipliers(len(params))
        # By parameter: within `rescaled` the groups are divided, and their order is another.
        by = dict(zip(params, multipliers, strict=True)) if multipliers else {}
        with rescaled(base, 1 / multiplier, multipliers):
            if closure is not None:
                return Probed(*self.probe(base, by, closure, step))
            if self.rule.needs_replays:
                raise ValueError(
                    "step() was called without a closure before any step size was measured: pass a closure that"
                    " returns the loss, e.g. hf_lqa.ReplayedLoss"
                )
            direction = Direction(base)
            slope, *size = step.read(direction.slope(), *direction.size(by))
            return Probed(None, slope, self._begun(slope, *size))

    def probe(
        self,
        base: torch.optim.Optimizer,
        multipliers: Mapping[Tensor, float],
        closure: Callable[[], Tensor],
        step: Step,
    ) -> tuple[ProbeRecord, float, float]:
        """What `Probed` keeps: of a probe that is taken again where it contradicts the slope that its radius is of."""
        begun_at = time.perf_counter()
        first = self.rule.step_size is None and not step.checked.told and self.config.fixed is None
        watch, forwards = self.watch.state_dict(), self.counts["probe_forwards"]
        try:
            nearer, doubted = math.inf, None
            for _ in range(self.config.tries):
                before = self.watch.gradients(step.checked.change)
                record, slope, begun = self._once(base, multipliers, closure, step, before, nearer)
                if not first:
                    break
                fit = record.fit
                doubt = self.watch.doubt(fit, slope)
                if doubted is not None and math.isclose(doubt, self.watch.doubt(doubted, slope), rel_tol=_THE_SAME):
                    fit = doubted
                elif doubt and fit.verdict is not Verdict.BELOW_NOISE:
                    # What bends the line is gone nearer; what was done to the gradients is not.
                    nearer, doubted = self.config.tau * record.radius, fit
                    continue
                if not self.watch.contradicted(fit, slope, bool(before)):
                    break
                nearer, doubted = math.inf, None
        except BaseException:
            self.watch.load_state_dict(watch)
            self.counts["probe_forwards"] = forwards
            raise
        self.seconds += time.perf_counter() - begun_at
        if first and self.watch.scale != 1 and not step.checked.change:
            warnings.warn(CONTRADICTION.format(1 / self.watch.scale), stacklevel=6)
        return record, slope, begun

    def _once(
        self,
        base: torch.optim.Optimizer,
        multipliers: Mapping[Tensor, float],
        closure: Callable[[], Tensor],
        step: Step,
        before: dict[Tensor, Tensor],
        nearer: float,
    ) -> tuple[ProbeRecord, float, float]:
        """Measure along the base optimizer's direction, no further than `nearer` if it is the first probe."""
        params, kept = self._origin
        direction = Direction(base, kept if same(params, with_gradient(base)) else None)
        self._origin = direction.params, direction.origin
        known: Tensor | None = getattr(closure, "loss", None)
        loss = closure() if known is None else known
        hindrances = verification.hindrances(closure, self.counts)
        first, step_size = self.rule.step_size is None, self.rule.step_size
        center, slope, *found = step.read(
            loss,
            self.watch.slope(direction, before) / step.checked.clip,
            *hindrances,
            *(direction.size(multipliers) if first else ()),
        )
        hindered, size = found[: len(hindrances)], found[len(hindrances) :]
        forwards = 0 if known is not None else 1
        begun, said = math.nan, radius(self.config, self.state, center, slope, step_size)
        reach = said
        if first:
            begun = self._begun(slope, *size)
            reach = first_radius(self.config, center, slope, begun)
            reach = min(reach, nearer) if reach is not None else None
        minus = plus = math.nan
        by_loss = True
        if reach is None:
            finite = math.isfinite(center) and math.isfinite(slope)
            fit = Fit(slope, math.nan, None, Verdict.NON_DESCENT if finite else Verdict.NON_FINITE)
        elif not self._can_replay(closure, direction, hindered, step):
            fit = Fit(slope, math.nan, None, Verdict.NOT_REPLAYABLE)
        else:
            noise = step.noise * abs(center)
            next_reach, tries = reach, self.config.tries if first or self.state.follows_step else 1
            while tries and next_reach > 0:
                reach, tries = next_reach, tries - 1
                try:
                    direction.move_to(-reach)
                    behind = closure()
                    direction.move_to(reach)
                    ahead = closure()
                finally:
                    direction.restore()
                minus, plus = step.read(behind, ahead)
                forwards += 2
                if not is_beyond(minus, center, plus, abs(slope) * reach, noise):
                    break
                next_reach = reach * self.config.tau
            by_loss = reach == said
            bound = 2 * reach / self.config.tau
            bound = max_step(self.state, center, slope, step_size) if by_loss else bound
            fit = fit_losses(minus, center, plus, reach, noise=noise, max_step=bound)
        self.counts["probe_forwards"] += forwards
        record = ProbeRecord(step.number, math.nan if reach is None else reach, minus, center, plus, fit, by_loss)
        return record, slope, begun

    def _begun(self, slope: float, squares: float, sizes: float) -> float:
        """The rule's prior, of what a step moves an element by, in units of a direction of that size.

        NaN without a slope: of such a direction, 0 or weight decay alone, the next one need not have the scale.
        """
        return self.rule.prior * sizes / squares if slope and squares > 0 and sizes > 0 else math.nan

    def _can_replay(
        self, closure: Callable[[], Tensor], direction: Direction, hindered: Sequence[float], step: Step
    ) -> bool:
        known = self.counts[verification.CHECKED]
        try:
            needed = self.rule.needs_replays
            return verification.can_replay(closure, hindered, self.counts, step.read, step.noise, needed)
        finally:
            if not known:
                direction.restore()  # a forward may write to the weights, e.g. bound the norms of an embedding
