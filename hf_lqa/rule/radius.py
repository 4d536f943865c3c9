"""How far a probe goes: the radius, where the loss says none, and what fits say about the next."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ..quadratic import Fit, Verdict
from .records import is_number, require


@dataclass(frozen=True)
class RadiusConfig:
    """The constants of the probe radius.

    Attributes:
        tau: the share by which a radius changes the loss to first order, in (0, 1).
        fixed: a radius in units of the direction in place of that rule; `None` for the rule.
        tries: the most radii that a first probe tries, and the most times that it is taken.
    """

    tau: float = 0.03
    fixed: float | None = None
    tries: int = 6

    def __post_init__(self) -> None:
        require(is_number(self.tau) and 0 < self.tau < 1, "tau", self.tau, "must be in (0, 1)")
        require(
            self.fixed is None or (is_number(self.fixed) and math.isfinite(self.fixed) and self.fixed > 0),
            "probe_radius",
            self.fixed,
            "must be a finite number > 0, or None for the rule",
        )


@dataclass(frozen=True)
class Radius:
    """The state of the probe radius.

    Attributes:
        scale: its factor, at least 1.
        follows_step: whether the first loss was no scale; then radii follow the step size.
    """

    scale: float = 1.0
    follows_step: bool = False


def radius(config: RadiusConfig, state: Radius, loss: float, slope: float, step_size: float | None) -> float | None:
    """The probe radius in units of the direction: ``tau |loss| / |slope|``, or `step_size` where that is followed.

    `None` where there is none: no finite positive distance changes this loss by the share `tau`.

    Args:
        loss: the training loss.
        slope: ``<gradient, direction>``, in loss per unit step.
        step_size: what a probe should see where the loss is no scale; `None` before there is one.
    """
    if config.fixed is not None:
        return config.fixed
    if slope == 0 or not (math.isfinite(loss) and math.isfinite(slope)):
        return None
    follows = state.follows_step and step_size is not None
    found = (step_size or 0.0) if follows else config.tau * abs(loss) / abs(slope)
    found *= state.scale
    return found if math.isfinite(found) and found > 0 else None


def first_radius(config: RadiusConfig, loss: float, slope: float, prior: float) -> float | None:
    """The same for a first probe, which may not move the weights by nothing: `prior` where it would.

    Nothing is less than ``tau² prior``. In the benchmark's runs a first radius is more than a hundredth of `prior`.

    Args:
        prior: the base step size that shapes give, in units of the direction.
    """
    found = radius(config, Radius(), loss, slope, None)
    measurable = 0 < abs(slope) < math.inf and math.isfinite(loss) and 0 < prior < math.inf
    if config.fixed is None and measurable and (found or 0.0) < config.tau**2 * prior:
        return prior
    return found


def max_step(state: Radius, loss: float, slope: float, step_size: float | None) -> float:
    """The largest step size that a fit may give, ``2 |loss| / |slope|``, in units of the direction.

    There a parabola that stays positive must have turned: no loss that is bounded below by 0 has its minimum beyond.
    Twice the last step size where the first loss was no scale.
    """
    if state.follows_step and step_size is not None:
        return 2 * step_size
    bound = 2 * abs(loss) / abs(slope) if slope != 0 else math.inf
    return bound if bound > 0 else math.inf


def adapted(config: RadiusConfig, state: Radius, fit: Fit, by_loss: bool) -> Radius:
    """The state after a probe; it doubles where differences were below the noise, and comes back where fits are good.

    A radius never reaches where the loss would change by more than half to first order.

    Args:
        by_loss: whether the radius was the loss's; else a first probe had to look for another.
    """
    scale = state.scale
    if fit.verdict is Verdict.BELOW_NOISE:
        scale = 2 * scale if 2 * scale * config.tau <= 1 / 2 else scale
    elif fit.verdict.usable:
        scale = max(scale / 2, 1.0)
    elif fit.verdict is Verdict.NON_FINITE:
        scale = 1.0
    return replace(state, scale=scale, follows_step=state.follows_step or not by_loss)
