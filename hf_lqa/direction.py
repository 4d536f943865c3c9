"""The line along which the loss is probed: an origin, a direction, and exact moves between them.

The direction is what the base optimizer would do at unit learning rate. It is found by a *rehearsal*: the base
optimizer steps on copies of its state and the difference of the weights is kept; then weights and state are put back.
So the base optimizer itself advances exactly once per training step, after the step size is known, and a probe that
fails has nothing to undo.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

#: A rehearsal copies the base optimizer's state for this share of the weights at a time, which bounds its memory.
REHEARSAL_SHARE = 1 / 16


def full(scalar: Tensor) -> Tensor:
    """The value of a scalar that may be a partial sum over the shards of a `DTensor`."""
    full_tensor: Callable[[], Tensor] | None = getattr(scalar, "full_tensor", None)
    return full_tensor() if full_tensor is not None else scalar


@torch.no_grad()
def local(tensors: list[Tensor]) -> list[Tensor]:
    """Each tensor, or this rank's shard of it, sharing its memory: `DTensor` knows few of the foreach operations."""
    return [getattr(t, "to_local")() if hasattr(t, "full_tensor") else t for t in tensors]  # noqa: B009


def mean_over_ranks(scalars: Tensor) -> Tensor:
    """The mean of `scalars` over all ranks of the default process group; `scalars` itself where there is none."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return scalars
    scalars = scalars.clone()
    dist.all_reduce(scalars)
    return scalars / dist.get_world_size()


def like(lr: float | Tensor, value: float) -> float | Tensor:
    """`value` in the form of the learning rate `lr`, which optimizers allow to be a tensor."""
    return torch.full_like(lr, value) if isinstance(lr, Tensor) else value


def dot(left: list[Tensor], right: list[Tensor]) -> Tensor:
    """``sum_i <left_i, right_i>`` as a 0-dim tensor in float32 or better, equal on all ranks that hold equal values.

    Half-precision products are accumulated in float32. Sparse tensors (gradients of sparse embeddings) are allowed on
    the left.
    """
    products = []
    for a, b in zip(left, right, strict=True):
        if a.is_sparse:
            a = a.coalesce()
            a, b = a.values(), b[a.indices()[0]]
        if a.dtype in (torch.float16, torch.bfloat16):
            a, b = a.float(), b.float()
        # For plain tensors without a temporary, which on a CPU costs several times the arithmetic.
        products.append(full((a * b).sum()) if hasattr(a, "full_tensor") else torch.dot(a.reshape(-1), b.reshape(-1)))
    device = products[0].device
    return torch.stack([p.to(device=device, dtype=torch.promote_types(p.dtype, torch.float32)) for p in products]).sum()


def _rehearsal_chunks(params: list[Tensor]) -> Iterator[list[int]]:
    """Indices into `params`, in runs that hold at most `REHEARSAL_SHARE` of all elements (but at least one tensor)."""
    limit = REHEARSAL_SHARE * sum(p.numel() for p in params)
    chunk: list[int] = []
    size = 0
    for i, p in enumerate(params):
        if chunk and size + p.numel() > limit:
            yield chunk
            chunk, size = [], 0
        chunk.append(i)
        size += p.numel()
    yield chunk


def _unhooked_step(base: torch.optim.Optimizer) -> None:
    """Call the class' own `step`, without hooks: a scheduler or a scaler may have replaced the instance's."""
    step = type(base).step
    if getattr(step, "hooked", False):
        step = step.__wrapped__  # type: ignore[attr-defined]
    step(base)


def _copy_state(value: Any) -> Any:
    """A copy of one parameter's optimizer state; tensors are cloned, which also works for tensor subclasses."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {k: _copy_state(v) for k, v in value.items()}
    return copy.deepcopy(value)


def with_gradient(base: torch.optim.Optimizer) -> list[Tensor]:
    """The parameters that a step of `base` moves."""
    return [p for group in base.param_groups for p in group["params"] if p.grad is not None]


class Direction:
    """The weights a step starts from and the base optimizer's update of them at unit learning rate.

    ``theta(alpha) = origin + alpha * direction``, where ``direction`` has one tensor per parameter that has a gradient
    (`params`), each of its parameter's shape and dtype. Beyond the weights themselves it holds two copies of them.

    Args:
        base: the optimizer to rehearse. Its weights, gradients, state, param groups and attributes are the same
            objects with the same values afterwards, also when it raises.
        lr: the learning rate of each of its param groups during the rehearsal.
    """

    def __init__(self, base: torch.optim.Optimizer, lr: list[float]):
        self.params = with_gradient(base)
        self.origin: list[Tensor] = [p.detach().clone() for p in self.params]
        self.direction: list[Tensor] = [torch.empty_like(p) for p in self.origin]
        scale = self._scale()
        try:
            for chunk in _rehearsal_chunks(self.params):
                self._rehearse(base, [r * scale for r in lr], set(chunk))
        finally:
            self.restore()
        torch._foreach_div_(local(self.direction), scale)

    def _scale(self) -> float:
        """A power of two by which the rehearsed learning rate is enlarged.

        The direction is the difference of the weights, rounded like them. A first-order update is at least of the
        gradient's order, so with this factor it is at least of the weights' order, and their rounding error is
        one unit in the last place of the update. fp16 has no exponents to spare.
        """
        if any(p.dtype is torch.float16 for p in self.params):
            return 1.0
        weights = math.sqrt(float(dot(self.origin, self.origin)))
        gradients = [p.grad.detach() for p in self.params if p.grad is not None]
        slopes = [g.coalesce().values() if g.is_sparse else g for g in gradients]
        gradient = math.sqrt(float(dot(slopes, slopes)))
        if not (math.isfinite(weights) and math.isfinite(gradient) and weights > gradient > 0):
            return 1.0
        return 2.0 ** min(math.ceil(math.log2(weights / gradient)), 30)

    def _rehearse(self, base: torch.optim.Optimizer, lr: list[float], chunk: set[int]) -> None:
        """Step `base` on the parameters of `chunk` alone, keep the difference, put the optimizer back."""
        kept_groups, kept_attributes = base.param_groups, dict(vars(base))
        kept_grads = [p.grad for p in self.params]
        missing = object()
        kept_state = {i: base.state.get(self.params[i], missing) for i in chunk}
        devices = sorted({p.device.index or 0 for p in self.params if p.device.type != "cpu"})
        device_type = next((p.device.type for p in self.params if p.device.type != "cpu"), "cuda")
        try:
            # Groups keep their order and length, hidden gradients make the optimizer pass over the rest: an optimizer
            # may know its parameters by position.
            base.param_groups = [{**g, "lr": like(g["lr"], r)} for g, r in zip(kept_groups, lr, strict=True)]
            for i, p in enumerate(self.params):
                if i not in chunk:
                    p.grad = None
                elif kept_state[i] is not missing:
                    base.state[p] = _copy_state(kept_state[i])
            # Optimizers that round stochastically draw random numbers.
            with torch.random.fork_rng(devices=devices, device_type=device_type):
                _unhooked_step(base)
            for i in chunk:
                torch.sub(self.params[i].detach(), self.origin[i], out=self.direction[i])
        finally:
            vars(base).clear()
            vars(base).update(kept_attributes)
            for i, p in enumerate(self.params):
                p.grad = kept_grads[i]
                if i in chunk:
                    if kept_state[i] is missing:
                        base.state.pop(p, None)
                    else:
                        base.state[p] = kept_state[i]

    @torch.no_grad()
    def move_to(self, alpha: float) -> None:
        """Set the weights to ``origin + alpha * direction`` (in place)."""
        self.restore()
        torch._foreach_add_(local(self.params), local(self.direction), alpha=alpha)

    @torch.no_grad()
    def restore(self) -> None:
        """Set the weights to the origin, by copy: bit for bit."""
        torch._foreach_copy_(local(self.params), local(self.origin))
        # Inside a held autocast context the casts of the weights made at the previous position would be used again.
        torch.clear_autocast_cache()

    def slope(self) -> Tensor:
        """``<gradient, direction>``: the derivative of the loss along the direction, at the origin. See `dot`."""
        return _gradient_along(self.params, self.direction)


class Displacement:
    """The move ``theta_{t+1} - theta_t`` of a step, kept for the next batch's gradient, in one copy of the weights.

    Used again from step to step, because fresh memory costs more than the copying.

    Args:
        params: the parameters that have a gradient.
        backward: ``theta_t - theta_{t+1}`` for each, from a checkpoint; allocated if not given.
    """

    def __init__(self, params: list[Tensor], backward: list[Tensor] | None = None):
        self.params = params
        # The sign is what one subtraction in place leaves.
        self.backward = [torch.empty_like(p, requires_grad=False) for p in params] if backward is None else backward

    @torch.no_grad()
    def begin(self) -> None:
        """To be called before the step."""
        torch._foreach_copy_(local(self.backward), local(self.params))

    @torch.no_grad()
    def end(self) -> None:
        """To be called after it."""
        torch._foreach_sub_(local(self.backward), local(self.params))

    def slope(self) -> Tensor:
        """``<gradient, move>`` with the gradients as they are now, 0-dim tensor, see `dot`."""
        return -_gradient_along(self.params, self.backward)

    def by_index(self, groups: list[dict[str, Any]]) -> dict[int, Tensor]:
        """`backward` by each parameter's number in an optimizer's `state_dict`."""
        position = {p: i for i, p in enumerate(p for group in groups for p in group["params"])}
        return {position[p]: move for p, move in zip(self.params, self.backward, strict=True)}


@torch.no_grad()
def _gradient_along(params: list[Tensor], direction: list[Tensor]) -> Tensor:
    """A parameter whose gradient is missing counts as 0."""
    pairs = [(p.grad.detach(), d) for p, d in zip(params, direction, strict=True) if p.grad is not None]
    if not pairs:
        return torch.zeros(())
    return dot([g for g, _ in pairs], [d for _, d in pairs])
