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


def products(left: list[Tensor], right: list[Tensor], minus: list[Tensor] | None = None) -> Tensor:
    """``<left_i, right_i - minus_i>`` of each as one vector, in float32 or better; of tensors that are not sharded."""
    return _vector([left, right] if minus is None else [left, right, minus], _foreach_products, product)


def sign_products(left: list[Tensor], right: list[Tensor], minus: list[Tensor]) -> Tensor:
    """The sum over all elements of ``sign(left_i) sign(right_i - minus_i)`` of each, as `products`."""
    return _vector([left, right, minus], _foreach_sign_products, sign_product)


def _vector(sides: list[list[Tensor]], together: Callable[..., Tensor], alone: Callable[..., Tensor]) -> Tensor:
    """What `together` makes of lists of tensors, and `alone` of each of those that foreach operations do not take."""
    left, right = sides[:2]
    parts: list[Tensor] = []
    order: list[int] = []
    # What is observed is a sample of few, so that a share of it is little memory, however large the model is.
    limit = ACCELERATOR_PIECE
    if len(sides) > 2:
        limit = max(limit, math.ceil(_FOREACH_SHARE * sum(t.numel() for t in right)))
    for alike in _together(left, right, limit):
        for run in runs(alike, lambda i: left[i].numel(), limit):
            parts.append(together(*([side[i] for i in run] for side in sides)))
            order += run
    if rest := sorted({*range(len(left))} - {*order}):
        single = [alone(*(side[i] for side in sides)) for i in rest]
        device, dtype = single[0].device, torch.promote_types(single[0].dtype, torch.float32)
        parts.append(torch.stack([value.to(device, dtype) for value in single]))
        order += rest
    vector = parts[0] if len(parts) == 1 else torch.cat(parts)
    if order == sorted(order):
        return vector
    place = {i: at for at, i in enumerate(order)}
    shares = vector.unbind()
    return torch.stack([shares[place[i]] for i in range(len(left))])


def _together(left: list[Tensor], right: list[Tensor], limit: int) -> list[list[int]]:
    """The places of those that foreach operations take, those that they take in one launch apart from the others."""
    if len({t.device for t in right}) > 1 or not on_accelerator(right[0]):
        return []
    fit = [i for i, a in enumerate(left) if not a.is_sparse and right[i].numel() <= limit]
    whole = [i for i in fit if left[i].is_contiguous() and right[i].is_contiguous()]
    return [whole, sorted({*fit} - {*whole})]


def _foreach_products(left: list[Tensor], right: list[Tensor], minus: list[Tensor] | None = None) -> Tensor:
    """`products`, in a number of launches that hardly depends on the number of tensors."""
    move = _foreach_float(right) if minus is None else _foreach_moves(right, minus)
    return _foreach_sums(torch._foreach_mul(_foreach_float(left), move))


def _foreach_sign_products(left: list[Tensor], right: list[Tensor], minus: list[Tensor]) -> Tensor:
    """`sign_products`, as `_foreach_products`."""
    signs = torch._foreach_sign(_foreach_moves(right, minus))
    torch._foreach_mul_(signs, torch._foreach_sign(_foreach_float(left)))
    return _foreach_sums(signs)


def _foreach_moves(right: list[Tensor], minus: list[Tensor]) -> _Tensors:
    return torch._foreach_sub(_foreach_float(right), _foreach_float(minus))


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


def product(a: Tensor, b: Tensor, minus: Tensor | None = None) -> Tensor:
    """One of `products`, whatever the tensors are."""
    tensors = _dense(a, b) if minus is None else _dense(a, b, minus)
    # BLAS needs no temporary for one precision's plain product.
    temporary = minus is not None or a.dtype in _HALF or not tensors[0].is_contiguous()
    products = []
    for a, b, *rest in _pieces(tensors) if temporary else [tensors]:
        if a.dtype in _HALF:
            a, b, *rest = (t.float() for t in (a, b, *rest))
        if rest:
            b = b - rest[0]
        products.append(torch.dot(a.reshape(-1), b.reshape(-1)))
    return products[0] if len(products) == 1 else torch.stack(products).sum()


def sign_product(a: Tensor, b: Tensor, minus: Tensor) -> Tensor:
    """One of `sign_products`, whatever the tensors are."""
    # A product of two small half-precision numbers could be 0; one with a sign cannot.
    signs = ((b - c).mul_(torch.sign(a)).sign_() for a, b, c in _pieces(_dense(a, b, minus)))
    return torch.stack([s.sum(dtype=torch.float32) for s in signs]).sum()  # a piece at a time


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
