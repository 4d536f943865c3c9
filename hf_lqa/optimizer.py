"""`LQA`: any `torch.optim.Optimizer`, with its learning rate measured instead of given."""

from __future__ import annotations

import itertools
import math
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import verification
from .checkpoint import BEGINNING_KEY, SNAPSHOT_KEY, Move, ProbeRecord, packed, take_snapshot, unpacked
from .closures import Caller
from .cross_batch import POLICIES
from .direction import Direction
from .gradients import CONTRADICTION, GradientWatch, total
from .groups import Division, largest_lr, rescaled, same, with_gradient
from .policy import PaperPolicy
from .quadratic import Fit, Verdict, fit_losses, is_beyond
from .slopes import Snapshot, flat, mean_over_ranks, observed, spread

#: The first probe at most, where it contradicts the gradients that its radius is of.
_MAX_TRIES = 8
#: Two probes contradict the gradients by the same factor if these differ by no more than this share.
_THE_SAME = 0.1


class LQA(torch.optim.Optimizer):
    """Differs from its base optimizer in one thing: the learning rate of a step is what probes of the loss say.

    ::

        optimizer = LQA(torch.optim.AdamW(model.parameters(), lr=1.0))
        closure = ReplayedLoss(model)
        closure.record(compute_loss, batch).backward()
        optimizer.step(closure)

    A group's ``lr`` is a *multiplier*: 1.0 by default, scaled by learning-rate schedulers, different between groups if
    some should learn slower. A step moves parameter ``i`` of group ``g`` by

        step_size * rate_i * (lr_g / max lr) * d            step_size = level * ramp * max lr / unit

    where ``d`` is the base optimizer's update at unit learning rate, ``rate_i`` the policy's relative rate, about 1,
    and ``max lr`` the largest multiplier at this step. ``unit`` is the largest one before schedules, when the first
    level is measured, but at least 1: multipliers of 1 and 16 are those of 1/16 and 1. On steps without a probe this
    is ``base.step()`` at that learning rate, if all gradients are finite, and nothing else.

    Args:
        base: the optimizer whose direction is used. Its updates must be proportional to its ``lr``. Param groups and
            state are shared with it.
        policy: ``"cross_batch"`` (averaged, the default) or ``"paper"`` (arXiv 2004.03260).
        total_steps: how many steps training has, ``>= 1``; the longer it is, the lower the level. `None`: as if it had
            no end.
        final_factor: what the schedule multiplies the step size by at the end of training, in [0, 1]: 1.0, the default,
            without a schedule or with a constant one, 0.0 with one that decays to 0. Nothing is annealed by it: it says
            what the schedule does. Needs `total_steps`.
        options: the policy's arguments, see `hf_lqa.policy`, `hf_lqa.first_steps` and `hf_lqa.cross_batch`.

    Attributes:
        step_size: the step size last applied, in units of the direction, schedule included: that of the group with the
            largest multiplier. `None` before any.
        last_fit: the `Fit` of the last probe, `None` before any.
        last_probe: its `ProbeRecord`.
        last_end_slope: slope at the end of a step, on the batch after it, in loss per unit of the direction; the last
            that was measured, `None` before any.
        counts: number of ``steps``, ``skipped`` steps, ``probe_forwards``, first probes that ``searched`` a radius
            because the loss's value said none, and of each verdict; and what `hf_lqa.verification` has found out.

    Raises:
        ValueError: `base` has no parameters or no ``lr`` or needs a closure itself (LBFGS), `policy` is unknown, or an
            option is unknown or out of range, as `total_steps` and `final_factor` may be.
    """

    def __init__(
        self,
        base: torch.optim.Optimizer,
        policy: str = "cross_batch",
        *,
        total_steps: int | None = None,
        final_factor: float = 1.0,
        **options: Any,
    ):
        if isinstance(base, torch.optim.LBFGS):
            raise ValueError("base=LBFGS: it evaluates the loss itself in every step; use a first-order optimizer")
        if not any(group["params"] for group in base.param_groups):
            raise ValueError("base has no parameters: every parameter of the model is frozen (requires_grad=False)")
        if any("lr" not in group for group in base.param_groups):
            raise ValueError(f"base={type(base).__name__}: its param groups have no 'lr', which LQA sets")
        if policy not in POLICIES:
            raise ValueError(f"policy={policy!r}: must be one of {', '.join(sorted(POLICIES))}")
        if max(float(group["lr"]) for group in base.param_groups) < 0.1:
            warnings.warn(
                f"The base optimizer's lr is {float(base.param_groups[0]['lr'])}. Under LQA it multiplies the step size"
                " that was measured: construct the base optimizer with lr=1.0 unless that is what you want.",
                stacklevel=2,
            )
        self.base = base
        if total_steps is None and final_factor != 1:
            raise ValueError(
                f"final_factor={final_factor!r} without total_steps: give total_steps, after which it is so"
            )
        self.policy: PaperPolicy = POLICIES[policy](**options)
        if total_steps is not None:
            self.policy.plan(total_steps, final_factor)
        self.step_size: float | None = None
        self.last_probe: ProbeRecord | None = None
        self.last_end_slope: float | None = None
        self.counts: dict[str, int] = dict.fromkeys(
            ["steps", "skipped", "probe_forwards", "searched", *verification.COUNTS, *(v.value for v in Verdict)], 0
        )
        #: Mean of a scalar over the data-parallel ranks; every decision is made on its results.
        self.reduce: Callable[[Tensor], Tensor] = mean_over_ranks
        #: Whether norms that `observe_clipping` is told are those of all gradients, which are then not looked at again.
        self.told_norm_is_whole = False
        #: Wall-clock time spent in probes.
        self.probe_seconds = 0.0
        # Weights before the last step, and before the first.
        self._snapshot: Snapshot | None = None
        self._beginning: Snapshot | None = None
        # Of a probe, where the next step has one, too: fresh memory costs more than the copying.
        self._origin: tuple[list[Tensor], list[Tensor]] = [], []
        self._division = Division()
        self._move = Move()
        self._largest_lr = max(1.0, largest_lr(base))
        self._watch = GradientWatch([p for group in base.param_groups for p in group["params"]])
        self._caller = Caller()
        self._warned_of_no_gradient = False
        self._armed: Callable[[], Tensor] | None = None
        self._clipping: tuple[Tensor | float, float] | None = None
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
        return {k: v for k, v in vars(self).items() if k not in ("_armed", "_clipping")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "_armed": None, "_clipping": None})

    def __repr__(self) -> str:
        return f"LQA ({self.policy.name}) around {self.base!r}"

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.base.add_param_group(param_group)

    @property
    def _params(self) -> list[Tensor]:
        """Of all param groups, in their order: what places count."""
        return [p for group in self.param_groups for p in group["params"]]

    @property
    def last_fit(self) -> Fit | None:
        return self.last_probe.fit if self.last_probe is not None else None

    @property
    def rejected(self) -> int:
        """Number of probes so far whose fit gave no step size."""
        return sum(self.counts[v.value] for v in Verdict if not v.usable)

    @property
    def relative_rates(self) -> list[float]:
        """What multiplies the step size of each parameter, in the param groups' order; nothing where all are 1."""
        return self.policy.relative_rates(sum(len(group["params"]) for group in self.param_groups))

    @property
    def wants_probe(self) -> bool:
        """Whether the next step will call its closure. Nothing needs to be recorded for one that will not."""
        return self.policy.wants_probe(self.counts["steps"])

    def arm(self, closure: Callable[[], Tensor] | None) -> None:
        """Provide the closure of the next `step`, for loops that call it without (`None`: take it back)."""
        self._armed = closure

    def observe_clipping(self, grad_norm: Tensor | float, max_norm: float) -> None:
        """Tell the next `step` that its gradients had the norm `grad_norm` and were then clipped to `max_norm`.

        With it slopes are those of the loss, not of the clipped gradients. Without it what clipping does is found by
        comparing gradients with what they were at the end of the backward pass, which costs a little more.
        """
        self._clipping = grad_norm, max_norm
        self._watch.stop()

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

                A closure that raises leaves everything as it was before the step.

        Returns:
            What the closure returned, or its ``loss``; `None` where that is not known.

        Raises:
            ValueError: no closure, and nothing was ever measured; or a closure that cannot be called.
        """
        closure = closure if closure is not None else self._armed
        multiplier = max(float(group["lr"]) for group in self.param_groups)
        # Checkpoints of sharded optimizers make one step at rate 0, to have a state to load into.
        wants_probe, given = self.wants_probe and multiplier > 0, closure is not None
        returned, closure, asked = self._caller.ask(closure, self._params, wants_probe)
        self._watch.close()
        params = self._params
        if all(p.grad is None for p in params):
            if given and not self._warned_of_no_gradient:
                self._warned_of_no_gradient = True
                warnings.warn(
                    "step(closure): no parameter of the optimizer has a gradient, so nothing moves. Call"
                    " loss.backward() before step(), or in the closure",
                    stacklevel=4,
                )
            self._stand()
            return returned
        # Everything is measured first and decided afterwards, so that a closure that raises has changed nothing.
        observed_norm, max_norm = self._clipping if self._clipping is not None else (0.0, math.inf)
        numbers: list[Any] = [observed_norm]
        if self._clipping is None or not self.told_norm_is_whole:
            numbers += [self._watch.change, total(params)]
        if multiplier <= 0:
            # A scheduler's warm-up starts at 0: the base sees the gradient, nothing moves, nothing is measured.
            if all(map(math.isfinite, self._read(*numbers))):
                self._stand()
            else:
                self._skip(counted=False)
            return returned
        if self.policy.step_size is None:
            self._largest_lr = max(self._largest_lr, largest_lr(self.base))
            if not isinstance(self.base, torch.optim.SGD):
                # What shapes say holds for directions whose elements are alike, as AdamW's; gradients are not.
                self.policy.begin([p.shape if p.requires_grad else () for p in params])
        told, slopes, move = len(numbers), [], self._move
        if self._snapshot is not None and move.awaits_ends:
            before = self._watch.gradients(told > 1 and numbers[1])
            along: Tensor | list[float] = []
            vote: Tensor | float = 0.0
            if self._beginning is not None and not len(move.starts):  # in the first steps it is not asked for
                along = self._beginning.slopes(before)
                vote = self._beginning.vote() if self.policy.wants_vote else 0.0
            numbers += [vote, move.starts, along, self._snapshot.slopes(before)]
        numbers = self._read(*numbers)
        change = numbers[1] if told > 1 else 0.0
        if len(numbers) > told:
            move.vote, *slopes = numbers[told:]
        first, last = len(move.starts), len(slopes) - len(move.places)
        starts, ways, ends = slopes[:first], slopes[first:last], slopes[last:]
        if not all(map(math.isfinite, (*numbers[:told], *ends))):
            self._skip()
            return returned
        clip = min(1.0, max_norm / (numbers[0] + 1e-6))
        if ends:
            share = clip / self._watch.scale
            move.starts, move.ends = starts, [end / move.step_size / share for end in ends]
            move.ways = [way / share for way in ways]
        probe = None
        if wants_probe:
            if closure is None and self.policy.step_size is None:
                raise ValueError(
                    "step() was called without a closure before any step size was measured: pass a closure that"
                    " returns the loss, e.g. hf_lqa.ReplayedLoss"
                )
            if closure is not None:
                begun = time.perf_counter()
                with rescaled(self.base, 1 / multiplier, self.relative_rates):
                    probe, slope = self._measure(closure, clip, change)
                self.probe_seconds += time.perf_counter() - begun
                self.counts["probe_forwards"] += asked
                if not math.isfinite(slope):
                    self._skip()
                    return returned
        if move.ends is not None:
            assert isinstance(move.starts, list)
            self.last_end_slope, self._move = sum(move.ends), Move()
            sizes = [p.numel() for p in params]
            starts = spread(move.starts, move.places, len(sizes), 0.0)
            ends = spread(move.ends, move.places, len(sizes), math.nan)
            ways = spread(move.ways, self._beginning.places, len(sizes), 0.0) if self._beginning is not None else []
            self.policy.observe_end(starts, ends, sizes, move.factor, ways, move.vote)
        if probe is not None:
            self.last_probe = probe
            self.counts[probe.fit.verdict.value] += 1
            self.counts["searched"] += not probe.by_loss
            self.policy.observe_probe(probe.fit, probe.radius, probe.by_loss)
        self._advance(multiplier, clip, change)
        if not self.wants_probe:
            self._origin = [], []
        self._disarm()
        return returned

    def _measure(self, closure: Callable[[], Tensor], clip: float, change: float) -> tuple[ProbeRecord, float]:
        """A probe, taken again where the first one contradicts the slope that its radius is of."""
        first = self.policy.step_size is None and self._clipping is None and self.policy.probe_radius is None
        watch, forwards = self._watch.state_dict(), self.counts["probe_forwards"]
        try:
            nearer, doubted = math.inf, None
            for _ in range(_MAX_TRIES):
                before = self._watch.gradients(change)
                probe, slope = self._probe(closure, clip, before, nearer)
                if not first:
                    break
                doubt, fit = self._watch.doubt(probe.fit, slope), probe.fit
                if doubted is not None and math.isclose(doubt, self._watch.doubt(doubted, slope), rel_tol=_THE_SAME):
                    fit = doubted
                elif doubt and fit.verdict is not Verdict.BELOW_NOISE:
                    # What bends the line is gone nearer; what was done to the gradients is not.
                    nearer, doubted = self.policy.tau * probe.radius, fit
                    continue
                if not self._watch.contradicted(fit, slope, bool(before)):
                    break
                nearer, doubted = math.inf, None
        except BaseException:
            self._watch.load_state_dict(watch)
            self.counts["probe_forwards"] = forwards
            raise
        if first and self._watch.scale != 1 and not change:
            warnings.warn(CONTRADICTION.format(1 / self._watch.scale), stacklevel=5)
        return probe, slope

    def _probe(
        self, closure: Callable[[], Tensor], clip: float, before: dict[Tensor, Tensor], nearer: float
    ) -> tuple[ProbeRecord, float]:
        """Measure along the base optimizer's direction, no further than `nearer`: (record, ``<gradient, d>``)."""
        # What a step started from is not needed any more; a probe has its own.
        self._snapshot = None
        params, kept = self._origin
        direction = Direction(self.base, kept if same(params, with_gradient(self.base)) else None)
        self._origin = direction.params, direction.origin
        known: Tensor | None = getattr(closure, "loss", None)
        loss = closure() if known is None else known
        hindrances = verification.hindrances(closure, self.counts)
        first = self.policy.step_size is None
        center, slope, square, *hindered = self._read(
            loss,
            self._watch.slope(direction, before) / clip,
            direction.square() if first else 0.0,
            *hindrances,
        )
        forwards = 0 if known is not None else 1
        said = radius = self.policy.radius(center, slope)
        if first:
            radius = self.policy.initial_radius(center, slope, math.sqrt(square))
            radius = min(radius, nearer) if radius is not None else None
        minus = plus = math.nan
        noise = self._relative_noise(closure)
        if radius is None:
            verdict = Verdict.NON_DESCENT if math.isfinite(center) and math.isfinite(slope) else Verdict.NON_FINITE
            probe = ProbeRecord(
                self.counts["steps"], math.nan, minus, center, plus, Fit(slope, math.nan, None, verdict)
            )
        elif not self._can_replay(closure, direction, hindered, noise):
            fit = Fit(slope, math.nan, None, Verdict.NOT_REPLAYABLE)
            probe = ProbeRecord(self.counts["steps"], radius, minus, center, plus, fit)
        else:
            noise *= abs(center)
            next_radius, tries = radius, self.policy.MAX_TRIES if self.policy.searches else 1
            while tries and next_radius > 0:
                radius, tries = next_radius, tries - 1
                try:
                    direction.move_to(-radius)
                    behind = closure()
                    direction.move_to(radius)
                    ahead = closure()
                finally:
                    direction.restore()
                minus, plus = self._read(behind, ahead)
                forwards += 2
                if not is_beyond(minus, center, plus, abs(slope) * radius, noise):
                    break
                next_radius = radius * self.policy.tau
            by_loss = radius == said
            max_step = self.policy.max_step(center, slope) if by_loss else 2 * radius / self.policy.tau
            fit = fit_losses(minus, center, plus, radius, noise=noise, max_step=max_step)
            probe = ProbeRecord(self.counts["steps"], radius, minus, center, plus, fit, by_loss)
        self.counts["probe_forwards"] += forwards
        return probe, slope

    def _can_replay(
        self, closure: Callable[[], Tensor], direction: Direction, hindered: Sequence[float], noise: float
    ) -> bool:
        known = self.counts[verification.CHECKED]
        try:
            needed = self.policy.needs_replays
            return verification.can_replay(closure, hindered, self.counts, self._read, noise, needed)
        finally:
            if not known:
                direction.restore()  # a forward may write to the weights, e.g. bound the norms of an embedding

    def _take_snapshot(self) -> Snapshot:
        moved = with_gradient(self.base)
        params = [moved[i] for i in observed(moved)]
        if self._snapshot is None or not same(self._snapshot.params, params):
            place = {p: i for i, p in enumerate(self._params)}
            self._snapshot = Snapshot(self._params, [place[p] for p in params])
        self._snapshot.take()
        if self._beginning is None:
            self._beginning = Snapshot(self._params, self._snapshot.places)
            self._beginning.take()
        return self._snapshot

    def _advance(self, multiplier: float, clip: float, change: float) -> None:
        """`base.step()` at rates ``level * factor * rate_i * lr / unit``; `clip` and `change` are the gradients'."""
        step, level = self.counts["steps"], self.policy.step_size or 0.0
        factor = self.policy.factor(step)
        scale, share = level * factor / self._largest_lr, multiplier / self._largest_lr
        snapshot = self._take_snapshot() if scale > 0 and self.policy.wants_end_slope(step) else None
        with rescaled(self.base, scale, self.relative_rates, self._division):
            self.base.step()
        self.step_size = scale * multiplier
        if snapshot is not None:
            starts: Tensor | list[float] = []
            if self.policy.wants_start_slope(step):
                slopes = snapshot.slopes(self._watch.gradients(change))
                starts = slopes / (self.step_size * clip / self._watch.scale)
            self._move = Move(self.step_size, factor * share, snapshot.places, starts)
        self.counts["steps"] = step + 1

    def _stand(self) -> None:
        """Let the base optimizer step where nothing is to move."""
        self.base.step()
        self.step_size = 0.0
        self._disarm()

    def _skip(self, counted: bool = True) -> None:
        """Leave weights and base optimizer alone: a gradient is not finite. `counted`: among the steps."""
        self.counts["steps"] += counted
        self.counts["skipped"] += 1
        self._disarm()

    def _disarm(self) -> None:
        self._armed = self._clipping = None
        self._await_gradients()

    def _await_gradients(self) -> None:
        """Look at the next backward pass if its gradients' slopes will be asked for."""
        step = self.counts["steps"]
        slopes = self._move.awaits_ends or self.policy.wants_start_slope(step)
        self._watch.open(self._params, slopes, self.wants_probe)

    def _read(self, *values: Tensor | float | list[float]) -> list[float]:
        """Scalars and vectors as Python floats, averaged over ranks: one collective, one synchronisation."""
        weights = itertools.chain.from_iterable(group["params"] for group in self.param_groups)
        device = next(v.device for v in itertools.chain(values, weights) if isinstance(v, Tensor))
        return self.reduce(flat(values, device)).tolist()

    def _relative_noise(self, closure: Callable[[], Tensor]) -> float:
        known: float | None = getattr(closure, "relative_noise", None)
        if known is not None:
            return known
        return max(torch.finfo(p.dtype).eps for p in self._params)

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's `state_dict`, with LQA's own state in the first param group under ``"lqa"``.

        There it survives every checkpoint format that keeps optimizers, FSDP's included. The weights that training
        began with, and those from before a step whose end slope is still to be measured, travel with the state of the
        parameters.
        """
        own = {
            "policy": {"name": self.policy.name, "state": self.policy.state_dict()},
            "counts": dict(self.counts),
            "step_size": self.step_size,
            "end_slope": self.last_end_slope,
            "move": self._move.to_plain(),
            "beginning": self._beginning.places if self._beginning is not None else [],
            "probe": None if self.last_probe is None else self.last_probe.to_plain(),
            "largest_lr": self._largest_lr,
            "gradients": self._watch.state_dict(),
            "backpropagates": self._caller.backpropagates is True,
        }
        pending = self._snapshot if self._move.awaits_ends else None
        return packed(
            self.base.state_dict(), own, self._params, {SNAPSHOT_KEY: pending, BEGINNING_KEY: self._beginning}
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned.

        Raises:
            ValueError: it was saved by an optimizer other than LQA, by another version of it, or with another policy.
        """
        base, own = unpacked(state_dict, self.policy.name)
        self.base.load_state_dict(base)
        self.policy.load_state_dict(own["policy"]["state"])
        self.counts.update(own["counts"])
        self.step_size, self.last_end_slope = own["step_size"], own["end_slope"]
        self.last_probe = None if own["probe"] is None else ProbeRecord.from_plain(own["probe"])
        self._move, params = Move(**own["move"]), self._params
        self._snapshot = take_snapshot(
            self.state, SNAPSHOT_KEY, params, self._move.places if self._move.awaits_ends else []
        )
        self._beginning = take_snapshot(self.state, BEGINNING_KEY, params, own["beginning"])
        self._largest_lr = own["largest_lr"]
        self._watch.load_state_dict(own["gradients"])
        self._caller.backpropagates = own["backpropagates"] or None
        self._await_gradients()
