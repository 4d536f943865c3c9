"""The local quadratic approximation itself: floats in, a frozen record out.

Along a direction ``d`` the loss is a function of one number, ``phi(a) = L(theta + a d)``. It is approximated by

    phi(a) ~ loss_center + slope * a + curvature / 2 * a**2,        slope = phi'(0), curvature = phi''(0)

whose minimiser ``-slope / curvature`` is the step size, provided ``slope < 0 < curvature``. With ``d = -gradient``,
``slope = -a`` and ``curvature = 2 b`` this is equation (8) of Zhu et al., arXiv 2004.03260, in whose notation the
minimiser is ``a / 2b``.

Nothing here knows tensors, and nothing here raises on numerical trouble: trouble is a `Verdict`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum


class Verdict(str, Enum):
    """Why a fit did, or did not, give a step size.

    `ACCEPTED`: the parabola opens upwards and descends at the origin; its minimiser is the step size.
    `CLAMPED`: the same, but the minimiser lies beyond the largest step that the fit can be trusted for.
    `NON_DESCENT`: the loss does not fall along the direction (``slope >= 0``).
    `NON_CONVEX`: the loss falls, but the parabola has no minimum (``curvature <= 0``).
    `NON_FINITE`: a loss, a slope or a result is NaN or infinite.
    `BELOW_NOISE`: the differences between the losses are no larger than their rounding errors.
    `NOT_REPLAYABLE`: the loss could not be computed again at other weights; only its slope is known.
    """

    ACCEPTED = "accepted"
    CLAMPED = "clamped"
    NON_DESCENT = "non_descent"
    NON_CONVEX = "non_convex"
    NON_FINITE = "non_finite"
    BELOW_NOISE = "below_noise"
    NOT_REPLAYABLE = "not_replayable"

    __str__ = str.__str__

    @property
    def usable(self) -> bool:
        """Whether the fit came with a step size."""
        return self in (Verdict.ACCEPTED, Verdict.CLAMPED)


def rejected(counts: Mapping[str, int]) -> int:
    """How many of the fits that `counts` has by verdict gave no step size."""
    return sum(counts[verdict.value] for verdict in Verdict if not verdict.usable)


@dataclass(frozen=True)
class Fit:
    """One local quadratic approximation.

    Attributes:
        slope: ``phi'(0)``, loss per unit step; negative where the direction descends. NaN if not finite.
        curvature: ``phi''(0)``, loss per squared unit step. NaN if not finite.
        step_size: the minimiser, finite and ``>= 0``; `None` unless `verdict` is usable.
        verdict: why.
    """

    slope: float
    curvature: float
    step_size: float | None
    verdict: Verdict


def _minimiser(slope: float, curvature: float, max_step: float) -> Fit:
    if not (math.isfinite(slope) and math.isfinite(curvature)):
        return Fit(slope, curvature, None, Verdict.NON_FINITE)
    if slope >= 0:
        return Fit(slope, curvature, None, Verdict.NON_DESCENT)
    if curvature <= 0:
        return Fit(slope, curvature, None, Verdict.NON_CONVEX)
    step_size = -slope / curvature
    if step_size > max_step:
        return Fit(slope, curvature, max_step, Verdict.CLAMPED)
    if math.isinf(step_size):
        return Fit(slope, curvature, None, Verdict.NON_FINITE)
    return Fit(slope, curvature, step_size, Verdict.ACCEPTED)


def fit_losses(
    loss_minus: float,
    loss_center: float,
    loss_plus: float,
    radius: float,
    *,
    noise: float = 0.0,
    max_step: float = math.inf,
) -> Fit:
    """Fit the parabola through the losses at ``-radius``, ``0`` and ``+radius`` along the direction.

        slope     = (loss_plus - loss_minus) / (2 radius)
        curvature = (loss_plus - 2 loss_center + loss_minus) / radius**2

    Args:
        loss_minus, loss_center, loss_plus: the three losses; any float, NaN and infinities included.
        radius: the probe radius, in units of the direction; finite and ``> 0``.
        noise: rounding error of one loss, in units of the loss, ``>= 0``. The slope needs a difference
            ``|loss_plus - loss_minus|`` above ``2 noise``, the curvature a second difference above ``4 noise``
            (the sums of the absolute weights of the losses in each); otherwise the verdict is `BELOW_NOISE`.
        max_step: the largest step size that is returned, ``> 0``; a larger minimiser is `CLAMPED` to it.

    Raises:
        ValueError: `radius` or `max_step` is not positive, `radius` is not finite, or `noise` is negative or NaN.
    """
    if not (math.isfinite(radius) and radius > 0):
        raise ValueError(f"radius={radius!r}: the probe radius must be a finite number > 0")
    if not noise >= 0:
        raise ValueError(f"noise={noise!r}: the rounding error of a loss must be >= 0")
    if not max_step > 0:
        raise ValueError(f"max_step={max_step!r}: the largest step size must be > 0")
    if not all(map(math.isfinite, (loss_minus, loss_center, loss_plus))):
        return Fit(math.nan, math.nan, None, Verdict.NON_FINITE)
    # The differences are taken from the centre, so that a shift common to the three losses cancels first.
    ahead, behind = loss_plus - loss_center, loss_minus - loss_center
    # Divided one radius at a time: radius**2 would underflow to 0 for radii below 1e-162.
    slope = (ahead - behind) / 2 / radius
    curvature = (ahead + behind) / radius / radius
    fit = _minimiser(slope, curvature, max_step)
    if fit.verdict is Verdict.NON_FINITE:
        return fit
    if abs(ahead - behind) <= 2 * noise or abs(ahead + behind) <= 4 * noise:
        return Fit(slope, curvature, None, Verdict.BELOW_NOISE)
    return fit


#: A line that bends by more than so many times what it falls at first is not followed that far.
_BENT = 4.0


def is_beyond(loss_minus: float, loss_center: float, loss_plus: float, fall: float, noise: float = 0.0) -> bool:
    """Whether a probe went too far to say anything of its origin.

    With ``ahead = loss_plus - loss_center`` and ``behind = loss_minus - loss_center``, it did if a loss is not finite,

        ahead > 2 noise  and  behind > -ahead / 2,       the loss rises ahead, and not along a straight line, or
        abs(ahead + behind) / 2 > 4 fall + 2 noise,      the line bends far more than it falls.

    A nearly straight line that rises ahead is that of a value which is not what was differentiated: nearer would say
    the same.

    Args:
        loss_minus, loss_center, loss_plus: as in `fit_losses`; `loss_center` is finite.
        fall: what the loss falls by to first order, ``|slope| radius`` with the gradient's slope, ``>= 0``.
        noise: as in `fit_losses`.
    """
    ahead, behind = loss_plus - loss_center, loss_minus - loss_center
    if not (math.isfinite(ahead) and math.isfinite(behind)):
        return True
    rises = ahead > 2 * noise and behind > -ahead / 2
    return rises or abs(ahead + behind) / 2 > _BENT * fall + 2 * noise
