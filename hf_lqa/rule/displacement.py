"""The rule for fine-tuning: what shapes say, corrected by the way that training has come."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from ..quadratic import Verdict
from .agreement import Agreement, averaged, moved
from .head import adapters, head_multipliers
from .multipliers import MultiplierConfig, Multipliers, rounded, slowed, updated
from .prior import PriorConfig, base_step_size
from .records import Measurement, Probe, require_interval


@dataclass(frozen=True)
class DisplacementConfig:
    """All constants of `Displacement`, each part's in its own record.

    Attributes:
        probe_interval: distance between probes, in steps; two in a run of 200.
        ramp: share of a run in which the base step size is reached, half of a usual warm-up.
        gain: how far the logarithm of the base step size moves where all signs agree; networks from scratch need it.
        window: measurements after which one counts ``1 / sqrt(2)`` as much as the first, and over which the decaying
            means of sign agreements and of squared displacement slopes reach.
    """

    prior: PriorConfig = field(default_factory=PriorConfig)
    multipliers: MultiplierConfig = field(default_factory=MultiplierConfig)
    probe_interval: int = 100
    ramp: float = 0.03
    gain: float = 4.0
    window: int = 4

    @property
    def memory(self) -> float:
        """Decay of the means, ``window / (window + 1)``: the last one counts as in a mean of ``window + 1``."""
        return self.window / (self.window + 1)


@dataclass
class Displacement:
    """Learns from later batches' gradients along all the way from the start, where `Paper` asks each batch's own loss.

    A batch's own parabola counts the batch's own noise as progress. So the base step size begins where the model's
    shapes say, but not where a step would change the first batch's loss by less than the share `tau`,

        base = max(P sum|d| / sum d², min(radius, minimiser)) / growth          P: see `base_step_size`

    with the direction's elements ``d``: ``sum d² / sum|d|`` is their size, to which those that hardly move add little.
    `growth` is that of later updates by momentum. A ramp leads to the base step size. Each measurement turns steps by
    per-tensor multipliers (`updated`). After the ramp it also moves the base step size by the sign agreement of late
    (`moved`): before, steps are short because the ramp makes them so. Number ``k`` of either, from 0, has the weight
    ``w = f / sqrt(k + window)`` where ramp and schedule multiply the step by ``f``.

    Adapters have a base step size ten times that of a whole model, and a head beside them is none: it is fast, but not
    so fast that a whole first step promises more than a loss above 0 can give (`observe_probe`).

    Probes every `probe_interval` steps are measurements, on which nothing depends. The first is what the base step size
    may grow by: it stays below the minimiser of that parabola, which knows its own batch alone and so lies too far
    ahead. Without a minimiser above the start, or without a first probe, it does not grow.

    As moves fade, so does the need to measure: where one counts ``1 / n`` of the first, they are ``n`` steps apart.

    Raises:
        ValueError: a constant is out of its range.
    """

    name: ClassVar[str] = "displacement"
    #: Whether it has no step sizes without losses at other weights.
    needs_replays: ClassVar[bool] = False
    #: Whether it ever wants a measurement, for which the first weights must be kept.
    measures: ClassVar[bool] = True

    config: DisplacementConfig = field(default_factory=DisplacementConfig)
    #: Before ramp, schedule and multipliers; `None` until the first step is measured.
    step_size: float | None = field(default=None, init=False)
    #: The largest that it may become.
    ceiling: float = field(default=0.0, init=False)
    #: `None`: not known.
    total_steps: int | None = field(default=None, init=False)
    #: What shapes say that a first step should move an element by.
    prior: float = field(default=0.0, init=False)
    #: How many times a first update the later ones become.
    growth: float = field(default=1.0, init=False)
    state: Multipliers = field(default_factory=Multipliers, init=False)
    #: Of signs, since the ramp.
    agreement: Agreement = field(default=Agreement(), init=False)
    sizes: tuple[int, ...] = field(default=(), init=False)
    # The multipliers that were applied last, and of which state they are.
    _applied: tuple[Multipliers | None, list[float]] = field(default=(None, []), init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        require_interval(self.config.probe_interval)

    def wants_probe(self, step: int) -> bool:
        """Whether step number `step` (from 0) should be probed. The same on all ranks, as all that a rule knows."""
        return self.step_size is None or step % self.config.probe_interval == 0

    def wants_measurement(self, step: int) -> bool:
        """Whether `observe` wants what step number `step` says of the way that training has come."""
        # Measurements window (n² - 1) to window ((n + 1)² - 1) are n steps apart: window n (2n + 1) steps of each n.
        distance, left = 1, step - 3 * self.config.window
        while left >= 0:
            distance += 1
            left -= self.config.window * distance * (2 * distance + 1)
        return step > 0 and step % distance == 0

    def factor(self, step: int) -> float:
        """What multiplies the base step size at step `step`, beside the schedule: the ramp."""
        steps = self.config.prior.unknown if self.total_steps is None else self.total_steps
        return min(1.0, (step + 1) / max(1, round(self.config.ramp * steps)))

    def multipliers(self, count: int) -> list[float]:
        """What multiplies the step of each of `count` tensors beside that; nothing where it is 1 for all."""
        # They change with measurements only, and are asked for at every step.
        state, found = self._applied
        if state is not self.state or len(found) != count:
            found = rounded(self.state, count, self.config.multipliers)
            self._applied = self.state, found
        return found if any(value != 1 for value in found) else []

    def begin(self, shapes: Sequence[tuple[int, ...]], sizes: Sequence[int], growth: float) -> None:
        """Take note of what is to be moved, before anything is measured.

        Args:
            shapes: of each tensor; ``()`` of one that is frozen, which has no part in the start.
            sizes: number of elements of each, also of the frozen: they may be trained later.
            growth: how many times a first update later ones become, as momentum builds up.
        """
        self.sizes, self.growth = tuple(sizes), growth
        prior = self.config.prior
        self.prior = base_step_size(shapes, self.total_steps, prior) / growth
        adapted = adapters(shapes)
        self.state = Multipliers.started(head_multipliers(shapes, adapted, prior.head), adapted)

    def start(self, begun: float) -> None:
        """Begin without a probe.

        Args:
            begun: `prior`, in units of the direction.
        """
        self.step_size = self.ceiling = begun

    def observe_probe(self, probe: Probe) -> None:
        """Take a probe's fit; after the first, `step_size` is there.

        Beside adapters, first multipliers are divided by ``begun growth / bound`` where that is more than 1, down to 1.
        """
        begun, fit = probe.begun, probe.fit
        known = math.isfinite(begun) and math.isfinite(probe.radius)
        if self.step_size is not None or fit.verdict is Verdict.NON_FINITE or not known:
            return
        radius, minimiser = probe.radius / self.growth, (fit.step_size or math.inf) / self.growth
        self.step_size = max(begun, min(radius, minimiser)) if probe.by_loss else begun
        self.ceiling = max(self.step_size, minimiser) if fit.step_size else self.step_size
        if self.state.still:
            self.state = slowed(self.state, begun * self.growth / probe.bound)

    def observe(self, measurement: Measurement) -> None:
        """Take what a step, `wants_measurement`, said of the way that training has come."""
        if self.step_size is None:
            return
        config = self.config
        if math.isfinite(measurement.agreement) and self.factor(measurement.step - 1) == 1:
            weight = self._weight(measurement.factor, self.agreement.count)
            self.agreement = averaged(self.agreement, measurement.agreement, config.memory)
            self.step_size = min(moved(self.step_size, self.agreement.mean, weight, config.gain), self.ceiling)
        weight = self._weight(measurement.factor, self.state.count)
        self.state = updated(self.state, measurement.slopes, self.sizes, weight, config.memory, config.multipliers)

    def _weight(self, factor: float, count: int) -> float:
        """Moves fade as evidence accumulates, and as the schedule shrinks the steps."""
        return min(factor, 1.0) / math.sqrt(count + self.config.window)

    def state_dict(self) -> dict[str, Any]:
        """What changes in training, in a form that JSON can hold."""
        kept = {"step_size": self.step_size, "ceiling": self.ceiling, "sizes": list(self.sizes)}
        return {**kept, "agreement": asdict(self.agreement), "multipliers": asdict(self.state)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step_size, self.ceiling, self.sizes = state["step_size"], state["ceiling"], tuple(state["sizes"])
        self.agreement = Agreement(**state["agreement"])
        kept = state["multipliers"]
        self.state = Multipliers(
            tuple(kept["first"]), tuple(kept["drift"]), tuple(kept["mean_squares"]), kept["count"], tuple(kept["still"])
        )
