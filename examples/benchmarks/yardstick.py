"""The yardstick's tables: `lqa` and learning rates from shapes beside the best rate of AdamW's sweep.

Ratios are of validation losses, run by run on the same batches and seed. Search tasks and kept ones are apart, and so
are kinds of set-up and lengths of runs.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import tasks
from methods import alias, rate_of
from sweeps import BEHIND, Beside, Table, geometric_mean

METHODS = ("lqa", "formula_n", "formula_m", "formula_m_head8")
#: Steps up to which a run has a length, and its name.
LENGTHS = ((100, "up to 100"), (499, "101 to 499"), (math.inf, "500 and more"))
EDGE = " (not bracketed)"


def length_of(table: Table) -> str:
    return next(name for most, name in LENGTHS if table.length <= most)


def named(table: Table, method: str) -> str:
    """The yardstick's method as it is called there: in whatever schedule and with whatever warm-up it ran."""
    return min((name for name in table.methods if alias(name) == method), key=len, default=method)


def beside(table: Table, method: str) -> Beside | None:
    return table.beside(named(table, method))


def together(table: Table, methods: Sequence[str]) -> dict[str, Beside | None]:
    """Several methods on the seeds that all of them have."""
    seeds = set.intersection(*(table.seeds_beside(named(table, method)) for method in methods))
    return {method: table.beside(named(table, method), seeds) for method in methods}


def ratio(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else "diverged"


def _metric(value: float | None) -> str:
    return "" if value is None else f", {round(value, 3) + 0.0:+.3f}"  # no minus before zero


def cell(found: Beside | None) -> str:
    if found is None:
        return ""
    worst = ratio(max(found.ratios))
    return f"{ratio(found.typical)} / {worst}, {found.behind} of {len(found.ratios)}{_metric(found.metric)}"


def row(table: Table, title: str) -> str | None:
    """One setting; `None` where there is no sweep or none of the methods ran."""
    best = table.best()
    cells = [cell(beside(table, method)) for method in METHODS]
    if best is None or not any(cells):
        return None
    runs = table.methods[best].values()
    metrics = [value for run in runs if (value := table.metric(run)) is not None]
    bar = [f"{rate_of(best):.0e}{'' if table.bracketed() else EDGE}", f"{table.loss(best):.4f}"]
    bar += [f"{statistics.fmean(metrics):.3f}" if len(metrics) == len(runs) else ""]
    return "| " + " | ".join([title, *bar, *cells]) + " |"


HEAD = ["AdamW's best rate", "its loss", "its metric", *(f"`{method}`" for method in METHODS)]


def header(first: Sequence[str], columns: Sequence[str]) -> list[str]:
    names = [*first, *columns]
    return ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]


def settings(tables: Sequence[Table]) -> str:
    """One row a setting, by kind and length."""
    rows = []
    for table in sorted(tables, key=lambda t: (tasks.KINDS.index(t.task.kind), t.length)):
        own = table.title().partition(": ")[2]
        if found := row(table, f"{table.task.kind} | {table.task.name} | {own}"):
            rows.append(found)
    return "\n".join([*header(["kind", "task", "setting"], HEAD), *rows]) if rows else ""


def summary_cell(found: Sequence[Beside]) -> str:
    """Over settings: geometric mean, worst run, share of runs behind, mean difference of the metric."""
    if not found:
        return ""
    ratios = [value for one in found for value in one.ratios]
    share = sum(one.behind for one in found) / len(ratios)
    metrics = [one.metric for one in found if one.metric is not None]
    difference = _metric(statistics.fmean(metrics) if metrics else None)
    typical = ratio(geometric_mean(one.typical for one in found))
    return f"{typical} / {ratio(max(ratios))}, {share:.0%}{difference} ({len(found)})".replace("%", " %")


def summary(tables: Sequence[Table], shared: bool = False) -> str:
    """Kinds and lengths against methods; with `shared`, on settings and seeds that all methods have of the kind."""
    groups = [(kind, name) for kind in tasks.KINDS for _, name in LENGTHS]
    rows: list[str] = []
    everything: dict[str, list[Beside]] = {method: [] for method in METHODS}
    for kind, name in groups:
        own = [table for table in tables if (table.task.kind, length_of(table)) == (kind, name)]
        found = {method: [b for t in own if (b := beside(t, method))] for method in METHODS}
        if shared:
            ran = [method for method in METHODS if found[method]]
            each = [together(table, ran) for table in own] if len(ran) > 1 else []
            each = [one for one in each if all(one.values())]
            found = {method: [b for one in each if (b := one.get(method))] for method in METHODS}
        if not any(found.values()):
            continue
        rows.append("| " + " | ".join([kind, name, *(summary_cell(found[method]) for method in METHODS)]) + " |")
        for method in METHODS:
            everything[method] += found[method]
    if not rows:
        return ""
    rows.append("| **all** | | " + " | ".join(summary_cell(everything[method]) for method in METHODS) + " |")
    return "\n".join([*header(["kind", "steps"], HEAD[3:]), *rows])


ABOUT = f"""\
Bar: the best rate of AdamW's sweep (6 % warm-up, linear decay, rates half a decade apart), the same for all seeds.
"Not bracketed": the best rate is the lowest or highest that was run. Ratio: validation loss over that of this rate with
the same seed, so below 1 is better than the sweep. The formulas are AdamW at a rate that is computed from the shapes of
the model's weights (`formulas.py`) and measure nothing. Rows of `lqa` are of the present rule.

A cell is *geometric mean / worst run, runs above {BEHIND:.2f}, difference of the task's metric to AdamW's*. The metric
is accuracy, or Pearson's correlation for regressions of texts; language models have none but their loss. In the
summaries geometric means are over settings, the share is that of runs, and the number of settings is in brackets."""

SPLITS = {
    "search": ("Search tasks", "The rule was chosen on some of them, and any rule may be."),
    "kept": ("Kept tasks", "A rule is run on them once it is chosen."),
}


def yardstick(tables: Sequence[Table]) -> list[str]:
    """Its paragraphs, in Markdown."""
    parts = [ABOUT.replace("\n\n", "\0").replace("\n", " ").replace("\0", "\n\n")]
    for split, (title, about) in SPLITS.items():
        own = [table for table in tables if table.task.split == split and not table.varied]
        if not (text := summary(own)):
            continue
        parts += [f"### {title}", about, text]
        if shared := summary(own, shared=True):
            parts += ["On the settings and seeds that all of a kind's and length's methods have:", shared]
        parts += ["Setting by setting:", settings(own)]
    return parts
