"""What a model's shapes say before anything is measured: the base step size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .records import weights_of


@dataclass(frozen=True)
class PriorConfig:
    """The constants of `base_step_size`, and of what `head_multipliers` finds.

    Attributes:
        length: root of the summed squares of what a step does to a typical matrix in a run of one step; 0.14 in one of
            100. In fine-tuning the best rates of sweeps of 100 steps give 0.075 to 0.23.
        decay: how the best rate falls with a run's length: by half from 100 to 1,000 steps.
        head: how much further a head and vectors move. A fresh head has more to learn than what is below it, and learns
            before the body has followed its noise.
        unknown: steps that a run is taken to have where nobody says.
    """

    length: float = 0.56
    decay: float = 0.3
    head: float = 8.0
    unknown: int = 1000


def typical_size(shapes: Sequence[tuple[int, ...]]) -> float:
    """The geometric mean of the matrices' numbers of elements, each weighted by its root; 0 without any element.

        m = exp(sum_i sqrt(n_i) log(n_i) / sum_i sqrt(n_i))

    Grows with the width of a model, and neither with its depth nor with its vocabulary. Without a matrix it is the
    number of all elements.

    Args:
        shapes: of each tensor that is trained; ``()`` of one that is frozen.
    """
    sizes = [n for n in elements_of_matrices(shapes) if n]
    sizes = sizes or [n for n in [sum(math.prod(shape) for shape in shapes if shape)] if n]
    weights = weights_of(sizes)
    return math.exp(sum(w * math.log(n) for w, n in zip(weights, sizes, strict=True)) / sum(weights)) if sizes else 0.0


def base_step_size(shapes: Sequence[tuple[int, ...]], total_steps: int | None, config: PriorConfig) -> float:
    """``length / sqrt(m) / total_steps**decay``: how far a step moves an element at the schedule's peak.

    For AdamW, whose first update is of size 1 in each element, this is a learning rate.

    Args:
        shapes: as for `typical_size`, ``m``.
        total_steps: how many steps training has, ``>= 1``; `None` where that is not known.
    """
    steps = config.unknown if total_steps is None else total_steps
    return config.length / math.sqrt(typical_size(shapes) or 1.0) / steps**config.decay


def elements_of_matrices(shapes: Sequence[tuple[int, ...]]) -> list[int]:
    """The number of elements of each tensor; 0 of what is no matrix."""
    return [math.prod(shape) * (len(shape) == 2) for shape in shapes]
