"""Slopes along moves of the weights: products of gradients and moves, sharded or not; the weights of the start."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .products import along_moves, on_accelerator, products
from .rule.records import Measurement

#: Types of most tensors: an attribute that is missing is looked for at length.
_PLAIN = (Tensor, torch.nn.Parameter)
#: One row of so many is observed where there are at least so many rows and elements. A CPU waits for memory; an
#: accelerator takes what lies in one piece together, and for small matrices its launches are dearer than their memory.
EVERY, MANY_ROWS, LARGE, ACCELERATOR_LARGE = 8, 64, 2**14, 2**20
#: So many parameters at most are observed on an accelerator, where each takes its time whatever its size.
_ACCELERATOR_MANY = 32


def full(scalar: Tensor) -> Tensor:
    """The value of a scalar that may be a partial sum over the shards of a `DTensor`."""
    full_tensor: Callable[[], Tensor] | None = getattr(scalar, "full_tensor", None)
    return full_tensor() if full_tensor is not None else scalar


def is_sharded(tensor: Tensor) -> bool:
    """Whether `tensor` is a `DTensor`, whose class is not there to be imported in every build of PyTorch."""
    return type(tensor) not in _PLAIN and hasattr(tensor, "full_tensor")


def local_part(tensor: Tensor) -> Tensor:
    """`tensor`, or this rank's shard of it, sharing its memory; to be called without gradient."""
    return getattr(tensor, "to_local")() if is_sharded(tensor) else tensor  # noqa: B009


def local(tensors: list[Tensor]) -> list[Tensor]:
    """`local_part` of each: `DTensor` knows few of the foreach operations."""
    return [local_part(t) for t in tensors]


def flat(values: Sequence[Tensor | float | list[float]], device: torch.device) -> Tensor:
    """Scalars and vectors, gathered where they are sharded, as one vector on `device` in the precision of sums."""
    # Floats go where the weights are: collectives of NCCL know no other place.
    dtype = torch.float32 if device.type == "mps" else torch.float64
    # An empty list has nothing to bring there, for which the host would wait.
    parts = [_vector(v, device).detach().to(dtype).reshape(-1) for v in values if not isinstance(v, list) or v]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _vector(value: Tensor | float | list[float], device: torch.device) -> Tensor:
    """`value` on `device`, gathered if it is sharded."""
    if isinstance(value, Tensor):
        return full(value).to(device)
    # Filled there, because a copy from the host would wait for the device.
    return torch.tensor(value, device=device) if isinstance(value, list) else torch.full((), value, device=device)


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
    return _shares(left, products(local(left), local(right))).sum()


def absolute(tensors: list[Tensor]) -> Tensor:
    """The sum of all tensors' elements without their signs, a 0-dim tensor in float32 or better, as `dot`."""
    sums = [torch.linalg.vector_norm(t, 1, dtype=torch.promote_types(t.dtype, torch.float32)) for t in local(tensors)]
    return _shares(tensors, torch.stack([each.to(sums[0].device, sums[0].dtype) for each in sums])).sum()


def _shares(tensors: list[Tensor], products: Tensor) -> Tensor:
    """`products`, in whose last dimension those of tensors that are sharded are summed over the shards.

    One collective for all tensors that are sharded alike.
    """
    alike: dict[Any, list[int]] = {}
    for i, tensor in enumerate(tensors):
        if is_sharded(tensor):
            placed: Any = getattr(tensor, "device_mesh"), getattr(tensor, "placements")  # noqa: B009
            alike.setdefault(placed, []).append(i)
    for (mesh, placements), indices in alike.items():
        from torch.distributed.tensor import DTensor, Partial, Replicate

        kinds = [Replicate() if p.is_replicate() else Partial() for p in placements]
        if len(indices) == len(tensors):
            return DTensor.from_local(products, mesh, kinds, run_check=False).full_tensor()
        parts = DTensor.from_local(products[..., indices], mesh, kinds, run_check=False)
        products[..., indices] = parts.full_tensor()
    return products


def observed(params: list[Tensor]) -> list[int]:
    """The places of those that are observed: on a CPU all; elsewhere matrices alone, of many some of all depths.

    What is sought is the median over parameters, in which vectors hardly count.
    """
    if not on_accelerator(params[0]):
        return list(range(len(params)))
    places = [i for i, p in enumerate(params) if p.dim() > 1] or list(range(len(params)))
    if len(places) <= _ACCELERATOR_MANY:
        return places
    distance = (len(places) - 1) / (_ACCELERATOR_MANY - 1)
    return [places[round(i * distance)] for i in range(_ACCELERATOR_MANY)]


def is_sampled(tensor: Tensor) -> bool:
    """Whether of `tensor` every eighth row stands for all: of a large matrix.

    A layer's rows are units alike: the ratio of two slopes over an eighth of them is that over all of them, nearly.
    What is sharded is not cut, because another number of ranks, which cuts elsewhere, may go on from a checkpoint.
    """
    large = ACCELERATOR_LARGE if on_accelerator(tensor) else LARGE
    return tensor.dim() > 1 and tensor.shape[0] >= MANY_ROWS and tensor.numel() >= large and not is_sharded(tensor)


def sample(tensor: Tensor) -> Tensor:
    """Every eighth row; shares the tensor's memory, unless it is sparse."""
    if tensor.is_sparse:
        return tensor.index_select(0, torch.arange(0, tensor.shape[0], EVERY, device=tensor.device))
    return tensor[::EVERY]


class Snapshot:
    """The weights that training began with, or a sample of them (`is_sampled`): what gradients say of the way since.

    Args:
        params: an optimizer's parameters.
        places: of those among them that are observed; each has a gradient.
        values: what is kept of their values, from a checkpoint; taken now if not given.
    """

    @torch.no_grad()
    def __init__(self, params: list[Tensor], places: list[int], values: list[Tensor] | None = None):
        self.params, self.places = [params[i] for i in places], places
        if values is None:
            self._sampled = [is_sampled(p) for p in self.params]
            values = [rows.detach().clone() for rows in self._observed(self.params)]
        else:
            # On another kind of device they may have been cut where here they would not be.
            self._sampled = [v.shape != p.shape for v, p in zip(values, self.params, strict=True)]
        self.values = values

    def _observed(self, tensors: list[Tensor]) -> list[Tensor]:
        return [sample(t) if cut else t for t, cut in zip(tensors, self._sampled, strict=True)]

    @torch.no_grad()
    def compare(self) -> tuple[Tensor, Tensor]:
        """Displacement slopes and the sign agreement, as gradients and weights are now.

        A slope is ``<gradient, theta - theta_0>`` of one parameter, in units of the loss; 0 where its gradient is
        missing. If the gradients were clipped, all are as much smaller. The sign agreement is the mean over all
        elements of ``sign(gradient) sign(theta - theta_0)``, in [-1, 1]: negative where the loss falls for most of them
        if they go on. Each counts alike, however steep it is.

        Returns:
            A 1-dim tensor of slopes and a 0-dim one, equal on all ranks that hold equal values, see `dot`.
        """
        gradients = self._observed([p.grad if p.grad is not None else torch.zeros_like(p) for p in self.params])
        found = along_moves(local(gradients), local(self._observed(self.params)), local(self.values))
        slopes, counts = _shares(gradients, found).unbind()
        return slopes, counts.sum() / sum(v.numel() for v in self.values)


class SlopeMeter:
    """Compares gradients with the way that training has come.

    Attributes:
        beginning: the weights that training began with; `None` before the first step that moves them.
    """

    def __init__(self) -> None:
        self.beginning: Snapshot | None = None

    @property
    def places(self) -> list[int]:
        """Of the parameters that are observed, among an optimizer's."""
        return self.beginning.places if self.beginning is not None else []

    def begin(self, params: list[Tensor], moved: list[Tensor]) -> None:
        """Keep the weights that training begins with.

        Args:
            params: an optimizer's.
            moved: those of them that the first step moves.
        """
        place = {p: i for i, p in enumerate(params)}
        self.beginning = Snapshot(params, [place[moved[i]] for i in observed(moved)])

    def pending(self, wanted: bool) -> list[Tensor]:
        """What `measurement` needs to know, to be read; nothing where it is not `wanted` or there was no step."""
        if not wanted or self.beginning is None:
            return []
        slopes, agreement = self.beginning.compare()
        return [agreement, slopes]

    def measurement(self, numbers: list[float], count: int, factor: float, step: int) -> Measurement | None:
        """`pending`, read, as a rule takes it; `None` where nothing was.

        Args:
            numbers: what was read.
            count: of the optimizer's parameters.
            factor: what multiplies the base step size in this step.
            step: its number, from 0.
        """
        if not numbers:
            return None
        at = dict(zip(self.places, numbers[1:], strict=True))
        return Measurement([at.get(i) for i in range(count)], numbers[0], factor, step)
