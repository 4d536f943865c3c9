"""How measurements become the step size. No torch: small records in and out, in `records`; rules by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .displacement import Displacement, DisplacementConfig
from .paper import Paper, PaperConfig
from .radius import RadiusConfig
from .records import Measurement

Rule = Displacement | Paper

_EVERY: dict[str, type] = {"tau": float, "probe_interval": int, "probe_radius": float}
#: The options of each rule and their types.
OPTIONS: dict[str, dict[str, type]] = {Displacement.name: {**_EVERY, "eta": float}, Paper.name: _EVERY}

__all__ = ["OPTIONS", "Displacement", "DisplacementConfig", "Measurement", "Paper", "Rule", "build"]


def build(name: str, options: dict[str, Any]) -> tuple[Rule, RadiusConfig]:
    """A rule and what its probes' radius follows.

    Args:
        name: ``"displacement"`` or ``"paper"``.
        options: any of `OPTIONS`. ``tau``: the probe radius is where the loss changes by this share to first order, in
            (0, 1). ``probe_interval``: probe every so many steps, ``>= 1``. ``probe_radius``: a fixed radius in units
            of the direction, ``> 0``, or `None`. ``eta``: gain of the per-tensor multipliers, in (0, 1].

    Raises:
        ValueError: the name or an option is unknown, or a value out of range.
    """
    if name not in OPTIONS:
        raise ValueError(f"rule={name!r}: must be one of {', '.join(sorted(OPTIONS))}")
    if unknown := sorted({*options} - {*OPTIONS[name]}):
        raise ValueError(
            f"{unknown[0]}={options[unknown[0]]!r}: the rule {name!r} has no such option; {', '.join(OPTIONS[name])}"
        )
    kept = dict(options)
    radius = RadiusConfig(tau=kept.pop("tau", RadiusConfig.tau), fixed=kept.pop("probe_radius", None))
    if name == Paper.name:
        return Paper(replace(PaperConfig(), **kept)), radius
    config = DisplacementConfig()
    turned = replace(config.multipliers, eta=kept.pop("eta", config.multipliers.eta))
    return Displacement(replace(config, multipliers=turned, **kept)), radius
