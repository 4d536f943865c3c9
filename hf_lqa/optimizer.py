"""`LQA`: any `torch.optim.Optimizer`, with its learning rate measured instead of given."""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from .cross_batch import POLICIES
from .direction import Direction, rescaled, with_gradient
from .policy import PaperPolicy
from .quadratic import Fit, Verdict, fit_losses, is_beyond
from .slopes import Snapshot, full, is_sharded, mean_over_ranks, observed

#: Keys under which LQA's state travels in the base optimizer's `state_dict`.
_GROUP_KEY, _SNAPSHOT_KEY, _BEGINNING_KEY = "lqa", "lqa_snapshot", "lqa_beginning"


@dataclass(frozen=True)
class ProbeRecord:
    """What one probe measured. Losses are NaN where they were not taken.

    Attributes:
        step: the optimizer step at which it was taken, counted from 0.
        radius: the probe radius in units of the direction.
        loss_minus, loss_center, loss_plus: losses at ``-radius``, 0 and ``radius`` along the direction.
        fit: the parabola through them.
        by_loss: whether the radius is what the loss's value says; else a first probe had to look for another.
    """

    step: int
    radius: float
    loss_minus: float
    loss_center: float
    loss_plus: float
    fit: Fit
    by_loss: bool = True


@dataclass
class _Move:
    """A step whose end slopes are still to be measured, or to be learned from.

    Attributes:
        step_size: as it was applied; 0 where there was no such step.
        factor: what multiplied the level in it, schedule and ramp.
        places: which of the optimizer's parameters it moved and are observed.
        starts: slopes of each at its start, on its own batch, or nothing; read from the device together with `ends`.
        ends: slopes of each at its end, on the next batch; `None` until measured.
        ways: with them, slopes along all the way from the beginning, of the parameters that were observed there; none
            with `starts`.
        vote: with them, see `Snapshot.vote`; 0 where the policy does not ask for it.
    """

    step_size: float = 0.0
    factor: float = 0.0
    places: list[int] = field(default_factory=list)
    starts: Tensor | list[float] = field(default_factory=list)
    ends: list[float] | None = None
    ways: list[float] = field(default_factory=list)
    vote: float = 0.0

    @property
    def awaits_ends(self) -> bool:
        return self.step_size > 0 and self.ends is None


class LQA(torch.optim.Optimizer):
    """Differs from its base optimizer in one thing: the learning rate of a step is what probes of the loss say.

    ::

        optimizer = LQA(torch.optim.AdamW(model.parameters(), lr=1.0))
        closure = ReplayedLoss(model)
        closure.record(compute_loss, batch).backward()
        optimizer.step(closure)

    A step moves parameter ``i`` by ``step_size * rate_i * lr_g * d``, where ``d`` is the base optimizer's update at
    unit learning rate, ``rate_i`` the policy's relative rate, about 1, and ``lr_g`` the group's ``lr``, a *multiplier*:
    1.0 by default, scaled by learning-rate schedulers, different between groups if some should learn slower. On steps
    without a probe this is ``base.step()`` with the learning rate ``step_size * rate_i * lr_g`` and nothing else.

    Args:
        base: the optimizer whose direction is used. Its updates must be proportional to its ``lr``. Param groups and
            state are shared with it.
        policy: ``"cross_batch"`` (averaged, the default) or ``"paper"`` (arXiv 2004.03260 to the letter).
        options: the policy's arguments, see `hf_lqa.policy`, `hf_lqa.first_steps` and `hf_lqa.cross_batch`.

    Attributes:
        step_size: the step size last applied, in units of the direction, schedule included; `None` before any.
        last_fit: the `Fit` of the last probe, `None` before any.
        last_probe: its `ProbeRecord`.
        last_end_slope: slope at the end of a step, on the batch after it, in loss per unit of the direction; the last
            that was measured, `None` before any.
        counts: number of ``steps``, ``skipped`` steps, ``probe_forwards``, first probes that ``searched`` a radius
            because the loss's value said none, and of each verdict.

    Raises:
        ValueError: `base` has no parameters or no ``lr`` or needs a closure itself (LBFGS), `policy` is unknown, or an
            option is unknown or out of range.
    """

    def __init__(self, base: torch.optim.Optimizer, policy: str = "cross_batch", **options: Any):
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
        self.policy: PaperPolicy = POLICIES[policy](**options)
        self.step_size: float | None = None
        self.last_probe: ProbeRecord | None = None
        self.last_end_slope: float | None = None
        self.counts: dict[str, int] = dict.fromkeys(
            ["steps", "skipped", "probe_forwards", "searched", *(v.value for v in Verdict)], 0
        )
        #: Mean of a scalar over the data-parallel ranks; every decision is made on its results.
        self.reduce: Callable[[Tensor], Tensor] = mean_over_ranks
        #: Wall-clock time spent in probes.
        self.probe_seconds = 0.0
        # Weights before the last step, and before the first.
        self._snapshot: Snapshot | None = None
        self._beginning: Snapshot | None = None
        # Of a probe, where the next step has one, too: fresh memory costs more than the copying.
        self._origin: tuple[list[Tensor], list[Tensor]] = [], []
        self._move = _Move()
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
        return self.policy.relative_rates(len(self._params))

    @property
    def wants_probe(self) -> bool:
        """Whether the next step will call its closure. Nothing needs to be recorded for one that will not."""
        return self.policy.wants_probe(self.counts["steps"])

    def arm(self, closure: Callable[[], Tensor] | None) -> None:
        """Provide the closure of the next `step`, for loops that call it without (`None`: take it back)."""
        self._armed = closure

    def observe_clipping(self, grad_norm: Tensor | float, max_norm: float) -> None:
        """Tell the next `step` that its gradients had the norm `grad_norm` and were then clipped to `max_norm`.

        With it slopes are those of the loss, not of the clipped gradients; and gradients with a norm that is not
        finite are not applied.
        """
        self._clipping = grad_norm, max_norm

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> None:  # type: ignore[override]
        """Advance the base optimizer once, at the step size that was measured.

        Args:
            closure: returns the loss at the present weights as a 0-dim tensor, without gradient and the same whenever
                it is called at the same weights (`ReplayedLoss` makes one). If it has an attribute ``loss``, that is
                taken for the loss at the origin. Called on probe steps only. A closure that raises leaves everything
                as it was before the step.

        Raises:
            ValueError: no closure, and nothing was ever measured.
        """
        closure = closure if closure is not None else self._armed
        lr = [float(group["lr"]) for group in self.param_groups]
        multiplier = max(lr)
        if multiplier <= 0 or all(p.grad is None for p in self._params):
            # A scheduler's warm-up starts at 0: the base sees the gradient, nothing moves, nothing is measured.
            self.base.step()
            self.step_size = 0.0
            self._disarm()
            return
        if self.policy.step_size is None and not isinstance(self.base, torch.optim.SGD):
            # What shapes say holds for directions whose elements are alike, as AdamW's; gradients are not.
            self.policy.begin([p.shape if p.requires_grad else () for p in self._params])
        # Everything is measured first and decided afterwards, so that a closure that raises has changed nothing.
        observed_norm, max_norm = self._clipping if self._clipping is not None else (0.0, math.inf)
        norm, slopes, move = 0.0, [], self._move
        if self._snapshot is not None and move.awaits_ends:
            along: Tensor | list[float] = []
            vote: Tensor | float = 0.0
            if self._beginning is not None and not len(move.starts):  # in the first steps it is not asked for
                along = self._beginning.slopes()
                vote = self._beginning.vote() if self.policy.wants_vote else 0.0
            norm, move.vote, *slopes = self._read(observed_norm, vote, move.starts, along, self._snapshot.slopes())
        elif self._clipping is not None:
            (norm,) = self._read(observed_norm)
        first, last = len(move.starts), len(slopes) - len(move.places)
        starts, ways, ends = slopes[:first], slopes[first:last], slopes[last:]
        if not all(map(math.isfinite, (norm, *ends))):
            self._skip()
            return
        clip = min(1.0, max_norm / (norm + 1e-6))
        if ends:
            move.starts, move.ends = starts, [end / move.step_size / clip for end in ends]
            move.ways = [way / clip for way in ways]
        probe = None
        if self.wants_probe:
            if closure is None and self.policy.step_size is None:
                raise ValueError(
                    "step() was called without a closure before any step size was measured: pass a closure that"
                    " returns the loss, e.g. hf_lqa.ReplayedLoss"
                )
            if closure is not None:
                begun = time.perf_counter()
                with rescaled(self.base, 1 / multiplier, self.relative_rates):
                    probe, slope = self._probe(closure, clip)
                self.probe_seconds += time.perf_counter() - begun
                if not math.isfinite(slope):
                    self._skip()
                    return
        if move.ends is not None:
            assert isinstance(move.starts, list)
            self.last_end_slope, self._move = sum(move.ends), _Move()
            sizes = [p.numel() for p in self._params]
            starts = _spread(move.starts, move.places, len(sizes), 0.0)
            ends = _spread(move.ends, move.places, len(sizes), math.nan)
            ways = _spread(move.ways, self._beginning.places, len(sizes), 0.0) if self._beginning is not None else []
            self.policy.observe_end(starts, ends, sizes, move.factor, ways, move.vote)
        if probe is not None:
            self.last_probe = probe
            self.counts[probe.fit.verdict.value] += 1
            self.counts["searched"] += not probe.by_loss
            self.policy.observe_probe(probe.fit, probe.radius, probe.by_loss)
        self._advance(multiplier, clip)
        if not self.wants_probe:
            self._origin = [], []
        self._disarm()

    def _probe(self, closure: Callable[[], Tensor], clip: float) -> tuple[ProbeRecord, float]:
        """Measure along the base optimizer's direction: (record, ``<gradient, direction>``)."""
        # What a step started from is not needed any more; a probe has its own.
        self._snapshot = None
        params, kept = self._origin
        direction = Direction(self.base, kept if _same(params, with_gradient(self.base)) else None)
        self._origin = direction.params, direction.origin
        known: Tensor | None = getattr(closure, "loss", None)
        first = self.policy.step_size is None
        center, slope, square = self._read(
            closure() if known is None else known, direction.slope() / clip, direction.square() if first else 0.0
        )
        forwards = 0 if known is not None else 1
        said = radius = self.policy.radius(center, slope)
        if first:
            radius = self.policy.initial_radius(center, slope, math.sqrt(square))
        minus = plus = math.nan
        if radius is None:
            verdict = Verdict.NON_DESCENT if math.isfinite(center) and math.isfinite(slope) else Verdict.NON_FINITE
            probe = ProbeRecord(
                self.counts["steps"], math.nan, minus, center, plus, Fit(slope, math.nan, None, verdict)
            )
        else:
            noise = self._relative_noise(closure) * abs(center)
            nearer, tries = radius, self.policy.MAX_TRIES if self.policy.searches else 1
            while tries and nearer > 0:
                radius, tries = nearer, tries - 1
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
                nearer = radius * self.policy.tau
            by_loss = radius == said
            max_step = self.policy.max_step(center, slope) if by_loss else 2 * radius / self.policy.tau
            fit = fit_losses(minus, center, plus, radius, noise=noise, max_step=max_step)
            probe = ProbeRecord(self.counts["steps"], radius, minus, center, plus, fit, by_loss)
        self.counts["probe_forwards"] += forwards
        return probe, slope

    def _take_snapshot(self) -> Snapshot:
        moved = with_gradient(self.base)
        params = [moved[i] for i in observed(moved)]
        if self._snapshot is None or not _same(self._snapshot.params, params):
            place = {p: i for i, p in enumerate(self._params)}
            self._snapshot = Snapshot(self._params, [place[p] for p in params])
        self._snapshot.take()
        if self._beginning is None:
            self._beginning = Snapshot(self._params, self._snapshot.places)
            self._beginning.take()
        return self._snapshot

    def _advance(self, multiplier: float, clip: float) -> None:
        """`base.step()` at rates ``level * factor * rate_i * lr``; `clip` is by what the gradients were scaled."""
        step, level = self.counts["steps"], self.policy.step_size or 0.0
        factor = self.policy.factor(step)
        scale = level * factor
        snapshot = self._take_snapshot() if scale > 0 and self.policy.wants_end_slope(step) else None
        with rescaled(self.base, scale, self.relative_rates):
            self.base.step()
        if snapshot is not None:
            step_size = scale * multiplier
            starts: Tensor | list[float] = []
            if self.policy.wants_start_slope(step):
                starts = snapshot.slopes() / (step_size * clip)
            self._move = _Move(step_size, factor * multiplier, snapshot.places, starts)
        self.step_size = scale * multiplier
        self.counts["steps"] = step + 1

    def _skip(self) -> None:
        """Leave weights and base optimizer alone: the gradient is not finite."""
        self.counts["steps"] += 1
        self.counts["skipped"] += 1
        self._disarm()

    def _disarm(self) -> None:
        self._armed = self._clipping = None

    def _read(self, *values: Tensor | float | list[float]) -> list[float]:
        """Scalars and vectors as Python floats, averaged over ranks: one collective, one synchronisation."""
        # Floats go where the weights are: collectives of NCCL know no other place.
        device = next(v.device for v in (*values, *self._params) if isinstance(v, Tensor))
        dtype = torch.float32 if device.type == "mps" else torch.float64
        flat = [_vector(v, device).detach().to(dtype).reshape(-1) for v in values]
        return self.reduce(torch.cat(flat)).tolist()

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
        state_dict = self.base.state_dict()
        own = {
            "policy": self.policy.state_dict(),
            "counts": dict(self.counts),
            "step_size": self.step_size,
            "end_slope": self.last_end_slope,
            "move": {**vars(self._move), "starts": torch.as_tensor(self._move.starts).tolist()},
            "beginning": self._beginning.places if self._beginning is not None else [],
            "probe": None if self.last_probe is None else _to_plain(self.last_probe),
        }
        groups = [dict(group) for group in state_dict["param_groups"]]
        # One string: checkpoints of sharded optimizers take dicts apart and load only keys that a fresh optimizer has.
        groups[0][_GROUP_KEY] = json.dumps(own)
        state = {k: dict(v) if isinstance(v, dict) else v for k, v in state_dict["state"].items()}
        kept: dict[str, dict[int, Tensor]] = {_SNAPSHOT_KEY: {}, _BEGINNING_KEY: {}}
        if self._snapshot is not None and self._move.awaits_ends:
            kept[_SNAPSHOT_KEY] = dict(zip(self._snapshot.places, self._snapshot.values, strict=True))
        if self._beginning is not None:
            kept[_BEGINNING_KEY] = dict(zip(self._beginning.places, self._beginning.values, strict=True))
        for i, p in enumerate(self._params):
            for key, values in kept.items():
                if i in values:
                    state.setdefault(i, {})[key] = values[i]
                elif is_sharded(p) and p.requires_grad:
                    # For the same reason sharded parameters have both always.
                    state.setdefault(i, {})[key] = torch.zeros_like(p, requires_grad=False)
        return {**state_dict, "state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned.

        Raises:
            ValueError: it was saved by an optimizer other than LQA.
        """
        groups = [dict(group) for group in state_dict["param_groups"]]
        own = groups[0].pop(_GROUP_KEY, None) if groups else None
        if own is None:
            raise ValueError(
                f"state_dict['param_groups'][0] has no {_GROUP_KEY!r}: it was saved by another optimizer than LQA."
                " Start without the optimizer's checkpoint, or load it into the base optimizer"
            )
        own = json.loads(own)
        self.base.load_state_dict({**state_dict, "param_groups": groups})
        self.policy.load_state_dict(own["policy"])
        self.counts.update(own["counts"])
        self.step_size, self.last_end_slope = own["step_size"], own["end_slope"]
        self.last_probe = None if own["probe"] is None else _from_plain(own["probe"])
        self._move = _Move(**own["move"])
        self._snapshot = self._take_values(_SNAPSHOT_KEY, self._move.places if self._move.awaits_ends else [])
        self._beginning = self._take_values(_BEGINNING_KEY, own["beginning"])

    def _take_values(self, key: str, places: list[int]) -> Snapshot | None:
        """What the state holds under `key` of the parameters at `places`; none if there are none."""
        # Cast and placed by the base's load_state_dict like its own state.
        values = {p: s.pop(key) for p, s in self.state.items() if key in s}
        params = self._params
        return Snapshot(params, places, [values[params[i]] for i in places]) if places else None


def _vector(value: Tensor | float | list[float], device: torch.device) -> Tensor:
    """`value` on `device`, gathered if it is sharded."""
    if isinstance(value, Tensor):
        return full(value).to(device)
    # Filled there, because a copy from the host would wait for the device.
    return torch.tensor(value, device=device) if isinstance(value, list) else torch.full((), value, device=device)


def _spread(values: list[float], places: list[int], count: int, rest: float) -> list[float]:
    """A list of `count` numbers with `values` at `places`, and `rest` elsewhere; nothing if there are no values."""
    at = dict(zip(places, values, strict=False))
    return [at.get(i, rest) for i in range(count)] if values else []


def _to_plain(probe: ProbeRecord) -> dict[str, Any]:
    plain = asdict(probe)
    plain["fit"]["verdict"] = probe.fit.verdict.value
    return plain


def _from_plain(plain: dict[str, Any]) -> ProbeRecord:
    fit = Fit(**{**plain["fit"], "verdict": Verdict(plain["fit"]["verdict"])})
    return ProbeRecord(**{**plain, "fit": fit})


def _same(left: list[Tensor], right: list[Tensor]) -> bool:
    """Whether two lists hold the same objects; ``==`` would compare the tensors' elements."""
    return len(left) == len(right) and all(a is b for a, b in zip(left, right, strict=True))
