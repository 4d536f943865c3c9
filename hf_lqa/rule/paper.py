"""The published rule (arXiv 2004.03260, Algorithm 1)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..quadratic import Verdict
from .prior import PriorConfig, base_step_size
from .records import Measurement, Probe, require_interval


@dataclass(frozen=True)
class PaperConfig:
    """What `Paper` has in place of constants.

    Attributes:
        probe_interval: distance between probes, in steps.
    """

    probe_interval: int = 1


@dataclass
class Paper:
    """At every step, the minimiser of this batch's parabola.

        step_size = -slope / curvature,     the last step size where the fit gave none

    Before any fit was usable the probe radius itself is the step size: along it the loss falls to first order by the
    share `tau`. See `Displacement` for what each method says.

    Raises:
        ValueError: a constant is out of its range.
    """

    name: ClassVar[str] = "paper"
    needs_replays: ClassVar[bool] = True
    measures: ClassVar[bool] = False

    config: PaperConfig = field(default_factory=PaperConfig)
    step_size: float | None = field(default=None, init=False)
    total_steps: int | None = field(default=None, init=False)
    prior: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        require_interval(self.config.probe_interval)

    def wants_probe(self, step: int) -> bool:
        return self.step_size is None or step % self.config.probe_interval == 0

    def wants_measurement(self, step: int) -> bool:
        return False

    def factor(self, step: int) -> float:
        return 1.0

    def multipliers(self, count: int) -> list[float]:
        return []

    def begin(self, shapes: Sequence[tuple[int, ...]], sizes: Sequence[int], growth: float) -> None:
        self.prior = base_step_size(shapes, self.total_steps, PriorConfig())

    def start(self, begun: float) -> None:
        raise NotImplementedError  # never asked for: who needs replays is refused without a closure

    def observe_probe(self, probe: Probe) -> None:
        verdict = probe.fit.verdict
        if probe.fit.step_size:
            self.step_size = probe.fit.step_size
        elif math.isfinite(probe.radius) and verdict is not Verdict.NON_FINITE:
            held = self.step_size is not None and (not probe.follows_step or verdict is Verdict.BELOW_NOISE)
            self.step_size = self.step_size if held else probe.radius

    def observe(self, measurement: Measurement) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {"step_size": self.step_size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step_size = state["step_size"]
