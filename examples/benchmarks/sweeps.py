"""Runs grouped by task and setting; the best rate of AdamW's sweep there, and how other methods do beside it."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import tasks
from methods import parse_method, rate_of, swept
from results import IDENTITY, Run, mean

#: What tells one setting of a task from another.
SETTING = (*(key for key in IDENTITY if key not in ("task", "method", "seed")), "accelerator")
#: Above this ratio a run counts as one that falls behind.
BEHIND = 1.10


@dataclass(frozen=True)
class Beside:
    """A method beside the best rate of AdamW's sweep, on the seeds that both have.

    Attributes:
        ratios: loss over that of the best rate, seed by seed; infinite where a run diverged.
        metric: mean difference of the task's metric; `None` where there is none.
    """

    ratios: tuple[float, ...]
    metric: float | None

    @property
    def typical(self) -> float:
        return geometric_mean(self.ratios)

    @property
    def behind(self) -> int:
        return sum(ratio > BEHIND for ratio in self.ratios)


def geometric_mean(ratios: Iterable[float]) -> float:
    return math.exp(mean(math.log(ratio) for ratio in ratios))


class Table:
    """The runs of one task in one setting, by method and seed."""

    def __init__(self, task: str, setting: tuple, runs: list[Run]):
        self.task, self.setting = tasks.of(task), dict(zip(SETTING, setting, strict=True))
        self.methods: dict[str, dict[int, Run]] = defaultdict(dict)
        for run in runs:
            self.methods[run["method"]][run["seed"]] = run

    def loss(self, method: str, seeds: Iterable[int] | None = None) -> float:
        found = self.methods[method]
        return mean(found[seed]["eval_loss"] for seed in (found if seeds is None else seeds))

    def rates(self) -> list[str]:
        """AdamW's sweep, by rising rate."""
        return sorted((method for method in self.methods if swept(method)), key=rate_of)

    def best(self, seeds: set[int] | None = None) -> str | None:
        """The rate of the lowest mean loss among those with most seeds (of `seeds`).

        One with fewer seeds is the bar only where it is better on those.
        """
        seeds_of = {m: set(self.methods[m]) & (seeds or set(self.methods[m])) for m in self.rates()}
        found = [method for method, own in seeds_of.items() if own]
        if not found:
            return None
        most = max(len(seeds_of[method]) for method in found)
        best = min((m for m in found if len(seeds_of[m]) == most), key=lambda m: self.loss(m, seeds_of[m]))
        for method in found:
            shared = seeds_of[method] & seeds_of[best]
            if len(seeds_of[method]) < most and shared and self.loss(method, shared) < self.loss(best, shared):
                best = method
        return best

    def bracketed(self) -> bool:
        """Whether the best rate has a lower and a higher neighbour, with a warm-up as it or without."""
        best = self.best()
        if best is None:
            return False
        alike = [method for method in self.rates() if parse_method(method).warmup == parse_method(best).warmup]
        return best not in (alike[0], alike[-1])

    def metric(self, run: Run) -> float | None:
        """The task's own metric of a run; older runs have only one."""
        name = self.task.metric
        found = run["metrics"].get(name, run["metric"] if name == "accuracy" else None) if name else None
        # A constant prediction has no correlation with anything.
        return 0.0 if found is not None and math.isnan(found) else found

    def seeds_beside(self, method: str) -> set[int]:
        """Seeds that a method has in common with the best rate."""
        return set(self.methods.get(method, {})) & set(self.methods.get(self.best() or "", {}))

    def beside(self, method: str, among: set[int] | None = None) -> Beside | None:
        """`method` beside the best rate, on their common seeds (`among` those)."""
        best = self.best()
        shared = self.seeds_beside(method)
        seeds = sorted(shared if among is None else shared & among)
        if best is None or not seeds:
            return None
        own, bar = self.methods[method], self.methods[best]
        ratios = tuple(_ratio(own[seed]["eval_loss"], bar[seed]["eval_loss"]) for seed in seeds)
        pairs = [(self.metric(own[seed]), self.metric(bar[seed])) for seed in seeds]
        known = [a - b for a, b in pairs if a is not None and b is not None]
        return Beside(ratios, statistics.fmean(known) if len(known) == len(seeds) else None)

    @property
    def length(self) -> int:
        return self.setting["max_steps"]

    @property
    def varied(self) -> bool:
        """Whether more differs from the task's default than the length of the run and what goes with it."""
        usual = {**{key: IDENTITY.get(key) for key in SETTING}, "accelerator": ""}
        fixed = [key for key in SETTING if key not in tasks.SETTING]
        fixed += list(tasks.SETTING) if self.length == self.task.setting["max_steps"] else []
        return any(self.setting[key] != {**usual, **self.task.setting}[key] for key in fixed)

    def title(self) -> str:
        """Its setting in words, the task first."""
        own = self.setting
        parts = [f"{self.length} steps", f"batch {own['batch_size']}"]
        parts += [f"{own['max_length']} tokens"] if own["max_length"] else []
        parts += [f"{own['schedule']} schedule"] if own["schedule"] != IDENTITY["schedule"] else []
        parts += ["unclipped"] if not own["max_grad_norm"] else []
        parts += ["grouped by length"] if own["group_by_length"] else []
        parts += ["bf16 autocast"] if own["bf16"] else []
        parts += [str(own[key]) for key in ("model", "accelerator") if own[key]]
        return f"{self.task.name}: " + ", ".join(parts)


def _ratio(own: float, bar: float) -> float:
    return own / bar if math.isfinite(own) else math.inf


def tables_of(runs: Iterable[Run]) -> list[Table]:
    """One for each task and setting: registered tasks first, kind by kind, shorter runs before longer ones."""
    found: dict[tuple, list[Run]] = defaultdict(list)
    for run in runs:
        whole = {**run, "accelerator": "" if "threads" in run["machine"] else run["machine"]}
        found[run["task"], tuple(whole[key] for key in SETTING)].append(run)
    tables = [Table(*key, group) for key, group in found.items()]
    place = tasks.ORDER
    return sorted(tables, key=lambda t: (place.get(t.task.name, len(place)), t.task.name, t.varied, t.length))


def main_tables(tables: Sequence[Table]) -> list[Table]:
    """Of each task its default setting, or else the one in which most methods ran."""

    def rank(table: Table) -> tuple[bool, bool, int]:
        default = all(table.setting[key] == value for key, value in table.task.setting.items())
        return default and not table.varied, not table.varied, len(table.methods)

    groups: dict[str, list[Table]] = defaultdict(list)
    for table in tables:
        groups[table.task.name].append(table)
    return [max(group, key=rank) for group in groups.values()]
