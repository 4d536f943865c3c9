"""What a Trainer says and logs of LQA: before training, beside the loss, and after training."""

from __future__ import annotations

import time
from typing import Any

from transformers import TrainerCallback

from .optimizer import LQA
from .options import plain


def measurements(lqa: LQA) -> dict[str, float]:
    """What is logged beside the loss. Values of the last probe are left out until there is one, or where not finite."""
    found: dict[str, float | None] = {
        "lqa_step_size": lqa.step_size,
        "lqa_level": lqa.policy.step_size,  # before warm-up and schedule
        "lqa_end_slope": lqa.last_end_slope,
        "lqa_rejected": lqa.rejected,
        "lqa_skipped": lqa.counts["skipped"],
        "lqa_probe_forwards": lqa.counts["probe_forwards"],
    }
    if rates := lqa.relative_rates:
        found |= {"lqa_relative_rate_min": min(rates), "lqa_relative_rate_max": max(rates)}
    if (probe := lqa.last_probe) is not None:
        found |= {
            "lqa_slope": probe.fit.slope,
            "lqa_curvature": probe.fit.curvature,
            "lqa_fit_step_size": probe.fit.step_size,  # left out where the fit was rejected
            "lqa_probe_radius": probe.radius,
            "lqa_probe_step": probe.step + 1,
            "lqa_loss_minus": probe.loss_minus,
            "lqa_loss_center": probe.loss_center,
            "lqa_loss_plus": probe.loss_plus,
        }
    return {k: v for k, v in found.items() if v is not None and v == v and abs(v) != float("inf")}


class Announcement(TrainerCallback):
    """Differs from a plain callback in that it says, before and after training, what LQA will do and has done."""

    def __init__(self, trainer: Any):
        self._trainer = trainer
        self._begun = 0.0
        self._rates: list[float] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begun, self._rates = time.perf_counter(), []
        lqa = self._trainer.lqa
        # What an interrupted step recorded, and auto_find_batch_size after a try that ran out of memory.
        self._trainer._lqa_probe = None
        if lqa is not None:
            lqa.arm(self._trainer._lqa_not_recorded if lqa.policy.step_size is None else None)
        if lqa is None or not state.is_world_process_zero:
            return
        schedule = plain(args.lr_scheduler_type)
        print(
            f"LQA: {type(lqa.base).__name__} direction, policy {lqa.policy.name}, {lqa.policy.cadence()};"
            f" --learning_rate ({args.learning_rate:g}) is not used, the {schedule} schedule multiplies the measured"
            " step size.",
            flush=True,
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if (lqa := self._trainer.lqa) is not None and lqa.step_size:
            self._rates.append(lqa.step_size)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        lqa = self._trainer.lqa
        if lqa is None or not state.is_world_process_zero or not self._rates:
            return
        share = lqa.probe_seconds / max(time.perf_counter() - self._begun, 1e-9)
        print(
            f"LQA: learning rates {min(self._rates):.2g} to {max(self._rates):.2g},"
            f" {lqa.counts['probe_forwards']} probe forwards ({share:.1%} of the time), {lqa.rejected} fits rejected,"
            f" {lqa.counts['skipped']} steps skipped.",
            flush=True,
        )
