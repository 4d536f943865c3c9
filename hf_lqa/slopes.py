"""Slopes along moves of the weights: products of gradients and moves, sharded or not; the weights before a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_HALF = (torch.float16, torch.bfloat16)
#: Elements of a temporary that a CPU's cache holds.
_PIECE = 2**17
#: One row of so many is observed where there are at least so many rows and elements.
_EVERY, _MANY_ROWS, _LARGE = 8, 64, 2**14


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
    return _shares(left, [_product(a, b) for a, b in zip(local(left), local(right), strict=True)]).sum()


def _product(a: Tensor, b: Tensor, minus: Tensor | None = None) -> Tensor:
    """``<a, b - minus>``, of tensors that are not sharded."""
    if a.is_sparse:
        a = a.coalesce()
        rows, a = a.indices()[0], a.values()
        b, minus = b[rows], None if minus is None else minus[rows]
    pieces: list[tuple[Tensor, ...]] = [(a, b) if minus is None else (a, b, minus)]
    # Temporaries that fit into a CPU's cache cost next to nothing, fresh memory several times the arithmetic. BLAS
    # needs none for one precision's plain product.
    temporary = minus is not None or a.dtype in _HALF or not a.is_contiguous()
    if temporary and a.device.type == "cpu" and a.dim():
        if all(t.is_contiguous() for t in pieces[0]):
            cut = [torch.split(t.view(-1), _PIECE) for t in pieces[0]]
        else:
            height = max(1, _PIECE * a.shape[0] // max(a.numel(), 1))
            cut = [torch.split(t, height) for t in pieces[0]]
        pieces = list(zip(*cut, strict=True))
    products = []
    for a, b, *rest in pieces:
        if rest:
            b = b - rest[0]
        if a.dtype in _HALF:
            a, b = a.float(), b.float()
        products.append(torch.dot(a.reshape(-1), b.reshape(-1)))
    return torch.stack(products).sum()


def _shares(tensors: list[Tensor], products: list[Tensor]) -> Tensor:
    """`products` as one vector, in which those of tensors that are sharded are summed over the shards.

    One collective for all tensors that are sharded alike.
    """
    alike: dict[Any, list[int]] = {}
    for i, tensor in enumerate(tensors):
        placed: Any = is_sharded(tensor) and (getattr(tensor, "device_mesh"), getattr(tensor, "placements"))  # noqa: B009
        alike.setdefault(placed, []).append(i)
    device = products[0].device
    shares: dict[int, Tensor] = {}
    for placed, indices in alike.items():
        dtype = torch.promote_types(products[indices[0]].dtype, torch.float32)
        part = torch.stack([products[i].to(device=device, dtype=dtype) for i in indices])
        if placed:
            from torch.distributed.tensor import DTensor, Partial, Replicate

            mesh, placements = placed
            kinds = [Replicate() if p.is_replicate() else Partial() for p in placements]
            part = DTensor.from_local(part, mesh, kinds, run_check=False).full_tensor()
        shares.update(zip(indices, part.unbind(), strict=True))
    return torch.stack([shares[i] for i in range(len(tensors))])


def sampled(tensor: Tensor) -> Tensor:
    """Every eighth row of a large matrix, and anything else whole; shares the tensor's memory, unless it is sparse.

    A layer's rows are units alike: the ratio of two slopes over an eighth of them is that over all of them, nearly.
    What is sharded is not cut, because another number of ranks, which cuts elsewhere, may go on from a checkpoint.
    """
    if tensor.dim() < 2 or tensor.shape[0] < _MANY_ROWS or tensor.numel() < _LARGE or is_sharded(tensor):
        return tensor
    if tensor.is_sparse:
        return tensor.index_select(0, torch.arange(0, tensor.shape[0], _EVERY, device=tensor.device))
    return tensor[::_EVERY]


class Snapshot:
    """The weights that a step started from, or a sample of them (`sampled`), kept for the next batch's gradient.

    Args:
        params: parameters that have a gradient.
        values: what is kept of their values when the step started, from a checkpoint; memory for it if not given.
    """

    @torch.no_grad()
    def __init__(self, params: list[Tensor], values: list[Tensor] | None = None):
        self.params = params
        self.values = [torch.empty_like(row) for row in self._weights()] if values is None else values

    def _weights(self) -> list[Tensor]:
        return [sampled(p.detach()) for p in self.params]

    @torch.no_grad()
    def take(self) -> None:
        torch._foreach_copy_(local(self.values), local(self._weights()))

    @torch.no_grad()
    def slopes(self) -> Tensor:
        """``<gradient, theta - values>`` of each parameter with gradients and weights as they are now, see `dot`.

        1-dim, equal on all ranks that hold equal values; 0 for a parameter whose gradient is missing.
        """
        weights = self._weights()
        gradients = [
            sampled(p.grad.detach()) if p.grad is not None else torch.zeros_like(w)
            for p, w in zip(self.params, weights, strict=True)
        ]
        parts = zip(local(gradients), local(weights), local(self.values), strict=True)
        return _shares(gradients, [_product(*part) for part in parts])
