"""The line along which the loss is probed: an origin, a direction, and exact moves between them.

The direction is what the base optimizer would do at the learning rates it has (`rescaled`: at others). It is found by
a *rehearsal*: the base optimizer steps on copies of its state, a part of the weights at a time, and what it does to
them is kept. So the base optimizer itself advances exactly once per training step, after the step size is known, and a
probe that fails has nothing to undo.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .groups import ELEMENTWISE, with_gradient
from .products import ACCELERATOR_PIECE, runs
from .slopes import absolute, dot, local, local_part

#: A rehearsal copies the base optimizer's state for this share of the weights at a time, which bounds its memory; on an
#: accelerator, if they go by pieces, for one of these at least: short steps would cost more than a little memory.
REHEARSAL_SHARE = 1 / 16

#: Elements of a rehearsal on a CPU, few enough that the allocator uses the same memory again.
REHEARSAL_PIECE = 2**19

#: A parameter, and a piece of its direction, origin, gradient and state.
_Piece = tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]


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


def _copy_states(states: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Copies of several parameters' states, whose tensors are copied together."""
    copies: list[dict[str, Any]] = []
    pairs: list[tuple[Tensor, Tensor]] = []
    for state in states:
        copies.append({})
        for key, value in state.items():
            if isinstance(value, Tensor) and value.device.type != "cpu":
                copies[-1][key] = torch.empty_like(value)
                pairs.append((copies[-1][key], value))
            else:
                copies[-1][key] = _copy_state(value)
    if pairs:
        torch._foreach_copy_([copy for copy, _ in pairs], [value for _, value in pairs])
    return copies


class Direction:
    """The weights a step starts from and the base optimizer's update of them at the learning rates it has.

    ``theta(alpha) = origin + alpha * direction``, where ``direction`` is `unit` times `tensors`: one tensor per
    parameter that has a gradient (`params`), each of its parameter's shape and dtype. Beyond the weights themselves it
    holds two copies of them, or one where `tensors` are the gradients themselves, as for plain gradient descent.

    Args:
        base: the optimizer to rehearse. Its weights, gradients, state, param groups and attributes are the same
            objects with the same values afterwards, also when it raises.
        origin: memory for the weights' copy, a tensor like each parameter that has a gradient; allocated if not given.
    """

    @torch.no_grad()
    def __init__(self, base: torch.optim.Optimizer, origin: list[Tensor] | None = None):
        self.params = with_gradient(base)
        self._on_cpu = all(p.device.type == "cpu" for p in self.params)
        self.origin = [torch.empty_like(p, requires_grad=False) for p in self.params] if origin is None else origin
        torch._foreach_copy_(local(self.origin), local(self.params))
        self.unit = 1.0
        if _is_gradient_descent(base):
            self.tensors = [p.grad.detach() for p in self.params if p.grad is not None]
            self.unit = -float(base.param_groups[0]["lr"])
            return
        self.tensors = [torch.empty_like(p) for p in self.origin]
        elementwise = type(base) in ELEMENTWISE and not any(p.grad.is_sparse for p in self.params if p.grad is not None)
        if elementwise and not any(group["weight_decay"] for group in base.param_groups):
            self._rehearse_pieces(base, 1.0, from_zero=True)
            return
        scale = self._scale()
        self.unit = 1 / scale
        if elementwise:
            self._rehearse_pieces(base, scale, from_zero=False)
            return
        try:
            for run in runs(range(len(self.params)), lambda i: self.params[i].numel(), self._share()):
                self._rehearse(base, scale, set(run))
        finally:
            self.restore()

    def _share(self) -> int:
        return math.ceil(REHEARSAL_SHARE * sum(p.numel() for p in self.params))

    def _scale(self) -> float:
        """A power of two by which the rehearsed learning rate is enlarged.

        The direction is the difference of the weights, rounded like them. A first-order update is at least of the
        gradient's order, so with this factor it is at least of the weights' order, and their rounding error is
        one unit in the last place of the update. fp16 has no exponents to spare.
        """
        if any(p.dtype is torch.float16 for p in self.params):
            return 1.0
        gradients = [p.grad.detach() for p in self.params if p.grad is not None]
        slopes = [g.coalesce().values() if g.is_sparse else g for g in gradients]
        squares = torch.stack([dot(self.origin, self.origin), dot(slopes, slopes)]).tolist()  # one synchronisation
        weights, gradient = map(math.sqrt, squares)
        if not (math.isfinite(weights) and math.isfinite(gradient) and weights > gradient > 0):
            return 1.0
        return 2.0 ** min(math.ceil(math.log2(weights / gradient)), 30)

    def _rehearse_pieces(self, base: torch.optim.Optimizer, scale: float, from_zero: bool) -> None:
        """Step `base` on pieces of the direction's own memory in place of its parameters.

        They begin at the weights or, where those do not matter, at zero, where nothing is rounded away.
        """
        kept = dict(vars(base))
        group_of = {p: i for i, group in enumerate(base.param_groups) for p in group["params"]}
        limit = REHEARSAL_PIECE if self._on_cpu else max(self._share(), ACCELERATOR_PIECE)
        try:
            for batch in runs(self._pieces(kept["state"], limit), lambda piece: piece[1].numel(), limit):
                groups = [{**group, "lr": group["lr"] * scale, "params": []} for group in kept["param_groups"]]
                base.param_groups, base.state = groups, defaultdict(dict)
                states = _copy_states([state for *_, state in batch])
                for (p, piece, _, grad, _), state in zip(batch, states, strict=True):
                    piece.grad = grad
                    groups[group_of[p]]["params"].append(piece)
                    if state:
                        base.state[piece] = state
                pieces, starts = [piece for _, piece, *_ in batch], [start for _, _, start, *_ in batch]
                torch._foreach_zero_(pieces) if from_zero else torch._foreach_copy_(pieces, starts)
                _unhooked_step(base)
                if not from_zero:
                    torch._foreach_sub_(pieces, starts)
        finally:
            vars(base).clear()
            vars(base).update(kept)

    def _pieces(self, states: dict[Tensor, dict[str, Any]], limit: int) -> Iterator[_Piece]:
        """Each parameter with the pieces of its direction, origin, gradient and state, of at most `limit` elements.

        What is not contiguous is not cut.
        """
        for p, target, start in zip(self.params, local(self.tensors), local(self.origin), strict=True):
            assert p.grad is not None
            grad = local_part(p.grad)
            state = {k: local_part(v) if isinstance(v, Tensor) else v for k, v in states.get(p, {}).items()}
            if target.numel() <= limit:
                yield p, target.detach(), start, grad.detach(), state
                continue
            whole = {"target": target, "start": start, "grad": grad.detach()}
            whole |= {k: v for k, v in state.items() if isinstance(v, Tensor) and v.shape == target.shape}
            size = limit if all(t.is_contiguous() for t in whole.values()) else target.numel()
            for begin in range(0, target.numel(), size):
                cut = (
                    whole if size >= target.numel() else {k: v.view(-1)[begin : begin + size] for k, v in whole.items()}
                )
                yield p, cut["target"].detach(), cut["start"], cut["grad"], {k: cut.get(k, v) for k, v in state.items()}

    def _rehearse(self, base: torch.optim.Optimizer, scale: float, chunk: set[int]) -> None:
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
            base.param_groups = [{**group, "lr": group["lr"] * scale} for group in kept_groups]
            for i, p in enumerate(self.params):
                if i not in chunk:
                    p.grad = None
                elif kept_state[i] is not missing:
                    base.state[p] = _copy_state(kept_state[i])
            # Optimizers that round stochastically draw random numbers.
            with torch.random.fork_rng(devices=devices, device_type=device_type):
                _unhooked_step(base)
            for i in chunk:
                torch.sub(self.params[i].detach(), self.origin[i], out=self.tensors[i])
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
        weights, start, update = local(self.params), local(self.origin), local(self.tensors)
        if self._on_cpu:
            # There foreach operations are loops, and memory is what a move waits for: one pass over it, not two.
            for p, a, b in zip(weights, start, update, strict=True):
                torch.add(a, b, alpha=alpha * self.unit, out=p)
            torch.clear_autocast_cache()  # as in `restore`
            return
        self.restore()
        torch._foreach_add_(weights, update, alpha=alpha * self.unit)

    @torch.no_grad()
    def restore(self) -> None:
        """Set the weights to the origin, by copy: bit for bit."""
        torch._foreach_copy_(local(self.params), local(self.origin))
        # Inside a held autocast context the casts of the weights made at the previous position would be used again.
        torch.clear_autocast_cache()

    @torch.no_grad()
    def slope(self) -> Tensor:
        """``<gradient, direction>``: the derivative of the loss along the direction, at the origin. See `dot`."""
        return self.unit * dot([p.grad.detach() for p in self.params if p.grad is not None], self.tensors)

    @torch.no_grad()
    def size(self, multipliers: Mapping[Tensor, float]) -> tuple[Tensor, Tensor]:
        """``sum d²`` and ``sum |d|`` over the direction's elements ``d``, without per-tensor multipliers.

        Args:
            multipliers: of parameters, what the rehearsed rates had; 1 for all others.
        """
        alike: dict[float, list[Tensor]] = {}
        for p, update in zip(self.params, self.tensors, strict=True):
            alike.setdefault(multipliers.get(p, 1.0), []).append(update)
        # Each factor's apart: one vector of all factors would have to be copied to an accelerator, and waited for.
        squares = [(self.unit / by) ** 2 * dot(updates, updates) for by, updates in alike.items()]
        sums = [abs(self.unit) / by * absolute(updates) for by, updates in alike.items()]
        return _together(squares), _together(sums)


def _together(scalars: list[Tensor]) -> Tensor:
    return torch.stack([scalar.to(scalars[0].device) for scalar in scalars]).sum()


def _is_gradient_descent(base: torch.optim.Optimizer) -> bool:
    """Whether the update of `base` is its gradients times one negative number: no rehearsal, no copy."""
    return (
        type(base) is torch.optim.SGD
        and len({float(group["lr"]) for group in base.param_groups}) == 1
        and not any(g["momentum"] or g["weight_decay"] or g["maximize"] for g in base.param_groups)
        and not any(p.grad.is_sparse or p.grad.dtype is not p.dtype for p in with_gradient(base) if p.grad is not None)
    )
