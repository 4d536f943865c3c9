"""What passes between the optimizer and a rule. Without torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from ..quadratic import Fit


def require(condition: bool, name: str, value: object, allowed: str) -> None:
    """Raise a `ValueError` that names an argument, its value and what is allowed, unless `condition` holds."""
    if not condition:
        raise ValueError(f"{name}={value!r}: {allowed}")


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def require_interval(value: object) -> None:
    valid = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    require(valid, "probe_interval", value, "must be an integer >= 1")


def require_steps(total_steps: Any) -> None:
    integer = isinstance(total_steps, Integral) and not isinstance(total_steps, bool)
    require(integer and int(total_steps) >= 1, "total_steps", total_steps, "must be an integer >= 1")


@dataclass(frozen=True)
class Measurement:
    """What the gradient of a step says of the way that training has come, before the step is made.

    Attributes:
        slopes: of each tensor, the displacement slope ``<gradient, theta - theta_0>`` in units of the loss: its
            derivative by the logarithm of how far the tensor has come from ``theta_0``, the weights that training began
            with. Negative where the loss falls further that way; `None` where it was not measured.
        agreement: the sign agreement, the mean of ``sign(gradient) sign(theta - theta_0)`` over all elements that are
            observed, in [-1, 1]. Negative where most of them would go further the way they have come.
        factor: what multiplies the base step size in this step, ramp and schedule, ``>= 0``.
        step: number of the step, from 0.
    """

    slopes: Sequence[float | None]
    agreement: float
    factor: float
    step: int


@dataclass(frozen=True)
class Probe:
    """What a probe says to a rule. Distances are in units of the direction.

    Attributes:
        fit: the parabola.
        radius: of the probe; NaN where there was none, as where the gradient is 0.
        begun: the step size that shapes give; NaN after the first probe, and where it is not known.
        by_loss: whether the radius is what the loss's value says, and neither searched for nor given.
        follows_step: whether the loss is no scale.
        bound: beyond which a loss that stays above 0 cannot have its minimum, see `max_step`; infinite where it is no
            scale.
    """

    fit: Fit
    radius: float
    begun: float = math.nan
    by_loss: bool = True
    follows_step: bool = False
    bound: float = math.inf


def weights_of(sizes: Sequence[int]) -> list[float]:
    """How much each tensor counts: as a matrix's side, or the one table of word vectors would outvote all layers."""
    return [math.sqrt(size) for size in sizes]
