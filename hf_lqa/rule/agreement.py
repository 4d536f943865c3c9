"""The base step size, moved by the sign agreement of gradients with the way that training has come."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class AgreementConfig:
    """The constants of `moved`.

    Attributes:
        gain: how far the logarithm moves where all signs say that the weights should go on.
        back: the share of it where they say that the weights have gone too far: they come back by steps, too, and
            shorter ones take longer.
    """

    gain: float = 4.0
    back: float = 0.5


def moved(step_size: float, agreement: float, weight: float, config: AgreementConfig) -> float:
    """The base step size after a measurement.

        base *= exp(-gain w a),      half as far for a > 0

    with the sign agreement ``a``, in [-1, 1]. At the best fixed rate it is about 0. In fine-tuning, where most of a
    batch's gradient is noise, it is a few hundredths at any rate, and the base step size stays; in a network from
    scratch it is -0.1 to -0.4 as long as steps are too short. Each element counts alike, however steep it is.

    Args:
        weight: how much the measurement counts, ``w``, ``>= 0``.
    """
    if not math.isfinite(agreement):
        return step_size
    share = config.gain if agreement < 0 else config.gain * config.back
    found = step_size * math.exp(-share * weight * agreement)
    return found if 0 < found < math.inf else step_size
