"""Products of gradients and moves, tensor by tensor, in few launches where launches are what they cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

_HALF = (torch.float16, torch.bfloat16)
#: Elements of a temporary: what a CPU's cache holds, and little of an accelerator's memory.
PIECE, ACCELERATOR_PIECE = 2**17, 2**22
#: Foreach operations take this share of what is observed at once, or a piece.
_FOREACH_SHARE = 1 / 4

_T = TypeVar("_T")
_Tensors = list[Tensor] | tuple[Tensor, ...]


def runs(items: Iterable[_T], size_of: Callable[[_T], int], limit: int) -> Iterator[list[_T]]:
    """`items` in runs whose sizes add up to at most `limit`, but of at least one item."""
    run: list[_T] = []
    total = 0
    for item in items:
        if run and total + size_of(item) > limit:
            yield run
            run, total = [], 0
        run.append(item)
        total += size_of(item)
    if run:
        yield run


def on_accelerator(tensor: Tensor) -> bool:
    return tensor.device.type != "cpu"


def products(left: list[Tensor], right: list[Tensor]) -> Tensor:
    """``<left_i, right_i>`` of each as one vector, in float32 or better; of tensors that are not sharded."""
    return _gathered([left, right], _foreach_products, product, ACCELERATOR_PIECE)


def along_moves(gradients: list[Tensor], now: list[Tensor], before: list[Tensor]) -> Tensor:
    """What `gradients` say of moves ``m_i = now_i - before_i``, as two rows of a column for each.

    The first is ``<gradient_i, m_i>``, the second the sum over all elements of ``sign(gradient_i) sign(m_i)``; both as
    in `products`. Together, because reading the tensors is what they cost.
    """
    # What is observed is a sample of few, so that a share of it is little memory, however large the model is.
    limit = max(ACCELERATOR_PIECE, math.ceil(_FOREACH_SHARE * sum(t.numel() for t in now)))
    return _gathered([gradients, now, before], _foreach_along, along_move, limit)


def _gathered(
    sides: list[list[Tensor]], together: Callable[..., Tensor], alone: Callable[..., Tensor], limit: int
) -> Tensor:
    """What `together` makes of lists of tensors, and `alone` of each of those that foreach operations do not take.

    The last dimension is that of the tensors. Of `limit` elements at most go together.
    """
    left, right = sides[:2]
    parts: list[Tensor] = []
    order: list[int] = []
    for alike in _together(left, right, limit):
        for run in runs(alike, lambda i: left[i].numel(), limit):
            parts.append(together(*([side[i] for i in run] for side in sides)))
            order += run
    if rest := sorted({*range(len(left))} - {*order}):
        single = [alone(*(side[i] for side in sides)) for i in rest]
        device, dtype = single[0].device, torch.promote_types(single[0].dtype, torch.float32)
        parts.append(torch.stack([value.to(device, dtype) for value in single], dim=-1))
        order += rest
    found = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
    if order == sorted(order):
        return found
    place = {i: at for at, i in enumerate(order)}
    shares = found.unbind(-1)
    return torch.stack([shares[place[i]] for i in range(len(left))], dim=-1)


def _together(left: list[Tensor], right: list[Tensor], limit: int) -> list[list[int]]:
    """The places of those that foreach operations take, those that they take in one launch apart from the others."""
    if len({t.device for t in right}) > 1 or not on_accelerator(right[0]):
        return []
    fit = [i for i, a in enumerate(left) if not a.is_sparse and right[i].numel() <= limit]
    whole = [i for i in fit if left[i].is_contiguous() and right[i].is_contiguous()]
    return [whole, sorted({*fit} - {*whole})]


def _foreach_products(left: list[Tensor], right: list[Tensor]) -> Tensor:
    """`products`, in a number of launches that hardly depends on the number of tensors."""
    return _foreach_sums(torch._foreach_mul(_foreach_float(left), _foreach_float(right)))


def _foreach_along(gradients: list[Tensor], now: list[Tensor], before: list[Tensor]) -> Tensor:
    """`along_moves`, as `_foreach_products`."""
    gradients = _foreach_float(gradients)
    moves = torch._foreach_sub(_foreach_float(now), _foreach_float(before))
    slopes = _foreach_sums(torch._foreach_mul(gradients, moves))
    torch._foreach_sign_(moves)
    torch._foreach_mul_(moves, torch._foreach_sign(gradients))
    return torch.stack([slopes, _foreach_sums(moves)])


def _foreach_float(tensors: list[Tensor]) -> list[Tensor]:
    """`tensors`, those of half precision in float32."""
    places = [i for i, t in enumerate(tensors) if t.dtype in _HALF]
    if not places:
        return tensors
    copies = list(tensors)
    for i in places:
        copies[i] = torch.empty_like(tensors[i], dtype=torch.float32)
    torch._foreach_copy_([copies[i] for i in places], [tensors[i] for i in places])
    return copies


def _foreach_sums(tensors: _Tensors) -> Tensor:
    """The sum of all elements of each."""
    # There is no foreach sum. Of the numbers above zero, and of the sizes of all, the 1-norm is one.
    above = torch._foreach_clamp_min(tensors, 0)
    return 2 * torch.stack(torch._foreach_norm(above, 1)) - torch.stack(torch._foreach_norm(tensors, 1))


def product(a: Tensor, b: Tensor) -> Tensor:
    """One of `products`, whatever the tensors are."""
    tensors = _dense(a, b)
    # BLAS needs no temporary for one precision's plain product.
    temporary = a.dtype in _HALF or not tensors[0].is_contiguous()
    products = [_plain_product(*_floats(piece)) for piece in (_pieces(tensors) if temporary else [tensors])]
    return products[0] if len(products) == 1 else torch.stack(products).sum()


def along_move(gradient: Tensor, now: Tensor, before: Tensor) -> Tensor:
    """One column of `along_moves`, whatever the tensors are."""
    parts = []
    for piece in _pieces(_dense(gradient, now, before)):
        a, b, c = _floats(piece)
        move = b - c
        slope = _plain_product(a, move)
        # A product of two small numbers could be 0; one with a sign cannot.
        parts.append(torch.stack([slope, _plain_product(torch.sign(a), move.sign_())]))
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)  # a piece at a time: counts stay exact


def _plain_product(a: Tensor, b: Tensor) -> Tensor:
    return torch.dot(a.reshape(-1), b.reshape(-1))


def _floats(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """`tensors`, in float32 if the first is of half precision."""
    return tuple(t.float() for t in tensors) if tensors[0].dtype in _HALF else tensors


def _pieces(tensors: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
    """Tensors of one shape, cut so that temporaries fit into a CPU's cache.

    There they cost next to nothing, fresh memory several times the arithmetic.
    """
    first = tensors[0]
    size = ACCELERATOR_PIECE if on_accelerator(first) else PIECE
    if not first.dim() or first.numel() <= size:
        return [tensors]
    if all(t.is_contiguous() for t in tensors):
        cut = [torch.split(t.view(-1), size) for t in tensors]
    else:
        height = max(1, size * first.shape[0] // first.numel())
        cut = [torch.split(t, height) for t in tensors]
    return list(zip(*cut, strict=True))


def _dense(a: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Where `a` is sparse, its rows and theirs of the others; else what was given."""
    if not a.is_sparse:
        return a, *others
    a = a.coalesce()
    rows = a.indices()[0]
    return a.values(), *(b[rows] for b in others)
