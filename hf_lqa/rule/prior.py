"""What a model's shapes say before anything is measured: the base step size, its head, and its adapters."""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from .records import weights_of


@dataclass(frozen=True)
class PriorConfig:
    """The constants of `base_step_size` and `head_multipliers`.

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
    sizes = [n for n in _matrices(shapes) if n]
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


def head_multipliers(shapes: Sequence[tuple[int, ...]], adapted: Sequence[int], config: PriorConfig) -> list[float]:
    """What multiplies each tensor's step from the start: `head` for those of the head and for vectors, 1 for all else.

    The body ends with the last matrix of at least the median size, for which each counts as the root of its size. The
    matrices after it are the head, unless all of them are repeated: three of one shape are layers. Where there are
    adapters, it is what comes after the last of their wide matrices, is not repeated, and has no more rows than
    columns: a table of words has more. Where there is no head, vectors are not faster, either. Frozen tensors do not
    count.

    Args:
        adapted: what `adapters` finds.
    """
    taken = {*adapted}
    matrices = [(i, n) for i, n in enumerate(_matrices(shapes)) if n and i not in taken]
    alike = Counter(shapes[i] for i, _ in matrices)
    # Two may be alike by chance: a table of two types of tokens, and a head of two classes.
    single = {i for i, _ in matrices if alike[shapes[i]] <= 2}
    if adapted:
        body = max(i for i in adapted if shapes[i][0] < shapes[i][1])
        head = {i for i in single if i > body and shapes[i][0] <= shapes[i][1]}
    else:
        least = _median([n for _, n in matrices])
        body = max((i for i, n in matrices if n >= least), default=len(shapes))
        head = {i for i, _ in matrices if i > body}
    if not head & single:
        return [1.0] * len(shapes)
    return [config.head if i in head or len(shape) == 1 else 1.0 for i, shape in enumerate(shapes)]


def adapters(shapes: Sequence[tuple[int, ...]]) -> list[int]:
    """The places of adapters' matrices, as LoRA's are: a wide one and one that takes its result, three pairs of a rank.

    A wide one has fewer rows, its rank, than columns. What is left over is none: a head of as many classes. Nothing is,
    unless most matrices are: a whole model may have such pairs in its layers. An adapter's displacement slopes differ
    by chance, or by what does not help: multipliers that follow them end at a tenth more loss under a fresh head.
    """
    wide: dict[int, list[int]] = defaultdict(list)
    tall: dict[int, list[int]] = defaultdict(list)
    matrices = [i for i, n in enumerate(_matrices(shapes)) if n]
    for i in matrices:
        rows, columns = shapes[i]
        tall[columns].append(i)
        if rows < columns:
            wide[rows].append(i)
    found: list[int] = []
    for rank, places in wide.items():
        pairs = [(a, b) for a, b in zip(places, tall[rank], strict=False) if a < b]
        found += itertools.chain(*pairs) if len(pairs) > 2 else ()
    return sorted(found) if 2 * len(found) > len(matrices) else []


def _median(sizes: Sequence[int]) -> int:
    """The size that matrices of half of all roots have or exceed; 0 without any."""
    half = sum(weights_of(sizes)) / 2
    ordered = sorted(sizes, reverse=True)
    roots = itertools.accumulate(weights_of(ordered))
    # A tie is no matter of rounding.
    return next((n for n, root in zip(ordered, roots, strict=True) if root >= half * (1 - 1e-9)), 0)


def _matrices(shapes: Sequence[tuple[int, ...]]) -> list[int]:
    """Numbers of elements; 0 of what is no matrix."""
    return [math.prod(shape) * (len(shape) == 2) for shape in shapes]
