"""Checks of a step's gradients: whether they are finite, and what a loop did to them before the step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .gradients import GradientWatch, total


@dataclass(frozen=True)
class Checked:
    """What is known of a step's gradients.

    Attributes:
        finite: whether all of them are finite, and the norm that was told.
        clip: what clipping multiplied them by, if its norm was `told`.
        told: whether it was.
        change: above 0 if they were changed otherwise, see `GradientWatch.change`.
    """

    finite: bool
    clip: float
    told: bool
    change: float


class GradientChecks:
    """What a loop tells of clipping, and what is looked at if it does not.

    Args:
        params: an optimizer's.

    Attributes:
        watch: what gradients were at the end of the backward pass.
    """

    def __init__(self, params: list[Tensor]):
        self.watch = GradientWatch(params)
        self._told: tuple[Tensor | float, float, bool] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_told": None}

    def tell(self, grad_norm: Tensor | float, max_norm: float, whole: bool) -> None:
        """The gradients had the norm `grad_norm`, and were then clipped to `max_norm`.

        Args:
            whole: whether the norm is that of all gradients, which are then not looked at again.
        """
        self._told = grad_norm, max_norm, whole
        self.watch.stop()

    def pending(self, params: list[Tensor], probe: bool) -> list[Tensor | float]:
        """What `found` needs to know, to be read; `params` have gradients.

        Args:
            probe: whether it matters for a probe what was done to them.
        """
        norm = self._told[0] if self._told is not None else 0.0
        if self._told is not None and self._told[2]:
            return [norm]
        return [norm, self.watch.change if probe else 0.0, total(params)]

    def found(self, numbers: Sequence[float]) -> Checked:
        """`pending`, read."""
        clip = min(1.0, self._told[1] / (numbers[0] + 1e-6)) if self._told is not None else 1.0
        change = numbers[1] if len(numbers) > 1 else 0.0
        return Checked(all(map(math.isfinite, numbers)), clip, self._told is not None, change)

    def open(self, params: list[Tensor], probe: bool) -> None:
        """Begin anew before the next backward pass, after which a probe is due or not."""
        self._told = None
        self.watch.open(params, probe)
