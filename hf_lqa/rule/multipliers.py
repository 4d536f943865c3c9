"""Per-tensor multipliers: how much further than the base step size says one tensor moves, learned from its slopes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from .records import is_number, require, weights_of


@dataclass(frozen=True)
class MultiplierConfig:
    """The constants of `updated` and `rounded`.

    Attributes:
        eta: how far the logarithm of a multiplier moves for a slope of its usual size, in (0, 1].
        bound: the most that a multiplier may move away from where it began, as a factor. It is rounded to that factor,
            its root or 1, because each value that occurs is one more param group in the base optimizer.
    """

    eta: float = 0.3
    bound: float = 2.0

    def __post_init__(self) -> None:
        require(is_number(self.eta) and 0 < self.eta <= 1, "eta", self.eta, "must be in (0, 1]")


@dataclass(frozen=True)
class Multipliers:
    """The state of all tensors' multipliers.

    Attributes:
        first: what each was at the start.
        drift: logarithm of how far each has moved from there.
        mean_squares: decaying sum of each tensor's squared slopes.
        count: measurements so far.
        still: places of those that their own slopes do not move.
    """

    first: tuple[float, ...] = ()
    drift: tuple[float, ...] = ()
    mean_squares: tuple[float, ...] = ()
    count: int = 0
    still: tuple[int, ...] = ()

    @classmethod
    def started(cls, first: Sequence[float], still: Sequence[int] = ()) -> Multipliers:
        zeros = (0.0,) * len(first)
        return cls(tuple(first), zeros, zeros, still=tuple(still))


def slowed(state: Multipliers, excess: float) -> Multipliers:
    """With first multipliers divided by `excess` where that is more than 1; none becomes less than 1 by it."""
    if not 1 < excess < math.inf:
        return state
    return replace(state, first=tuple(max(min(first, 1.0), first / excess) for first in state.first))


def updated(
    state: Multipliers,
    slopes: Sequence[float | None],
    sizes: Sequence[int],
    weight: float,
    memory: float,
    config: MultiplierConfig,
) -> Multipliers:
    """The multipliers after a measurement.

        drift_i -= eta w z_i,        z_i = s_i / rms(s_i)

    with the displacement slope ``s_i`` of tensor ``i`` and the root ``rms`` of its decaying, bias-corrected mean
    square, of which it is a part itself: ``z_i² <= 1 / (1 - memory)``. For those that are `still`, ``z_i = 0``. Then
    their mean square, weighted by the root of each tensor's size, is set to 1: multipliers turn a step, and leave its
    length to the base step size. A tensor that never had a slope has the drift of the one before it.

    Args:
        slopes: displacement slopes in units of the loss, `None` where unknown; those of more tensors than the state
            has are left out.
        sizes: number of elements of each tensor.
        weight: how much the measurement counts, ``w``, ``>= 0``.
        memory: decay of the mean squares.
    """
    bias, still = 1 - memory ** (state.count + 1), {*state.still}
    drift, squares = list(state.drift), list(state.mean_squares)
    for i, slope in enumerate(slopes[: len(drift)]):
        if slope is None or not slope * slope < math.inf:
            continue
        square = memory * squares[i] + (1 - memory) * slope * slope
        if slope and square > 0:
            squares[i] = square
            drift[i] -= 0.0 if i in still else config.eta * weight * slope / math.sqrt(square / bias)
    measured = [i for i, square in enumerate(squares) if square]
    if measured:
        weights = weights_of([sizes[i] for i in measured])
        mean = sum(w * math.exp(2 * drift[i]) for i, w in zip(measured, weights, strict=True)) / sum(weights)
        bound = math.log(config.bound)
        for i in measured:
            drift[i] = min(max(drift[i] - math.log(mean) / 2, -bound), bound)
        last = drift[measured[0]]
        for i, square in enumerate(squares):
            last = drift[i] = drift[i] if square else last
    return replace(state, drift=tuple(drift), mean_squares=tuple(squares), count=state.count + 1)


def rounded(state: Multipliers, count: int, config: MultiplierConfig) -> list[float]:
    """The multipliers of `count` tensors as they are applied; 1 for those that are not in the state."""
    half = math.log(config.bound) / 2
    # A head's and a body's agree to the last bit, where `head` is a power of `bound`: each value is a param group.
    found = [
        first * config.bound ** (round(drift / half) / 2) if half else first
        for first, drift in zip(state.first, state.drift, strict=True)
    ]
    return found[:count] + [1.0] * (count - len(found))
