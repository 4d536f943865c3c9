"""The base step size, moved by how gradients agree in sign with the way that training has come."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Agreement:
    """What is known of the sign agreement.

    Attributes:
        mean: the decaying mean.
        count: measurements in it.
    """

    mean: float = 0.0
    count: int = 0


def averaged(state: Agreement, agreement: float, memory: float) -> Agreement:
    """The decaying mean of sign agreements after one more: ``memory mean + (1 - memory) a``, from 0.

    It is not corrected for that start: the first ones are of few steps, and would count many times.
    """
    return Agreement(memory * state.mean + (1 - memory) * agreement, state.count + 1)


def moved(step_size: float, mean: float, weight: float, gain: float) -> float:
    """The base step size after a measurement.

        base *= exp(-gain w a)

    with the decaying mean ``a`` of sign agreements, in [-1, 1]. At the best fixed rate it is about 0. In fine-tuning,
    where most of a batch's gradient is noise, it is a few hundredths at any rate, and the base step size stays; in a
    network from scratch it is -0.1 to -0.4 as long as steps are too short. Each element counts alike, however steep it
    is.

    Args:
        weight: how much the measurement counts, ``w``, ``>= 0``.
        gain: how far the logarithm moves where all signs agree.
    """
    found = step_size * math.exp(-gain * weight * mean)
    return found if 0 < found < math.inf else step_size
