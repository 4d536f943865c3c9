"""Tables and figures from the runs that ``run.py`` has collected.

::

    python examples/benchmarks/report.py

writes ``REPORT.md`` and the figures beside the results. The best of AdamW's swept rates is the bar that ``lqa`` has to
clear; ± is the standard error over seeds.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Run = dict[str, Any]
Setting = tuple[Any, ...]

PAPER = ("linear", "logistic", "mlp_mnist", "lenet_cifar")
TASKS = ("trec6", "banking77", "sms_spam", "vader_tweets", "r8", "smollm2", "smollm2_lora", *PAPER)
#: Not run before the rule was fixed; no part of what the rule was chosen by, so in a table of their own.
HELD_OUT = (
    *("newsgroups", "election", "friends", "trec6_lora", "trec6_head", "trec6_smollm2"),
    *("minilm_mlm", "gpt2_scratch", "vit_scratch", "r8_smollm2", "election_smollm2"),
)
SETTING = (
    *("max_steps", "batch_size", "max_length", "schedule"),
    *("max_eval_samples", "max_grad_norm", "group_by_length", "bf16", "accelerator"),
)
#: From which seed on, on the paper's tasks and the others, results are in a table of their own, not in the main ones.
FRESH_SEED_OF_PAPER, FRESH_SEED = 10, 3
#: Where an old line does not say.
OLD = {
    "max_grad_norm": 1.0,
    "group_by_length": False,
    "bf16": False,
    "model": None,
    "trivial_metric": None,
    "error": None,
}
#: Methods with a rate in their names that is nobody's choice here: their authors' default.
OWN_RATE = ("schedule_free_adamw@2.5e-3+warmup",)
#: Okabe and Ito's colours by falling darkness, each with its own line: they work in grey, too.
STYLES = [
    ("#000000", "-"),
    ("#0072B2", "--"),
    ("#D55E00", "-."),
    ("#009E73", ":"),
    ("#E69F00", "-"),
    ("#56B4E9", "--"),
    ("#CC79A7", "-."),
]


def read(path: Path) -> list[Run]:
    runs = [{**OLD, **json.loads(line)} for line in path.read_text(encoding="utf-8").splitlines() if line]
    return [{**run, "accelerator": "" if "threads" in run["machine"] else run["machine"]} for run in runs]


def setting_of(run: Run) -> Setting:
    return tuple(run[key] for key in SETTING)


def swept(method: str) -> bool:
    """One of the rates of AdamW's sweep."""
    return method.startswith("adamw@") and "constant" not in method


def without_rate(method: str) -> bool:
    # The paper's own rule has no schedule; on its tasks it runs without.
    return ("@" not in method and "=" not in method) or method in OWN_RATE


def fresh_from(task: str) -> int:
    return FRESH_SEED_OF_PAPER if task in PAPER else FRESH_SEED


def failed(run: Run) -> bool:
    """Broken down, or no better than without a model (than the untrained one for language models)."""
    finite = math.isfinite(run["eval_loss"]) and math.isfinite(run["metric"])
    trivial = run["trivial_metric"]
    return run["error"] is not None or not finite or (trivial is not None and run["metric"] <= trivial)


def mean(values: Iterable[float]) -> float:
    found = [v if math.isfinite(v) else math.inf for v in values]
    return statistics.fmean(found)


def with_error(values: Sequence[float], digits: int = 4) -> str:
    if not all(math.isfinite(v) for v in values):
        return "diverged"
    text = f"{statistics.fmean(values):.{digits}f}"
    return f"{text} ± {statistics.stdev(values) / len(values) ** 0.5:.{digits}f}" if len(values) > 1 else text


class Table:
    """The runs of one task in one setting, by method."""

    def __init__(self, task: str, setting: Setting, runs: list[Run]):
        self.task, self.setting = task, setting
        self.methods: dict[str, dict[int, Run]] = defaultdict(dict)
        for run in runs:
            self.methods[run["method"]][run["seed"]] = run

    def loss(self, method: str, seeds: Iterable[int] | None = None) -> float:
        found = self.methods[method]
        return mean(found[seed]["eval_loss"] for seed in (found if seeds is None else seeds))

    def best(self, methods: Iterable[str], seeds: set[int] | None = None) -> tuple[str, set[int]] | None:
        """The method of the lowest mean loss among those with most seeds, and those seeds."""
        found = [m for m in methods if m in self.methods and (seeds is None or seeds & set(self.methods[m]))]
        if not found:
            return None
        wanted = {m: set(self.methods[m]) if seeds is None else seeds & set(self.methods[m]) for m in found}
        most = max(len(s) for s in wanted.values())
        best = min((m for m in found if len(wanted[m]) == most), key=lambda m: self.loss(m, wanted[m]))
        # One with fewer seeds is the bar only where it is better on those.
        for method in found:
            shared = wanted[method] & wanted[best]
            if len(wanted[method]) < most and shared and self.loss(method, shared) < self.loss(best, shared):
                best = method
        return best, wanted[best]

    def title(self) -> str:
        steps, batch, length, schedule, rows, clip, grouped, bf16, accelerator = self.setting
        parts = [f"{steps} steps", f"batch {batch}", f"{length} tokens" if length else "", f"{schedule} schedule"]
        parts += [f"{rows} validation rows" if rows else "", "" if clip else "unclipped"]
        parts += ["grouped by length" if grouped else "", "bf16 autocast" if bf16 else "", accelerator]
        return f"{self.task}: " + ", ".join(part for part in parts if part)


def tables_of(runs: list[Run]) -> dict[tuple[str, Setting], Table]:
    found: dict[tuple[str, Setting], list[Run]] = defaultdict(list)
    for run in runs:
        found[run["task"], setting_of(run)].append(run)
    return {key: Table(*key, group) for key, group in found.items()}


def main_tables(tables: dict[tuple[str, Setting], Table]) -> list[Table]:
    """Of each task the setting in which most methods ran, batches drawn at random; of several the one of most steps."""
    chosen = []
    for task in [*TASKS, *sorted({task for task, _ in tables} - set(TASKS))]:
        own = [table for (name, _), table in tables.items() if name == task]
        if own:
            grouped = SETTING.index("group_by_length")
            steps = SETTING.index("max_steps")
            chosen.append(
                max(own, key=lambda table: (not table.setting[grouped], len(table.methods), table.setting[steps]))
            )
    return chosen


END_OF_SWEEP = " (at the end of the sweep)"


def against_sweep(table: Table, method: str) -> str | None:
    """A row: `method` beside the best rate of AdamW's sweep, on the seeds that both have."""
    if method not in table.methods:
        return None
    found = table.best([m for m in table.methods if swept(m)], set(table.methods[method]))
    if found is None:
        return None
    best, seeds = found
    rates = sorted((m for m in table.methods if swept(m)), key=rate_of)
    own = [table.methods[method][s]["eval_loss"] for s in sorted(seeds)]
    bar = [table.methods[best][s]["eval_loss"] for s in sorted(seeds)]
    inner = "" if best not in (rates[0], rates[-1]) else END_OF_SWEEP
    ratio = mean(own) / mean(bar)
    metrics = [f"{mean(table.methods[m][s]['metric'] for s in seeds):.4f}" for m in (method, best)]
    return (
        f"| {table.task} | {with_error(own)} | {with_error(bar)} | {rate_of(best):.0e}{inner} | {ratio:.3f} |"
        f" {metrics[0]} | {metrics[1]} | {sum(a < b for a, b in zip(own, bar, strict=True))} of {len(seeds)} |"
    )


def rate_of(method: str) -> float:
    return float(method.partition("@")[2].partition("+")[0] or "nan")


#: The paper's references run on its own tasks only.
UNRANKED = ("bb",)
SWEEP = "AdamW, best of the sweep"


def ranks(chosen: list[Table], with_sweep: bool) -> str:
    """Mean ranks by validation loss of the methods without a rate, over the tasks that most of them ran."""
    tasks: list[str] = []
    losses: list[dict[str, float]] = []
    bars: list[float] = []
    for table in chosen:
        own = {alias(m): m for m in table.methods if without_rate(m) and m not in UNRANKED}
        seeds = set.intersection(*(set(table.methods[m]) for m in own.values())) if own else set()
        best = table.best([m for m in table.methods if swept(m)], seeds)
        if best is None or "lqa" not in own:
            continue
        tasks.append(f"{table.task} ({len(seeds)})")
        bars.append(table.loss(*best))
        losses.append({name: table.loss(m, seeds) for name, m in own.items()})
        if with_sweep:
            losses[-1][SWEEP] = bars[-1]
    if not losses:
        return ""
    most = max(map(len, losses))
    # A task that few methods ran ranks nothing.
    kept = [i for i, own_losses in enumerate(losses) if len(own_losses) > most / 2]
    names = sorted(set.intersection(*(set(losses[i]) for i in kept)))
    found: dict[str, list[int]] = defaultdict(list)
    for i in kept:
        for rank, name in enumerate(sorted(names, key=lambda n: losses[i][n]), start=1):
            found[name].append(rank)

    def to_bar(name: str) -> float:
        """Geometric mean over the tasks."""
        return math.exp(mean(math.log(losses[i][name] / bars[i]) for i in kept))

    rows = [f"Tasks, and in brackets the number of seeds: {', '.join(tasks[i] for i in kept)}.", ""]
    rows += [
        "| method | mean rank | loss over that of AdamW's best rate (geometric mean) | worst rank |",
        "|---|---|---|---|",
    ]
    for name in sorted(names, key=lambda n: statistics.fmean(found[n])):
        rows.append(f"| `{name}` | {statistics.fmean(found[name]):.2f} | {to_bar(name):.3f} | {max(found[name])} |")
    return "\n".join(rows)


def alias(method: str) -> str:
    """One name for a method in whatever schedule it runs."""
    return method.removesuffix("+constant")


def full_table(table: Table) -> str:
    head = ["method", "validation loss", "minus loss or MSE" if table.task.startswith("smol") else "metric"]
    head += ["highest rate", "last train loss", "forward equivalents", "seconds", "seeds", "failed"]
    rows = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for method in sorted(table.methods, key=table.loss):
        runs = list(table.methods[method].values())
        rates = [rate for run in runs for rate in run["learning_rate"] if math.isfinite(rate)]
        last = [mean(run["train_loss"][-10:]) for run in runs if run["train_loss"]]
        forwards = mean(run.get("forward_equivalents", 3 * len(run["train_loss"])) for run in runs)
        cells = [f"`{method}`", with_error([r["eval_loss"] for r in runs]), with_error([r["metric"] for r in runs])]
        cells += [f"{max(rates, default=math.nan):.1e}", with_error(last[:1], 3), f"{forwards:.0f}"]
        cells += [f"{mean(r['train_seconds'] for r in runs):.0f}", str(len(runs)), str(sum(map(failed, runs)) or "")]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def variations(tables: dict[tuple[str, Setting], Table], chosen: list[Table]) -> str:
    rows = []
    main = {(table.task, table.setting) for table in chosen}
    for key, table in tables.items():
        if key not in main and (row := against_sweep(table, "lqa")):
            rows.append(row.replace(f"| {table.task} |", f"| {table.title()} |", 1))
    return "\n".join([HEAD, *rows]) if rows else ""


HEAD = """| task | `lqa` | AdamW, best rate | that rate | ratio | metric, `lqa` | metric, AdamW | better on |
|---|---|---|---|---|---|---|---|"""


def late_rate(table: Table, method: str, seed: int) -> float:
    """The learning rate when four fifths of the run were over."""
    rates = table.methods[method][seed]["learning_rate"]
    return rates[len(rates) * 4 // 5]


def insensitivity(chosen: list[Table]) -> str:
    rows = ["| task | change | validation loss | ratio to the default | ± | learning rate, to the default's | seeds |"]
    rows.append("|---|---|---|---|---|---|---|")
    for table in chosen:
        for method in table.methods:
            if method.startswith("lqa+") and "=" in method and "lqa" in table.methods:
                seeds = sorted(set(table.methods[method]) & set(table.methods["lqa"]))
                loss, default = table.loss(method, seeds), table.loss("lqa", seeds)
                changes = [table.methods[method][s]["eval_loss"] - table.methods["lqa"][s]["eval_loss"] for s in seeds]
                error = statistics.stdev(changes) / len(seeds) ** 0.5 / default if len(seeds) > 1 else math.nan
                rate = statistics.geometric_mean(
                    late_rate(table, method, s) / late_rate(table, "lqa", s) for s in seeds
                )
                rows.append(
                    f"| {table.task} | `{method[4:]}` | {loss:.4f} | {loss / default:.3f} | {error:.3f} | {rate:.2f} |"
                    f" {len(seeds)} |"
                )
    return "\n".join(rows) if len(rows) > 2 else ""


def paper_table(chosen: list[Table]) -> str:
    """Training loss at some steps: the paper claims the greatest reduction per step."""
    tables = [table for table in chosen if table.task in PAPER]
    if not tables:
        return ""
    steps = [10, 50, 199]
    rows = ["| task | method | " + " | ".join(f"after {s + 1 if s == 199 else s} steps" for s in steps) + " | seeds |"]
    rows.append("|---|---|" + "---|" * (len(steps) + 1))
    for table in tables:
        for method in paper_methods(table):
            runs = list(table.methods[method].values())
            values = [
                mean(smoothed(run["train_loss"])[min(s, len(run["train_loss"]) - 1)] for run in runs) for s in steps
            ]
            rows.append(
                f"| {table.task} | `{method}` | " + " | ".join(f"{v:.4f}" for v in values) + f" | {len(runs)} |"
            )
    return "\n".join(rows)


def paper_methods(table: Table) -> list[str]:
    """The paper's rule and what it compares with: the best constant rate, the best decay, Barzilai-Borwein, Adam."""

    def last(method: str) -> float:
        return mean(mean(run["train_loss"][-10:]) for run in table.methods[method].values())

    groups = [["lqa_paper+constant", "lqa_paper"]]
    groups += [
        [m for m in table.methods if m.startswith("sgd@") and m.endswith(end)] for end in ("+constant", "+decay")
    ]
    groups += [["bb"], ["adamw@1e-3+constant"]]
    present = [[m for m in group if m in table.methods] for group in groups]
    return [min(group, key=last) for group in present if group]


def smoothed(values: Sequence[float], width: int = 10) -> list[float]:
    return [mean(values[max(0, i + 1 - width) : i + 1]) for i in range(len(values))]


def failures(runs: list[Run]) -> str:
    found: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        if failed(run):
            found[run["method"]][run["task"]].append(run["seed"])
    rows = []
    for method, tasks in sorted(found.items()):
        listed = (
            f"{task} (seed{'s' * (len(seeds) > 1)} {', '.join(map(str, sorted(seeds)))})"
            for task, seeds in sorted(tasks.items())
        )
        rows.append(f"- `{method}`: {', '.join(listed)}")
    return "\n".join(rows)


def average(runs: Iterable[Run], key: str) -> list[float]:
    """Step by step over seeds."""
    return [mean(values) for values in zip(*(run[key] for run in runs), strict=False)]


def _figure(rows: int, columns: int, width: float = 3.0, height: float = 2.4) -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False})
    return plt.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False, layout="constrained")


def draw_losses(chosen: list[Table], path: Path) -> None:
    tables = [t for t in chosen if "lqa" in t.methods and t.task not in PAPER][:5]
    if not tables:
        return
    figure, axes = _figure(2, len(tables))
    for column, table in enumerate(tables):
        best = table.best([m for m in table.methods if swept(m)])
        names = ["lqa", *([best[0]] if best else []), "prodigy", "salsa", "adamw"]
        for (color, line), method in zip(STYLES, names, strict=False):
            if method not in table.methods:
                continue
            run = table.methods[method].get(0) or next(iter(table.methods[method].values()))
            losses = smoothed(run["train_loss"])
            label = "AdamW, best rate" if swept(method) else "AdamW, default rate" if method == "adamw" else method
            axes[0][column].plot(range(1, len(losses) + 1), losses, color=color, linestyle=line, label=label)
            scale = run.get("forward_equivalents", 3 * len(losses)) / len(losses)
            work = [scale * (i + 1) for i in range(len(losses))]
            axes[1][column].plot(work, losses, color=color, linestyle=line, label=label)
        axes[0][column].set_title(table.task)
        axes[0][column].set_xlabel("step")
        axes[1][column].set_xlabel("forward equivalents")
    for row in axes:
        row[0].set_ylabel("training loss, mean of 10 steps")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    figure.savefig(path, dpi=75)


def draw_sweep(chosen: list[Table], path: Path) -> None:
    tables = [t for t in chosen if "lqa" in t.methods and sum(map(swept, t.methods)) > 1]
    if not tables:
        return
    columns = math.ceil(len(tables) / 2) if len(tables) > 3 else len(tables)
    figure, axes = _figure(2 if len(tables) > 3 else 1, columns)
    for ax in axes.flat[len(tables) :]:
        ax.axis("off")
    for ax, table in zip(axes.flat, tables, strict=False):
        methods = sorted((m for m in table.methods if swept(m)), key=rate_of)
        losses = [table.loss(m) for m in methods]
        ax.plot([rate_of(m) for m in methods], losses, "o--", color="#0072B2", label="AdamW, swept")
        if "adamw" in table.methods:
            style = {"color": "#D55E00", "fillstyle": "none", "label": "AdamW, Trainer's default"}
            ax.plot([5e-5], [table.loss("adamw")], "D", **style)
        ax.axhline(table.loss("lqa"), color="#000000", label="lqa, no rate given")
        ax.set_xscale("log")
        ax.set_title(table.task)
        finite = [v for v in losses if math.isfinite(v)]
        if max(finite) > 20 * min(finite):
            ax.set_yscale("log")
    for row in axes:
        row[0].set_ylabel("validation loss, mean over seeds")
    for ax in axes[-1]:
        ax.set_xlabel("learning rate")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    figure.savefig(path, dpi=90)


def draw_rates(chosen: list[Table], path: Path) -> None:
    tables = [t for t in chosen if "lqa" in t.methods]
    if not tables:
        return
    columns = math.ceil(len(tables) / 2) if len(tables) > 3 else len(tables)
    figure, axes = _figure(2 if len(tables) > 3 else 1, columns)
    for ax in axes.flat[len(tables) :]:
        ax.axis("off")
    for ax, table in zip(axes.flat, tables, strict=False):
        for i, run in enumerate(table.methods["lqa"].values()):
            ax.plot(
                run["learning_rate"], color="#000000", linewidth=0.9, label="lqa, one line a seed" if not i else None
            )
        if best := table.best([m for m in table.methods if swept(m)]):
            run = next(iter(table.methods[best[0]].values()))
            ax.plot(run["learning_rate"], color="#0072B2", linestyle="--", label="AdamW, best rate of the sweep")
        ax.set_yscale("log")
        top = max(max(run["learning_rate"]) for run in table.methods["lqa"].values())
        ax.set_ylim(bottom=top / 100)
        ax.set_title(table.task)
    for row in axes:
        row[0].set_ylabel("learning rate")
    for ax in axes[-1]:
        ax.set_xlabel("step")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    figure.savefig(path, dpi=90)


def draw_paper(chosen: list[Table], path: Path) -> None:
    """Where the paper's rule does what it claims, and, in the last panels, where it does not."""
    tables = [t for t in chosen if any(alias(m) == "lqa_paper" for m in t.methods)]
    tables = [t for t in tables if t.task in PAPER] + [t for t in tables if t.task not in PAPER][:2]
    if not tables:
        return
    columns = math.ceil(len(tables) / 2)
    figure, axes = _figure(2 if len(tables) > 1 else 1, columns)
    for ax in axes.flat[len(tables) :]:
        ax.axis("off")
    names = {"lqa_paper": "the paper's rule", "sgd": "best constant rate", "bb": "Barzilai-Borwein"}
    for ax, table in zip(axes.flat, tables, strict=False):
        if table.task in PAPER:
            methods = paper_methods(table)
        else:
            best = table.best([m for m in table.methods if swept(m)])
            methods = ["lqa_paper", *([best[0]] if best else []), "lqa"]
        for method in methods:
            if method not in table.methods:
                continue
            if method.endswith("+decay"):
                style, label = 4, "best decaying rate"
            elif method == "lqa":
                style, label = 6, "lqa"
            elif swept(method):
                style, label = 5, "AdamW, best of the sweep"
            elif method.startswith("adamw"):
                style, label = 3, "Adam, default rate"
            else:
                kind = next(key for key in names if method.startswith(key))
                style, label = list(names).index(kind), names[kind]
            runs = table.methods[method].values()
            color, line = STYLES[style]
            ax.plot(smoothed(average(runs, "train_loss")), color=color, linestyle=line, label=label)
        ax.set_title(table.task)
        ax.set_xlabel("step")
        if table.task in ("linear", "logistic"):
            ax.set_yscale("log")
        # What diverges leaves the picture.
        first = max(run["train_loss"][0] for m in methods if m in table.methods for run in table.methods[m].values())
        ax.set_ylim(bottom=None if ax.get_yscale() == "log" else 0, top=1.3 * first)
    for row in axes:
        row[0].set_ylabel("training loss, mean of 10 steps")
    labels = {label: handle for ax in axes.flat for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(labels.values(), labels.keys(), loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(path, dpi=90)


FIGURES = {
    "sweep.png": (draw_sweep, "How AdamW's result hangs on its rate, and what `lqa` gets without one"),
    "rates.png": (draw_rates, "The learning rates that `lqa` chose, and the best of AdamW's"),
    "loss.png": (draw_losses, "Training loss against steps and against forward equivalents (seed 0)"),
    "paper.png": (draw_paper, "The paper's rule on the paper's kinds of task, and in fine-tuning with small batches"),
}


def report(runs: list[Run], folder: Path) -> str:
    fresh = tables_of([run for run in runs if run["seed"] >= fresh_from(run["task"])])
    tables = tables_of([run for run in runs if run["seed"] < fresh_from(run["task"])] or runs)
    every_task = main_tables(tables)
    held_out = [table for table in every_task if table.task in HELD_OUT]
    chosen = [table for table in every_task if table.task not in HELD_OUT] or every_task
    newest = next((run for run in reversed(runs) if not run["accelerator"]), runs[-1])
    parts = [
        "# Benchmark",
        "Made by `python examples/benchmarks/report.py` from the raw results beside it; all runs by"
        " `python examples/benchmarks/run.py --table --data_dir data`, which says what each task and method is."
        f" Where nothing else is said: fp32, {newest['machine']}; torch {newest['torch']}, transformers"
        f" {newest.get('transformers', '5')}."
        " ± is the standard error over seeds. What was not run, and why: [NOTES.md](NOTES.md).",
        "## `lqa` against the best of AdamW's sweep",
        "The best of AdamW's rates, half a decade apart, 6 % warm-up, linear decay, by mean loss over the seeds that"
        " both have. A ratio below 1: `lqa` is better. Better on: seeds. Metric: accuracy, minus the mean squared"
        " error, or minus the loss (language models).",
        "\n".join([HEAD, *(row for table in chosen if (row := against_sweep(table, "lqa")))]),
    ]
    if rows := [row for table in held_out if (row := against_sweep(table, "lqa"))]:
        about = (
            "They were written down (`held_out.py`, which describes them) before any of them was run with any rule. The"
            " bound of the first steps was made because of trec6_smollm2, and before r8_smollm2 and election_smollm2"
            " were written down."
        )
        parts += ["### On tasks that the rule was not chosen on", about, "\n".join([HEAD, *rows])]
    if text := variations(fresh, []):
        about = (
            "Seeds from 3 on, of the small networks from 10 on: how much votes count was chosen on their first ten."
            " Not all are unseen: when first rates were made, seeds 3 to 5 of the text tasks with 100 steps and all"
            " of those of trec6 with 1,000 and of the small networks had been looked at."
            " AdamW at rates that are best on the seeds before, or nearly."
        )
        parts += ["### On more seeds", about, text.replace(END_OF_SWEEP, "")]
    parts += [
        "## Mean rank",
        "By mean validation loss over the seeds that all have, of the methods without a rate that ran on all tasks.",
        ranks(chosen, with_sweep=False),
        "And with the best of AdamW's sweep as one more method:",
        ranks(chosen, with_sweep=True),
        "### Failures",
        "NaN, or no better than the commonest class, the mean, or the untrained language model:",
        failures([run for table in every_task for by_seed in table.methods.values() for run in by_seed.values()])
        or "None.",
    ]
    for name, (draw, caption) in FIGURES.items():
        draw(chosen, folder / name)
        if (folder / name).exists():
            parts.append(f"![{caption}]({name})\n\n{caption}.")
    if text := variations(tables, every_task):
        parts += ["## Other settings", text]
    every = tables_of(runs)
    if text := insensitivity([every[table.task, table.setting] for table in chosen]):
        about = (
            "±: standard error of the ratio, of differences seed by seed. `tau=0.0303`, 1 % more, shows chance."
            " Learning rate: when four fifths of a run were over, geometric mean over seeds."
        )
        parts += ["## The rule's own constants, halved and doubled", about, text]
    if text := paper_table(chosen):
        parts += ["## The paper's claim", "Training loss, mean of the last ten steps, mean over seeds.", text]
    parts.append("## All results")
    for table in [*chosen, *held_out, *(t for t in tables.values() if t not in every_task)]:
        parts += [f"### {table.title()}", full_table(table)]
    return "\n\n".join(parts) + "\n"


def main(argv: list[str] | None = None) -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="?", type=Path, default=here / "results.jsonl")
    parser.add_argument("--output", type=Path, help="REPORT.md beside the results if not given")
    options = parser.parse_args(argv)
    output = options.output or options.results.with_name("REPORT.md")
    output.write_text(report(read(options.results), output.parent), encoding="utf-8")


if __name__ == "__main__":
    main()
