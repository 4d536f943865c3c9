"""Tensors as holders of state: their elements, and the memory that these are in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .holders import Holder
from .slopes import local_part

#: Up to so many elements a tensor is compared whole, beyond by so many places along each dimension.
_COMPARED_WHOLE, _PLACES = 4096, 8


@dataclass(frozen=True)
class Value:
    """A reading of a tensor.

    Attributes:
        memory: the tensor's own; `version`: how often it was written to in the ways that PyTorch counts.
        copy: of all of it, or of `sample` places.
    """

    memory: Tensor
    version: int
    copy: Tensor
    sample: bool


class Values(Holder):
    """A tensor: its elements, or the memory that they are in (``p.data = ...``).

    Args:
        kept: whether readings are whole; else some of the elements stand for all, and it is only compared.
        uncounted: whether it may be written to without its version going up: BatchNorm's kernels do that to buffers.
    """

    def __init__(self, path: str, owner: Tensor, kept: bool, uncounted: bool):
        super().__init__(path, owner)
        self.restorable, self.uncounted = kept, uncounted

    def read(self) -> Value:
        memory = local_part(self.owner).detach()
        chosen = memory if self.restorable else _sample(memory)
        return Value(memory, _version(self.owner), chosen.clone(), not self.restorable)

    def untouched(self, before: Value) -> bool:
        """Whether it certainly is as it was, by what can be told without waiting for a device."""
        now = local_part(self.owner).detach()
        if _moved(before.memory, now) or _version(self.owner) != before.version:
            return False
        if now.device.type == "cpu":
            return not differing([(before, now)])[0]
        return not self.uncounted

    def write(self, back: Value) -> None:
        tensor = local_part(self.owner)
        if _moved(back.memory, tensor.detach()):
            tensor.data = back.memory
        # Through `data`: who counts versions must not take this for a change.
        with torch.inference_mode(tensor.is_inference()), torch.no_grad():
            tensor.data.copy_(back.copy)


def differing(pairs: Sequence[tuple[Value, Tensor]]) -> list[bool]:
    """Whether the elements of tensors differ from readings; for all on one device together, which waits once."""
    found = [True] * len(pairs)
    open_places: dict[torch.device, list[tuple[int, Tensor]]] = {}
    for i, (before, now) in enumerate(pairs):
        now = _sample(now) if before.sample else now
        if now.shape != before.copy.shape or now.dtype != before.copy.dtype:
            continue
        same = (now == before.copy) | ((now != now) & (before.copy != before.copy))
        open_places.setdefault(now.device, []).append((i, same.all()))
    for together in open_places.values():
        flags = torch.stack([flag for _, flag in together]).tolist()
        for (i, _), flag in zip(together, flags, strict=True):
            found[i] = not flag
    return found


def _moved(memory: Tensor, now: Tensor) -> bool:
    return memory.data_ptr() != now.data_ptr() or memory.shape != now.shape


def _sample(memory: Tensor) -> Tensor:
    if memory.numel() <= _COMPARED_WHOLE:
        return memory
    return memory[tuple(slice(None, None, max(1, size // _PLACES)) for size in memory.shape)]


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
