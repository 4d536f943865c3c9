"""Notices when the gradient of a step is not that of the losses which a probe of it could compute again.

A Trainer's ``training_step`` may do more than compute a loss and back-propagate it: perturb the weights between two
losses, back-propagate something else by hand, or change the gradients. None of this shows in what was recorded.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .slopes import local_part

#: Integers of the size of an element, whose sums wrap around: exact, and the same in any order.
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _checksum(tensor: Tensor) -> Tensor:
    """The sum of the tensor's bits, element by element."""
    values = local_part(tensor.detach())
    if type(values) is not Tensor:  # quantized and other kinds, whose bits are laid out in ways of their own
        return torch.zeros((), dtype=torch.int64)
    if values.is_sparse:
        values = values.coalesce().values()
    if values.is_complex():
        values = torch.view_as_real(values)
    bits = values.view(_BITS[values.element_size()])
    # In their own type: a wider one would be converted to, at twenty times the price.
    return bits.sum(dtype=bits.dtype).to(torch.int64)


def _checksums(tensors: Sequence[Tensor | None]) -> Tensor:
    """One number per tensor, 0 for one that is missing, together on one device."""
    sums = [_checksum(t) if t is not None else torch.zeros((), dtype=torch.int64) for t in tensors]
    device = next((t.device for t in tensors if t is not None), torch.device("cpu"))
    return torch.stack([s.to(device) for s in sums])


class Fingerprint:
    """What tensors were, to tell later whether that has changed.

    Args:
        tensors: the tensors; `None` where there is none yet.
        thorough: by what they hold, which costs reading it. Otherwise by which they are and how often they were written
            to, which does not show what was written through ``tensor.data``.
    """

    def __init__(self, tensors: Sequence[Tensor | None], thorough: bool):
        self._tensors = tensors
        self._versions = [t._version if t is not None else 0 for t in tensors]
        self._sums = _checksums(tensors) if thorough else None

    def matches(self, tensors: Sequence[Tensor | None]) -> bool:
        if self._sums is not None:
            return torch.equal(self._sums, _checksums(tensors))
        same = all(a is b for a, b in zip(self._tensors, tensors, strict=True))
        return same and self._versions == [t._version if t is not None else 0 for t in tensors]


class Watch:
    """Follows one micro-batch: weights stay where its first loss was computed, gradients come from `backward` alone.

    Args:
        params: the parameters that the optimizer moves.
        thorough: compare also what gradients hold, and weights at the end, see `Fingerprint`.
    """

    def __init__(self, params: Sequence[Tensor], thorough: bool):
        self._params, self._thorough = params, thorough
        self._weights: Fingerprint | None = None
        self._gradients = self._present()
        self.weights_changed = self.gradients_changed = False

    def _present(self) -> Fingerprint:
        return Fingerprint([p.grad for p in self._params], self._thorough)

    def before_loss(self) -> None:
        if self._weights is not None and not self._weights.matches(self._params):
            self.weights_changed = True

    def after_loss(self) -> None:
        # Only now: an embedding with ``max_norm`` rescales its weights in its forward, the second time to the same.
        if self._weights is None:
            self._weights = Fingerprint(self._params, thorough=True)

    def before_backward(self) -> None:
        if not self._gradients.matches([p.grad for p in self._params]):
            self.gradients_changed = True

    def after_backward(self) -> None:
        self._gradients = self._present()

    def end(self) -> None:
        self.before_backward()
        if self._thorough:
            self.before_loss()
