"""Gradients as a training loop leaves them: whether they are finite, and what they were before the loop clipped them.

A slope is a product with the gradient of the loss. Between ``backward`` and ``step`` a loop may clip gradients, and the
slope would be that of the clipped one, too flat for the probe whose radius it gives. So at the end of each backward
pass before a probe, a `GradientWatch` keeps what gradients are; what the loop does afterwards, it finds in ``step``.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .direction import Direction
from .products import products
from .quadratic import Fit, Verdict
from .slopes import is_sampled, local_part, observed, sample

#: A parabola's slope and the gradient's agree within this factor: cubic terms are that large, clipping is larger.
_AGREE = 1.5
#: Where nothing in the gradients was seen to change, it takes more to doubt them.
_CONTRADICT = 2.0
#: By so much a scale is taken back that left the losses' differences below their rounding errors.
_NEARER = 4.0

#: What is said of a contradiction that nothing between ``backward`` and ``step`` explains.
CONTRADICTION = (
    "The gradients' slope is {:.2g} of the slope of the loss that the first probe measured: gradients are clipped or"
    " scaled within the backward pass, or the closure's loss is another one than was back-propagated. The probe's slope"
    " is used. Clip after the backward pass, e.g. by torch.nn.utils.clip_grad_norm_, or tell norm and limit by"
    " optimizer.observe_clipping(norm, max_norm)"
)


@torch.no_grad()
def total(params: list[Tensor]) -> Tensor:
    """A 0-dim tensor that is finite only if all gradients of `params` are: one pass, no synchronisation.

    A sum on a CPU, where it is cheapest; elsewhere of each tensor's largest element, by foreach operations.
    """
    gradients = [local_part(p.grad) for p in params if p.grad is not None]
    gradients = [g._values() if g.is_sparse else g for g in gradients]
    device = gradients[0].device
    alike: dict[torch.device, list[Tensor]] = {}
    for g in gradients:
        if g.numel():  # a shard may be empty, and has no largest element
            alike.setdefault(g.device, []).append(g)
    sums = [torch.stack(_extents(group)).sum().to(device) for group in alike.values()]
    return torch.stack(sums).sum() if sums else torch.zeros((), device=device)


def _extents(gradients: list[Tensor]) -> list[Tensor]:
    if gradients[0].device.type == "cpu":
        # In float32, or half precision would overflow.
        return [g.sum(dtype=torch.promote_types(g.dtype, torch.float32)) for g in gradients]
    largest = torch._foreach_norm(gradients, float("inf"))
    return [n.to(torch.promote_types(n.dtype, torch.float32)) for n in largest]


class GradientWatch:
    """What gradients were at the end of the last backward pass, and what that says of slopes.

    Of each parameter the gradient's identity and version; where it may be needed, also its values, those rows alone
    that a `Snapshot` observes. The loss, by the first probe, says which of both is *its* gradient: the one before the
    loop's changes (clipping), or the one after them (a sum that was divided by its number of terms, a loss scale).

    Args:
        params: an optimizer's parameters.

    Attributes:
        changed: whether a loop ever changed gradients between ``backward`` and ``step``.
        before: whether the loss's gradient is the one before such changes.
        scale: what multiplies the slopes of that gradient, so that they are those of the loss.
    """

    def __init__(self, params: list[Tensor]):
        self.changed, self.before, self.scale = False, True, 1.0
        self._noting = True
        self._start(params)

    def _start(self, params: list[Tensor]) -> None:
        self._stopped = self._queued = False
        self._hooks: dict[Tensor, Any] = {}
        self._noted: dict[Tensor, tuple[Tensor, int]] = {}
        self._kept: dict[Tensor, Tensor] = {}
        # Of the gradient before the loop's changes, where the first probe spoke against it.
        self._first_slope = 0.0
        # The parameters' hooks must not keep an optimizer alive that nobody else holds.
        hooks = self._hooks
        weakref.finalize(self, _remove, hooks).atexit = False
        self._attach(params)

    def __getstate__(self) -> dict[str, Any]:
        return {k: vars(self)[k] for k in ("changed", "before", "scale", "_noting", "_stopped")} | {
            "params": list(self._hooks)
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        params, stopped = state.pop("params"), state.pop("_stopped")
        vars(self).update(state)
        self._start([] if stopped else params)
        self._stopped = stopped

    def state_dict(self) -> dict[str, Any]:
        return {"changed": self.changed, "before": self.before, "scale": self.scale}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.changed, self.before, self.scale = state["changed"], state["before"], state["scale"]

    def stop(self) -> None:
        """Never look again: what clipping did is told."""
        if not self._stopped:
            self._stopped, self.scale = True, 1.0
            self._noted, self._kept = {}, {}
            _remove(self._hooks)

    def open(self, params: list[Tensor], probe: bool) -> None:
        """Look at the next backward pass, if a probe is due after it."""
        self._noted, self._kept, self._queued = {}, {}, False
        self._noting = probe and not self._stopped
        if self._noting:
            self._attach(params)

    def close(self) -> None:
        """Look no more: what follows is a probe's."""
        self._noting = False

    def _attach(self, params: list[Tensor]) -> None:
        me = weakref.ref(self)

        def accumulated(_: Tensor) -> None:
            watch = me()
            if watch is not None and watch._noting and not watch._queued:
                watch._queued = True
                # The second time behind what DistributedDataParallel has queued, which averages the gradients.
                _after_backward(lambda: _after_backward(watch._note))

        for p in params:
            if p not in self._hooks and p.requires_grad and p.is_leaf:
                self._hooks[p] = p.register_post_accumulate_grad_hook(accumulated)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def _note(self) -> None:
        self._queued = False
        with_gradient = [p for p in self._hooks if p.grad is not None]
        self._noted = {p: (p.grad, p.grad._version) for p in with_gradient if p.grad is not None}
        rows = {p: _rows(p) for p in (with_gradient[i] for i in observed(with_gradient))}
        self._kept = {p: now.clone() for p, now in rows.items()}

    @property
    def change(self) -> Tensor | float:
        """Above 0 if gradients were changed since the end of the last backward pass, else 0.

        In a loop that has changed them before, as if it always did: what was kept is right in either case.
        """
        if self.changed and self._noted:
            return 1.0
        if any(p.grad is not gradient or gradient._version != at for p, (gradient, at) in self._noted.items()):
            return 1.0
        if not self._noted:
            return 0.0
        pairs = [(_rows(p), kept) for p, kept in self._kept.items() if p.grad is not None]
        pairs = [(now, kept) for now, kept in pairs if _alike(now, kept) and kept.numel()]
        if not pairs:
            return 0.0
        differences = torch._foreach_sub([now for now, _ in pairs], [kept for _, kept in pairs])
        if differences[0].device.type == "cpu":  # where a norm takes longer
            largest = [d.abs_().max() for d in differences]
        else:
            largest = list(torch._foreach_norm(differences, float("inf")))
        return torch.stack([d.to(largest[0].device, torch.float32) for d in largest]).max()

    def gradients(self, change: Tensor | float) -> dict[Tensor, Tensor]:
        """What takes the place of parameters' gradients in slopes, the rows of each that are observed.

        Args:
            change: as `change` said; what is not known on the host yet does not count.
        """
        changed = not isinstance(change, Tensor) and change > 0
        if not (changed and self._noted):
            self.changed |= changed
            return {}
        found = {p: kept for p, kept in self._kept.items() if p.grad is not None}
        if not self.changed and found:
            self.before = not _by_a_power_of_two(found)
        self.changed = True
        return found if self.before else {}

    def slope(self, direction: Direction, before: dict[Tensor, Tensor]) -> Tensor:
        """``<gradient of the loss, direction>``: over all weights, corrected by what the observed ones say."""
        slope = direction.slope()
        if not before:
            return slope * self.scale if self.scale != 1 else slope
        at = {p: update for p, update in zip(direction.params, direction.tensors, strict=True) if p in before}
        along = [sample(local_part(update)) if is_sampled(p) else local_part(update) for p, update in at.items()]
        sums = [products([_rows(p) for p in at], along).sum(), products([before[p] for p in at], along).sum()]
        # Without any gradient there is nothing to divide by, and nothing to correct.
        return slope * (sums[1] / torch.where(sums[0] == 0, 1.0, sums[0]) * self.scale)

    def doubt(self, fit: Fit, slope: float) -> float:
        """By what factor the first probe's slope is steeper than the gradient's; 0 if little, or if that is explained.

        It is explained where a change of the gradients was seen, or was found out before.
        """
        unknown = fit.verdict is Verdict.NON_FINITE or not (fit.slope < 0 and slope < 0)
        if unknown or self.changed or self.scale != 1 or fit.slope / slope <= _CONTRADICT:
            return 0.0
        return fit.slope / slope

    def contradicted(self, fit: Fit, slope: float, replaced: bool) -> bool:
        """Whether the first probe says that `slope` is not the loss's; then what is believed changes: take it again.

        Args:
            fit: of the probe.
            slope: the gradient's, as `slope` said.
            replaced: whether it was that of a gradient from before the loop's changes.
        """
        drowned = fit.verdict is Verdict.BELOW_NOISE
        unknown = drowned or fit.verdict is Verdict.NON_FINITE or not (fit.slope < 0 and slope < 0)
        steeper = math.nan if unknown else fit.slope / slope
        if self.scale != 1 and drowned:
            self.scale /= _NEARER
            return True
        if self.scale == 1 and replaced and (drowned or steeper < 1 / _AGREE):
            # Divided by a loss scale, perhaps: the gradient before the changes is not the loss's own.
            self.before, self._first_slope = False, slope
            return True
        agree = _AGREE if self.changed or self.scale != 1 else _CONTRADICT
        if unknown or 1 / agree <= steeper <= agree or (steeper < 1 and self.scale == 1):
            return False
        if self.scale == 1 and self._first_slope and not self.before:
            # Neither of both: divided by a loss scale, and clipped.
            self.before, self.scale = True, fit.slope / self._first_slope
        else:
            self.scale *= steeper
        return True


def _rows(p: Tensor) -> Tensor:
    """Those rows of a parameter's gradient that are observed."""
    assert p.grad is not None
    gradient = local_part(p.grad)
    return sample(gradient) if is_sampled(p) else gradient


def _by_a_power_of_two(before: dict[Tensor, Tensor]) -> bool:
    """Whether gradients were divided by one, as by a loss scale or a number of micro-batches, and not clipped."""
    p, kept = max(before.items(), key=lambda item: item[1].numel())
    was, now = (float(torch.linalg.vector_norm((g._values() if g.is_sparse else g).double())) for g in (kept, _rows(p)))
    return now > 0 and math.isfinite(was / now) and was / now > 1 and math.frexp(was / now)[0] == 0.5


def _alike(kept: Tensor | None, now: Tensor) -> bool:
    return kept is not None and not kept.is_sparse and not now.is_sparse and kept.shape == now.shape


def _after_backward(callback: Callable[[], None]) -> None:
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def _remove(hooks: dict[Tensor, Any]) -> None:
    for handle in hooks.values():
        handle.remove()
    hooks.clear()
