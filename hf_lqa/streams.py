"""Holders of state that moves on by itself: random number generators and iterators; and NumPy's arrays."""

from __future__ import annotations

import itertools
import operator
import pickle
import random
import sys
from types import GeneratorType
from typing import Any

import torch
from torch import Tensor

from .holders import ALIKE, Holder, same


class Stream(Holder):
    """A random number generator: torch's, NumPy's or Python's."""

    def read(self) -> Any:
        owner = self.owner
        if isinstance(owner, torch.Generator):
            return owner.get_state()
        if isinstance(owner, random.Random):
            return owner.getstate()
        return owner.get_state() if hasattr(owner, "get_state") else _bit_generator(owner).state

    def back(self, before: Any, after: Any) -> Any:
        same = torch.equal(before, after) if isinstance(before, Tensor) else pickle.dumps(before) == pickle.dumps(after)
        return ALIKE if same else before

    def write(self, back: Any) -> None:
        owner = self.owner
        if isinstance(owner, torch.Generator):
            owner.set_state(back)
        elif isinstance(owner, random.Random):
            owner.setstate(back)
        elif hasattr(owner, "set_state"):
            owner.set_state(back)
        else:
            _bit_generator(owner).state = back


def _bit_generator(generator: Any) -> Any:
    return getattr(generator, "bit_generator", generator)


def is_stream(value: Any) -> bool:
    if isinstance(value, (torch.Generator, random.Random)):
        return not isinstance(value, random.SystemRandom)
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return False
    kinds = (numpy.random.Generator, numpy.random.RandomState, numpy.random.BitGenerator)
    return isinstance(value, kinds)


class Array(Holder):
    """A NumPy array."""

    def read(self) -> Any:
        return self.owner.copy()

    def back(self, before: Any, after: Any) -> Any:
        same = before.shape == after.shape and before.tobytes() == after.tobytes()
        return ALIKE if same else before

    def write(self, back: Any) -> None:
        if self.owner.shape != back.shape:
            self.owner.resize(back.shape, refcheck=False)
        self.owner[...] = back


class Position(Holder):
    """How far an iterator has come; nothing can put it back."""

    restorable = False

    def read(self) -> Any:
        return position(self.owner)

    def back(self, before: Any, after: Any) -> Any:
        return ALIKE if len(before) == len(after) and all(map(same, before, after)) else before


def position(iterator: Any) -> tuple[Any, ...] | None:
    """Something that changes as `iterator` goes on; `None` if it does not show it."""
    if isinstance(iterator, GeneratorType):
        frame = iterator.gi_frame
        return () if frame is None else (frame.f_lasti, *frame.f_locals.values())
    if isinstance(iterator, itertools.count):
        return (repr(iterator),)
    if hasattr(iterator, "_num_yielded"):  # a DataLoader's
        return (iterator._num_yielded,)
    hint = operator.length_hint(iterator, -1)
    return None if hint < 0 else (hint,)
