"""The file of results: one short row a finished run, what tells one run from another, and who makes which.

A row leaves out what has its default (`DEFAULTS`), keeps six digits, and keeps curves only where a figure draws them.
`read` gives whole rows again. Rows that were written with all curves are read, too, and come out as short.
"""

from __future__ import annotations

import json
import math
import statistics
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tasks
from methods import swept

Run = dict[str, Any]

#: What tells one run from another, and its value where a row does not say. Rows that are in the file hang on these
#: values: a new key may be added with what runs had before there was one, none may be changed.
IDENTITY: dict[str, Any] = {
    "task": None,
    "method": None,
    "seed": None,
    "max_steps": None,
    "batch_size": None,
    "max_length": None,
    "schedule": "linear",
    "max_eval_samples": None,
    "max_grad_norm": 1.0,
    "group_by_length": False,
    "bf16": False,
    "model": None,
}
#: The same of what came out. `steps` are those that were made, `metric` is minus the loss where there is no other.
DEFAULTS: dict[str, Any] = {
    **IDENTITY,
    "metrics": {},
    "trivial_metric": None,
    "probe_forwards": 0,
    "rejected": 0,
    "skipped": 0,
    "error": None,
    "torch": "2.13.0+cpu",
    "transformers": "5.24.0",
    "machine": "x86_64, 1 threads",
}
#: What keeps four digits instead of six.
ROUGH = ("curves", "highest_rate", "late_rate", "last_train_loss", "early_train_loss", "train_seconds")
#: Points that are kept of a curve.
POINTS = 50
#: Over how many steps a training loss is averaged, here and in figures.
WIDTH = 10
#: Steps after which the paper's tasks keep their training loss: its claim is the greatest reduction per step.
EARLY = (10, 50)
#: Methods that figures draw beside `lqa` and the best rate of a sweep.
BESIDE = ("prodigy", "salsa", "adamw", "lqa_paper")
#: Seeds of which figures draw curves.
DRAWN_SEEDS = (0, 1, 2)


def mean(values: Iterable[float]) -> float:
    """Infinite where one of them is not finite."""
    return statistics.fmean(v if math.isfinite(v) else math.inf for v in values)


def trailing(values: Sequence[float], step: int) -> float:
    """The mean of the last `WIDTH` values at `step`, counted from 1."""
    return mean(values[max(0, step - WIDTH) : step])


def points(steps: int) -> list[int]:
    """The steps, counted from 1, at which a curve over `steps` steps is kept."""
    if steps <= POINTS:
        return list(range(1, steps + 1))
    return [1 + round(i * (steps - 1) / (POINTS - 1)) for i in range(POINTS)]


def of_paper(run: Run) -> bool:
    """One of the methods that the paper compares on its tasks."""
    reference = run["method"].startswith(("lqa_paper", "sgd@", "bb", "adamw@1e-3+constant"))
    return reference and tasks.of(run["task"]).kind == tasks.PAPER


def drawn(run: Run) -> set[str]:
    """Which curves of a run a figure needs: rates of `lqa`, training losses of what it is compared with."""
    task, method = tasks.of(run["task"]), run["method"]
    default = {**IDENTITY, **task.setting}
    if run["seed"] not in DRAWN_SEEDS or any(run[key] != default[key] for key in list(IDENTITY)[3:]):
        return set()
    if method == "lqa":
        return {"train_loss", "learning_rate"}
    beside = run["seed"] == DRAWN_SEEDS[0] and task.kind == tasks.ENCODER and (swept(method) or method in BESIDE)
    return {"train_loss"} if beside or of_paper(run) else set()


def short(run: Run) -> Run:
    """A run as it is written. Its `train_loss` and `learning_rate`, if it has them whole, become what tables need."""
    run = {**DEFAULTS, **run}
    losses, rates = run.pop("train_loss", None), run.pop("learning_rate", None)
    run.pop("forward_equivalents", None)
    if losses is not None:
        run |= _of_curves(run, losses, rates)
    if run.get("steps") == run["max_steps"]:
        run.pop("steps")
    if run.get("metric") == -run["eval_loss"]:
        run.pop("metric")
    row = {key: run[key] for key in [*IDENTITY, *(key for key in run if key not in IDENTITY)]}
    return {key: _rounded(value, key) for key, value in row.items() if key not in DEFAULTS or value != DEFAULTS[key]}


def _of_curves(run: Run, losses: list[float], rates: list[float]) -> Run:
    steps, found = len(losses), {"steps": len(losses)}
    if not steps:
        return found
    found["highest_rate"] = max((rate for rate in rates if math.isfinite(rate)), default=math.nan)
    found["last_train_loss"] = trailing(losses, steps)
    if run["method"].startswith("lqa"):
        # When four fifths of the run are over.
        found["late_rate"] = rates[steps * 4 // 5]
    if of_paper(run):
        found["early_train_loss"] = [trailing(losses, min(step, steps)) for step in EARLY]
    curves = {"train_loss": [trailing(losses, step) for step in points(steps)]}
    curves["learning_rate"] = [rates[step - 1] for step in points(steps)]
    if kept := {key: curves[key] for key in sorted(drawn(run))}:
        found["curves"] = kept
    return found


def _rounded(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        return {name: _rounded(inner, key) for name, inner in value.items()}
    if isinstance(value, list):
        return [_rounded(inner, key) for inner in value]
    digits = 4 if key in ROUGH else 6
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


def whole(row: Run) -> Run:
    """A run with all its keys, of a row in either form."""
    run = {**DEFAULTS, **(short(row) if "train_loss" in row else row)}
    run.setdefault("steps", run["max_steps"])
    run.setdefault("metric", -run["eval_loss"])
    run["forward_equivalents"] = 3 * run["steps"] + run["probe_forwards"]
    return run


def read(path: Path) -> list[Run]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [whole(json.loads(line)) for line in lines if line]


def write(path: Path, run: Run) -> None:
    """Append one run. A single short write, so that several processes may do it at once."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(short(run), separators=(",", ":")) + "\n")


def key(run: Run) -> str:
    """What tells a run from others, as text."""
    return json.dumps([run.get(name, default) for name, default in IDENTITY.items()])


def add(path: Path, other: Path) -> int:
    """Append the runs of another file that are not there yet; how many they were."""
    found = {key(run) for run in read(path)}
    before = len(found)
    for row in (json.loads(line) for line in other.read_text(encoding="utf-8").splitlines() if line):
        if key(row) not in found:
            found.add(key(row))
            write(path, row)
    return len(found) - before


def mine(run: Run, worker: int, workers: int) -> bool:
    """Whether a run falls to this one of several processes: the same one however often they are started."""
    return zlib.crc32(key(run).encode()) % workers == worker


def seconds(wanted: Run, runs: list[Run]) -> float | None:
    """How long a run should take, by those of its setting, else of its task, else of its kind; `None` if there is none.

    Of others than its setting the seconds are scaled by steps, rows of a batch and tokens.
    """

    def work(run: Run) -> float:
        return run["max_steps"] * run["batch_size"] * (run["max_length"] or 1)

    measured = [run for run in runs if "threads" in run["machine"] and run.get("seconds")]  # on CPUs
    task = tasks.of(wanted["task"])
    same = [run for run in measured if run["task"] == wanted["task"]]
    alike = [run for run in same if all(run[key] == wanted[key] for key in tasks.SETTING)]
    kind = [run for run in measured if tasks.of(run["task"]).kind == task.kind]
    for group in (alike, same, kind):
        if group:
            return work(wanted) * statistics.median(run["seconds"] / work(run) for run in group)
    return None
