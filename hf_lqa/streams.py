"""Holders of state that moves on by itself: random number generators and iterators; and NumPy's arrays."""

from __future__ import annotations

import itertools
import operator
import pickle
import random
import sys
from dataclasses import dataclass
from types import GeneratorType
from typing import Any

import torch
from torch import Tensor

from .holders import ALIKE, Holder, same


@dataclass(frozen=True)
class RNGState:
    """The state of every random number generator that a forward pass may draw from: Python, NumPy, torch, devices."""

    python: Any
    numpy: Any
    cpu: Tensor
    devices: dict[torch.device, Tensor]

    @classmethod
    def capture(cls, devices: set[torch.device]) -> RNGState:
        """The present state; `devices` are those of the model, the CPU's is always included."""
        # NumPy is no dependency: where nobody has imported it, nobody draws from it.
        numpy = sys.modules.get("numpy")
        return cls(
            python=random.getstate(),
            numpy=numpy.random.get_state() if numpy is not None else None,
            cpu=torch.get_rng_state(),
            devices={d: getattr(torch, d.type).get_rng_state(d) for d in devices if d.type not in ("cpu", "meta")},
        )

    def apply(self) -> None:
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        for device, state in self.devices.items():
            getattr(torch, device.type).set_rng_state(state, device)


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
