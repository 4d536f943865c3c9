"""What a run says of itself: the keys in its log lines, the two lines that it prints, and the way back from a log."""

from __future__ import annotations

import json
import math
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from .optimizer import LQA
from .quadratic import Fit, Verdict, rejected

#: Most keys of LQA in a line without a probe in which no count has changed.
_MOST = 3
_MULTIPLIERS = ("lqa_multiplier_min", "lqa_multiplier_max")
_VERDICT = "lqa_verdict_"


def counts(lqa: LQA) -> dict[str, float]:
    """What is counted from the first step on."""
    return {
        "lqa_probe_forwards": lqa.counts["probe_forwards"],
        "lqa_rejected": rejected(lqa.counts),
        "lqa_searched": lqa.counts["searched"],
        "lqa_skipped": lqa.counts["skipped"],
    }


def multipliers(lqa: LQA) -> dict[str, float]:
    """The least and the largest per-tensor multiplier of the step size, 1 where there are none."""
    found = lqa.multipliers or [1.0]
    return dict(zip(_MULTIPLIERS, (min(found), max(found)), strict=True))


def agreement(lqa: LQA) -> dict[str, float]:
    """The sign agreement that was measured last; nothing before any."""
    measured = lqa.last_measurement
    return {"lqa_sign_agreement": measured.agreement} if measured and math.isfinite(measured.agreement) else {}


def probe_measurements(lqa: LQA) -> dict[str, float]:
    """What the last probe measured, without what is not finite; nothing before the first.

    The verdict is a key of its own, ``lqa_verdict_accepted`` say, with the value 1: TensorBoard and MLflow take numbers
    only, and warn of a string in every line.
    """
    if (probe := lqa.last_probe) is None:
        return {}
    found = {
        "lqa_probe_step": probe.step + 1,
        _VERDICT + probe.fit.verdict.value: 1,
        "lqa_slope": probe.fit.slope,
        "lqa_curvature": probe.fit.curvature,
        "lqa_fit_step_size": probe.fit.step_size,
        "lqa_probe_radius": probe.radius,
        "lqa_loss_minus": probe.loss_minus,
        "lqa_loss_center": probe.loss_center,
        "lqa_loss_plus": probe.loss_plus,
    }
    return {key: value for key, value in found.items() if value is not None and math.isfinite(value)}


class LogLines:
    """Chooses what of LQA's measurements a log line has: nothing twice, and no more than a person reads.

    A line with a training loss has the base step size; per-tensor multipliers and the sign agreement where they differ
    from what was logged last; counts likewise; and all measurements of a probe that no line had yet. Of several probes
    between two lines that is the last. The line at the end of training has all counts.
    """

    def __init__(self) -> None:
        self._logged: dict[str, float] = {}

    def begin(self, lqa: LQA, state: Any) -> None:
        """Take note of what the log has already: to be called when training begins or goes on."""
        none = dict.fromkeys(counts(lqa), 0.0)
        self._logged = {**none, **dict.fromkeys(_MULTIPLIERS, 1.0)}
        if state.global_step == 0:  # what an optimizer measured in an earlier training is no news in this one
            found = {**counts(lqa), **probe_measurements(lqa), **agreement(lqa)}
            self._logged |= found
        for entry in state.log_history:
            self._logged.update((key, value) for key, value in entry.items() if key.startswith("lqa_"))

    def extend(self, logs: dict[str, float], lqa: LQA) -> None:
        """Add to `logs`, one line of a `Trainer`, what it should say of `lqa`."""
        if "train_runtime" in logs:
            logs.update(counts(lqa))
        if "loss" not in logs:
            return
        found: dict[str, float] = {}
        if lqa.base_step_size is not None:
            found["lqa_base_step_size"] = lqa.base_step_size
        found |= self._new(multipliers(lqa))
        if len(found) < _MOST:
            found |= self._new(agreement(lqa))
        found |= self._new(counts(lqa))
        probe = probe_measurements(lqa)
        if probe.get("lqa_probe_step") != self._logged.get("lqa_probe_step"):
            found |= probe
        self._logged |= found
        logs.update(found)

    def _new(self, found: dict[str, float]) -> dict[str, float]:
        return {key: value for key, value in found.items() if value != self._logged.get(key)}


class Announcement(TrainerCallback):
    """The two lines that a Trainer prints, before and after training: what LQA will do, and what it has done."""

    def __init__(self, trainer: Any):
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        lqa: LQA | None = self._trainer.lqa
        self._trainer._lqa_forget()
        self._least, self._most, self._saved = math.inf, 0.0, False
        if lqa is None:
            return
        self._trainer._lqa_lines.begin(lqa, state)
        self._begun, self._probed = time.perf_counter(), lqa.measurer.prober.seconds
        self._before = self._skipped = lqa.counts["skipped"]
        if state.is_world_process_zero:
            print(
                f"LQA: no --learning_rate is needed: {type(lqa.base).__name__}'s is measured while training, and"
                f" {self._schedule(args)} multiplies it. See learning_rate in the logs, and afterwards"
                f" {plot_command(args.output_dir)}",
                flush=True,
            )

    def _schedule(self, args: Any) -> str:
        if getattr(self._trainer, "_created_lr_scheduler", True):
            name = args.lr_scheduler_type
            return f"--lr_scheduler_type {getattr(name, 'value', name)}"
        return f"the {type(self._trainer.lr_scheduler).__name__} that was given"

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if (lqa := self._trainer.lqa) is None:
            return
        if lqa.step_size and lqa.counts["skipped"] == self._skipped:
            self._least, self._most = min(self._least, lqa.step_size), max(self._most, lqa.step_size)
        self._skipped = lqa.counts["skipped"]

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._saved = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        lqa: LQA | None = self._trainer.lqa
        if lqa is None or not state.is_world_process_zero:
            return
        share = (lqa.measurer.prober.seconds - self._probed) / max(time.perf_counter() - self._begun, 1e-9)
        rates = f"learning rates from {self._least:.2g} to {self._most:.2g}" if self._most else "no step was taken"
        skipped = lqa.counts["skipped"] - self._before
        without = f" {skipped} steps were skipped, whose gradients were not finite." if skipped else ""
        # A Trainer writes its log into checkpoints; what else lies there is read first, and may be of an earlier run.
        there = self._saved and not state.is_hyper_param_search
        saved = there and not (Path(args.output_dir) / "trainer_state.json").exists()
        print(
            f"LQA: {rates}; probes took {share:.1%} of the time.{without}"
            f" To see them{'' if saved else ', after trainer.save_state()'}: {plot_command(args.output_dir)}",
            flush=True,
        )


def plot_command(output_dir: str) -> str:
    """The command that draws the run in `output_dir`."""
    return f"python -m hf_lqa.plot {shlex.quote(str(output_dir))}"


def read_log(output_dir: str | Path) -> list[dict[str, Any]]:
    """The log of a run: ``trainer_state.json`` of the folder itself or of its last ``checkpoint-*``.

    Raises:
        ValueError: there is none, it cannot be read, or it has no training loss.
    """
    folder, name = Path(output_dir), f"OUTPUT_DIR={str(output_dir)!r}"
    if not folder.is_dir():
        raise ValueError(f"{name}: there is no such folder; give the --output_dir of a run")
    checkpoints = [p for p in folder.glob("checkpoint-*/trainer_state.json") if p.parent.name[11:].isdigit()]
    checkpoints.sort(key=lambda p: int(p.parent.name[11:]))
    path = next((p for p in (folder / "trainer_state.json", *reversed(checkpoints)) if p.is_file()), None)
    if path is None:
        raise ValueError(
            f"{name}: no trainer_state.json in it or in a checkpoint-*; give the --output_dir of a run, and call"
            " trainer.save_state() after training or save checkpoints"
        )
    try:
        log: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["log_history"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{name}: {path.relative_to(folder)} is not what a Trainer writes ({error!r}); without it, the last of the"
            " other checkpoints is read"
        ) from error
    if not any("loss" in entry for entry in log):
        raise ValueError(
            f"{name}: {path.relative_to(folder)} has no training loss; train with --logging_steps of no more than the"
            " run has steps"
        )
    return log


def probes(log: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The entries with a probe's measurements, each with its ``fit``.

    Raises:
        ValueError: the log is of a version of hf_lqa that did not log verdicts.
    """
    return [{**entry, "fit": _fit(entry)} for entry in log if "lqa_probe_step" in entry]


def _fit(entry: dict[str, Any]) -> Fit:
    verdict = next((verdict for verdict in Verdict if _VERDICT + verdict.value in entry), None)
    if verdict is None:
        raise ValueError(
            f"step {entry['step']} has a probe without a verdict: the run was logged by an older hf_lqa, of which only"
            " loss and learning rate can be drawn"
        )
    slope, curvature = (entry.get(key, math.nan) for key in ("lqa_slope", "lqa_curvature"))
    return Fit(slope, curvature, entry.get("lqa_fit_step_size"), verdict)
