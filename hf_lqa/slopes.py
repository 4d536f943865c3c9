"""Slopes along moves of the weights: products of gradients and moves, sharded or not; the weights before a step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

_HALF = (torch.float16, torch.bfloat16)
#: Elements of a temporary: what a CPU's cache holds, and little of an accelerator's memory.
_PIECE, _ACCELERATOR_PIECE = 2**17, 2**22
#: One row of so many is observed where there are at least so many rows and elements. A CPU waits for memory; an
#: accelerator takes what lies in one piece together, and for small matrices its launches are dearer than their memory.
_EVERY, _MANY_ROWS, _LARGE, _ACCELERATOR_LARGE = 8, 64, 2**14, 2**20

_T = TypeVar("_T")


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
    yield run


def full(scalar: Tensor) -> Tensor:
    """The value of a scalar that may be a partial sum over the shards of a `DTensor`."""
    full_tensor: Callable[[], Tensor] | None = getattr(scalar, "full_tensor", None)
    return full_tensor() if full_tensor is not None else scalar


def is_sharded(tensor: Tensor) -> bool:
    """Whether `tensor` is a `DTensor`, whose class is not there to be imported in every build of PyTorch."""
    return hasattr(tensor, "full_tensor")


@torch.no_grad()
def local(tensors: list[Tensor]) -> list[Tensor]:
    """Each tensor, or this rank's shard of it, sharing its memory: `DTensor` knows few of the foreach operations."""
    return [getattr(t, "to_local")() if is_sharded(t) else t for t in tensors]  # noqa: B009


def mean_over_ranks(scalars: Tensor) -> Tensor:
    """The mean of `scalars` over all ranks of the default process group; `scalars` itself where there is none."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return scalars
    scalars = scalars.clone()
    dist.all_reduce(scalars)
    return scalars / dist.get_world_size()


def dot(left: list[Tensor], right: list[Tensor]) -> Tensor:
    """``sum_i <left_i, right_i>`` as a 0-dim tensor in float32 or better, equal on all ranks that hold equal values.

    Half-precision products are accumulated in float32. Sparse tensors (gradients of sparse embeddings) are allowed on
    the left.
    """
    return _shares(left, _products(local(left), local(right))).sum()


def _products(left: list[Tensor], right: list[Tensor], minus: list[Tensor] | None = None) -> list[Tensor]:
    """``<left_i, right_i - minus_i>`` of each, 0-dim tensors; of tensors that are not sharded."""
    triples: list[tuple[Tensor, ...]] = list(zip(left, right, *(() if minus is None else (minus,)), strict=True))
    alike: dict[torch.device, list[int]] = {}
    for i, triple in enumerate(triples):
        if _together(triple):
            alike.setdefault(left[i].device, []).append(i)
    found: dict[int, Tensor] = {}
    for indices in alike.values():
        for run in runs(indices, lambda i: left[i].numel(), _ACCELERATOR_PIECE):
            columns = (list(column) for column in zip(*(triples[i] for i in run), strict=True))
            found.update(zip(run, _foreach_products(*columns), strict=True))
    return [found[i] if i in found else _product(*triple) for i, triple in enumerate(triples)]


def _together(tensors: tuple[Tensor, ...]) -> bool:
    """Whether foreach operations take these, with others like them, in one launch."""
    return all(
        t.device.type != "cpu" and not t.is_sparse and t.numel() <= _ACCELERATOR_PIECE and t.is_contiguous()
        for t in tensors
    )


def _foreach_products(left: list[Tensor], right: list[Tensor], minus: list[Tensor] | None = None) -> Iterable[Tensor]:
    """`_products`, in a number of launches that hardly depends on the number of tensors."""
    left, right = ([t.float() if t.dtype in _HALF else t for t in side] for side in (left, right))
    products = torch._foreach_mul(left, right if minus is None else torch._foreach_sub(right, minus))
    # There is no foreach sum. Of the numbers above zero, and of the sizes of all, the 1-norm is one.
    above = torch._foreach_clamp_min(products, 0)
    sums = [torch.stack(torch._foreach_norm(side, 1)) for side in (above, products)]
    return (2 * sums[0] - sums[1]).unbind()


def _product(a: Tensor, b: Tensor, minus: Tensor | None = None) -> Tensor:
    """One of `_products`, whatever the tensors are."""
    if a.is_sparse:
        a = a.coalesce()
        rows, a = a.indices()[0], a.values()
        b, minus = b[rows], None if minus is None else minus[rows]
    pieces: list[tuple[Tensor, ...]] = [(a, b) if minus is None else (a, b, minus)]
    # Temporaries that fit into a CPU's cache cost next to nothing, fresh memory several times the arithmetic. BLAS
    # needs none for one precision's plain product.
    temporary = minus is not None or a.dtype in _HALF or not a.is_contiguous()
    size = _PIECE if a.device.type == "cpu" else _ACCELERATOR_PIECE
    if temporary and a.dim() and a.numel() > size:
        if all(t.is_contiguous() for t in pieces[0]):
            cut = [torch.split(t.view(-1), size) for t in pieces[0]]
        else:
            height = max(1, size * a.shape[0] // a.numel())
            cut = [torch.split(t, height) for t in pieces[0]]
        pieces = list(zip(*cut, strict=True))
    products = []
    for a, b, *rest in pieces:
        if a.dtype in _HALF:
            a, b, *rest = (t.float() for t in (a, b, *rest))
        if rest:
            b = b - rest[0]
        products.append(torch.dot(a.reshape(-1), b.reshape(-1)))
    return products[0] if len(products) == 1 else torch.stack(products).sum()


def _shares(tensors: list[Tensor], products: list[Tensor]) -> Tensor:
    """`products` as one vector, in which those of tensors that are sharded are summed over the shards.

    One collective for all tensors that are sharded alike.
    """
    alike: dict[Any, list[int]] = {}
    for i, tensor in enumerate(tensors):
        placed: Any = is_sharded(tensor) and (getattr(tensor, "device_mesh"), getattr(tensor, "placements"))  # noqa: B009
        alike.setdefault(placed, []).append(i)
    device = products[0].device
    ordered = list(range(len(tensors)))
    shares: dict[int, Tensor] = {}
    for placed, indices in alike.items():
        dtype = torch.promote_types(products[indices[0]].dtype, torch.float32)
        part = torch.stack([products[i].to(device=device, dtype=dtype) for i in indices])
        if placed:
            from torch.distributed.tensor import DTensor, Partial, Replicate

            mesh, placements = placed
            kinds = [Replicate() if p.is_replicate() else Partial() for p in placements]
            part = DTensor.from_local(part, mesh, kinds, run_check=False).full_tensor()
        if indices == ordered:
            return part
        shares.update(zip(indices, part.unbind(), strict=True))
    return torch.stack([shares[i] for i in ordered])


def is_sampled(tensor: Tensor) -> bool:
    """Whether of `tensor` every eighth row stands for all: of a large matrix.

    A layer's rows are units alike: the ratio of two slopes over an eighth of them is that over all of them, nearly.
    What is sharded is not cut, because another number of ranks, which cuts elsewhere, may go on from a checkpoint.
    """
    large = _LARGE if tensor.device.type == "cpu" else _ACCELERATOR_LARGE
    return tensor.dim() > 1 and tensor.shape[0] >= _MANY_ROWS and tensor.numel() >= large and not is_sharded(tensor)


def _sample(tensor: Tensor) -> Tensor:
    """Every eighth row; shares the tensor's memory, unless it is sparse."""
    if tensor.is_sparse:
        return tensor.index_select(0, torch.arange(0, tensor.shape[0], _EVERY, device=tensor.device))
    return tensor[::_EVERY]


class Snapshot:
    """The weights that a step started from, or a sample of them (`is_sampled`), kept for the next batch's gradient.

    Args:
        params: parameters that have a gradient.
        values: what is kept of their values when the step started, from a checkpoint; memory for it if not given.
    """

    @torch.no_grad()
    def __init__(self, params: list[Tensor], values: list[Tensor] | None = None):
        self.params = params
        if values is None:
            self._sampled = [is_sampled(p) for p in params]
            values = [torch.empty_like(rows) for rows in self._observed([p.detach() for p in params])]
        else:
            # On another kind of device they may have been cut where here they would not be.
            self._sampled = [v.shape != p.shape for v, p in zip(values, params, strict=True)]
        self.values = values

    def _observed(self, tensors: list[Tensor]) -> list[Tensor]:
        return [_sample(t) if cut else t for t, cut in zip(tensors, self._sampled, strict=True)]

    @torch.no_grad()
    def take(self) -> None:
        pairs = list(zip(local(self.values), local(self._observed([p.detach() for p in self.params])), strict=True))
        # With one sample among them, a foreach operation would be a loop over all.
        for whole in (True, False):
            if alike := [pair for pair in pairs if pair[1].is_contiguous() is whole]:
                torch._foreach_copy_([value for value, _ in alike], [weight for _, weight in alike])

    @torch.no_grad()
    def slopes(self) -> Tensor:
        """``<gradient, theta - values>`` of each parameter with gradients and weights as they are now, see `dot`.

        1-dim, equal on all ranks that hold equal values; 0 for a parameter whose gradient is missing.
        """
        weights = [p.detach() for p in self.params]
        gradients = [
            p.grad.detach() if p.grad is not None else torch.zeros_like(w)
            for p, w in zip(self.params, weights, strict=True)
        ]
        gradients, weights = self._observed(gradients), self._observed(weights)
        return _shares(gradients, _products(local(gradients), local(weights), local(self.values)))
