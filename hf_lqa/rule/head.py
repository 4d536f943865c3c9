"""The kinds of weights that a model's shapes tell apart: layers, a head, adapters."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Sequence

from .prior import elements_of_matrices
from .records import weights_of


def head_multipliers(shapes: Sequence[tuple[int, ...]], adapted: Sequence[int], factor: float) -> list[float]:
    """What multiplies each tensor's step from the start: `factor` for those of the head and for vectors, 1 for others.

    - The body ends with the last matrix of at least the median size, for which each counts as the root of its size, or
      with the last whole layer, if that is later. What follows is the head, unless all of it is repeated: three of one
      shape are layers.
    - With adapters it is what comes after the last of their wide matrices, is not repeated, and has no more rows than
      columns: a table of words has more.
    - Some models have their head first. Then it is what comes before the words or the adapters, if all of that has
      biases, and no more rows than columns.

    Where there is no head, vectors are not faster, either. Frozen tensors do not count.

    Args:
        adapted: what `adapters` finds.
    """
    head = _head(shapes, adapted)
    return [factor if head and (i in head or len(shape) == 1) else 1.0 for i, shape in enumerate(shapes)]


def _head(shapes: Sequence[tuple[int, ...]], adapted: Sequence[int]) -> set[int]:
    """The places of the head's matrices, see `head_multipliers`."""
    taken = {*adapted}
    matrices = {i: n for i, n in enumerate(elements_of_matrices(shapes)) if n and i not in taken}
    alike = Counter(shapes[i] for i in matrices)
    # Two may be alike by chance: a table of two types of tokens, and a head of two classes.
    repeated = {i for i in matrices if alike[shapes[i]] > 2}
    flat = {i for i in matrices if shapes[i][0] <= shapes[i][1]}
    if adapted:
        body = [i for i in adapted if shapes[i][0] < shapes[i][1]]
        after = {i for i in flat - repeated if i > max(body)}
        may_lead = True
    else:
        places, least = [*matrices], _median([*matrices.values()])
        layers = [places[k] for k in _layers([shapes[i] for i in places])]
        body = [i for i, n in matrices.items() if n >= least] + layers
        after = {i for i in matrices if i > max(body)}
        may_lead = bool(layers) and min(body) not in flat
    if after - repeated:
        return after
    biases = {shape for shape in shapes if len(shape) == 1}
    before = {i for i in matrices if may_lead and i < min(body)}
    told = all(i in flat and shapes[i][:1] in biases for i in before)
    return before if before - repeated and told else set()


def _layers(shapes: Sequence[tuple[int, ...]]) -> range:
    """The places of whole layers: where one sequence of shapes follows itself, at least three times in all.

    That of most places, and of these the shortest one. A head may continue it, as a classifier's square matrix looks
    like a layer's first: what is left over at the end is none.
    """
    places: dict[tuple[int, ...], int] = {}
    lengths = set()
    for i, shape in enumerate(shapes):
        lengths.add(i - places.get(shape, i))
        places[shape] = i
    found = range(0)
    for length in sorted(lengths - {0}):
        begun = 0
        for i in range(length, len(shapes) + 1):
            if i == len(shapes) or shapes[i] != shapes[i - length]:
                whole = (i - begun) // length * length
                if whole >= max(3 * length, len(found) + 1):
                    found = range(begun, begun + whole)
                begun = i - length + 1
    return found


def adapters(shapes: Sequence[tuple[int, ...]]) -> list[int]:
    """The places of adapters' matrices, as LoRA's: a wide one and a tall one that takes its result, three of a rank.

    The rank is less than the columns of the one and the rows of the other. They stand side by side, unless groups of an
    optimizer part them. What is left over is none: a head of as many classes. Nothing is, unless three quarters of all
    matrices are: a whole model may have such pairs in its layers.

    An adapter's displacement slopes differ by chance, or by what does not help: multipliers that follow them end at a
    tenth more loss under a fresh head.
    """
    matrices = [i for i, n in enumerate(elements_of_matrices(shapes)) if n]
    wide: dict[int, list[int]] = defaultdict(list)
    tall: dict[int, list[int]] = defaultdict(list)
    beside: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for i, after in itertools.zip_longest(matrices, matrices[1:]):
        rows, columns = shapes[i]
        if rows < columns:
            wide[rows].append(i)
            if after is not None and shapes[after][0] > shapes[after][1] == rows:
                beside[rows].append((i, after))
        elif rows > columns:
            tall[columns].append(i)
    found: list[int] = []
    for rank, places in wide.items():
        pairs = [(a, b) for a, b in zip(places, tall[rank], strict=False) if a < b]
        if len(pairs) > 2:
            found += itertools.chain(*(beside[rank] if len(beside[rank]) >= len(pairs) else pairs))
    return sorted(found) if 4 * len(found) >= 3 * len(matrices) else []


def _median(sizes: Sequence[int]) -> int:
    """The size that matrices of half of all roots have or exceed; 0 without any."""
    half = sum(weights_of(sizes)) / 2
    ordered = sorted(sizes, reverse=True)
    roots = itertools.accumulate(weights_of(ordered))
    # A tie is no matter of rounding.
    return next((n for n, root in zip(ordered, roots, strict=True) if root >= half * (1 - 1e-9)), 0)
