"""The report's figures, of losses and of the curves that the results keep."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tasks
from methods import alias, parse_method, rate_of, swept
from results import WIDTH, Run, mean, points
from sections import paper_methods
from sweeps import Table

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
#: Tasks of the picture of sweeps, each at its longest setting: encoders, then LoRA, a decoder, a language model.
PICTURED = ("trec6", "banking77", "vader_tweets", "clinc150", "stsb", "trec6_lora", "r8_smollm2", "smollm2")
TRAIN_LOSS = f"training loss, mean of {WIDTH} steps"


def _panels(number: int, rows: int | None = None, width: float = 3.0, height: float = 2.4) -> Any:
    """A figure, its axes (those that are too many switched off) and axes by row."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False})
    rows = rows or (2 if number > 3 else 1)
    columns = math.ceil(number / rows)
    size = (width * columns, height * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for ax in axes.flat[number:]:
        ax.axis("off")
    return figure, axes


def _save(figure: Any, axes: Any, path: Path, columns: int | None = None, dpi: int = 90) -> None:
    labels = {label: handle for ax in axes.flat for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(
        labels.values(), labels.keys(), loc="outside upper center", ncols=columns or len(labels), frameon=False
    )
    figure.savefig(path, dpi=dpi)


def _label_edges(axes: Any, ylabel: str, xlabel: str) -> None:
    for row in axes:
        row[0].set_ylabel(ylabel)
    for ax in axes[-1]:
        ax.set_xlabel(xlabel)


def _curve(run: Run, key: str) -> tuple[list[int], list[float]] | None:
    values = run.get("curves", {}).get(key)
    return (points(run["steps"]), values) if values else None


def _kept(table: Table, method: str, key: str) -> list[Run]:
    """Runs of a method that keep this curve."""
    return [run for run in table.methods.get(method, {}).values() if _curve(run, key)]


def pictured(tables: Sequence[Table]) -> list[Table]:
    chosen = []
    for name in PICTURED:
        own = [t for t in tables if t.task.name == name and not t.varied and "lqa" in t.methods and len(t.rates()) > 2]
        chosen += [max(own, key=lambda t: t.length)] if own else []
    return chosen


def draw_sweep(tables: Sequence[Table], chosen: Sequence[Table], path: Path) -> None:
    shown = pictured(tables)
    if not shown:
        return
    figure, axes = _panels(len(shown))
    for ax, table in zip(axes.flat, shown, strict=False):
        best = table.best()
        seeds = set(table.methods["lqa"]) & set(table.methods[best]) if best else set()

        def shared(method: str, table: Table = table, seeds: set[int] = seeds) -> set[int]:
            return seeds & set(table.methods.get(method, {}))

        rates = [method for method in table.rates() if shared(method) and parse_method(method).warmup]
        losses = [table.loss(method, shared(method)) for method in rates]
        ax.plot([rate_of(method) for method in rates], losses, "o--", color="#0072B2", label="AdamW, swept")
        formula = next((m for m in table.methods if alias(m) == "formula_m_head8" and shared(m)), None)
        if formula:
            rate = mean(run["highest_rate"] for run in table.methods[formula].values())
            style = {"color": "#D55E00", "fillstyle": "none", "label": "AdamW, rate from shapes (formula_m_head8)"}
            ax.plot([rate], [table.loss(formula, shared(formula))], "D", **style)
        ax.axhline(table.loss("lqa", seeds), color="#000000", label="lqa, no rate given")
        ax.set_xscale("log")
        ax.xaxis.set_minor_formatter("")  # of less than a decade they would overlap
        ax.set_title(f"{table.task.name}, {table.length} steps ({table.task.split})")
        finite = [value for value in losses if math.isfinite(value)]
        if max(finite) > 20 * min(finite):
            ax.set_yscale("log")
    _label_edges(axes, "validation loss, mean over seeds", "learning rate")
    _save(figure, axes, path)


def scheduled(method: str, steps: int) -> list[float]:
    """AdamW's learning rates at the points of a curve: a warm-up over 6 % of the steps, then down linearly."""
    warmup = round(0.06 * steps) if parse_method(method).warmup else 0
    factors = [
        (step - 1) / warmup if step <= warmup else (steps - step + 1) / (steps - warmup) for step in points(steps)
    ]
    return [rate_of(method) * factor if factor else math.nan for factor in factors]  # no zero on a logarithmic axis


def draw_rates(tables: Sequence[Table], chosen: Sequence[Table], path: Path) -> None:
    shown = [table for table in chosen if _kept(table, "lqa", "learning_rate")]
    if not shown:
        return
    figure, axes = _panels(len(shown), rows=math.ceil(len(shown) / 6), width=2.2, height=1.9)
    for ax, table in zip(axes.flat, shown, strict=False):
        top = 0.0
        for run in _kept(table, "lqa", "learning_rate"):
            steps, rates = _curve(run, "learning_rate")
            ax.plot(steps, rates, color="#000000", linewidth=0.9, label="lqa, one line a seed")
            top = max(top, *rates)
        if best := table.best():
            style = {"color": "#0072B2", "linestyle": "--", "label": "AdamW, best rate of the sweep"}
            ax.plot(points(table.length), scheduled(best, table.length), **style)
        ax.set_yscale("log")
        ax.set_ylim(bottom=top / 100)
        ax.set_title(table.task.name)
    _label_edges(axes, "learning rate", "step")
    _save(figure, axes, path, dpi=75)


def draw_losses(tables: Sequence[Table], chosen: Sequence[Table], path: Path) -> None:
    shown = [t for t in chosen if t.task.kind == tasks.ENCODER and _kept(t, "lqa", "train_loss")]
    shown = [t for t in shown if any(_kept(t, peer, "train_loss") for peer in ("prodigy", "salsa"))][:5] or shown[:1]
    if not shown:
        return
    figure, axes = _panels(2 * len(shown), rows=2)
    for column, table in enumerate(shown):
        names = ["lqa", table.best() or "", "prodigy", "salsa", "adamw"]
        for (color, line), method in zip(STYLES, names, strict=False):
            if not (runs := _kept(table, method, "train_loss")):
                continue
            steps, losses = _curve(runs[0], "train_loss")
            label = "AdamW, best rate" if swept(method) else "AdamW, default rate" if method == "adamw" else method
            style = {"color": color, "linestyle": line, "label": label}
            axes[0][column].plot(steps, losses, **style)
            scale = runs[0]["forward_equivalents"] / runs[0]["steps"]
            axes[1][column].plot([scale * step for step in steps], losses, **style)
        axes[0][column].set_title(table.task.name)
        axes[0][column].set_xlabel("step")
    _label_edges(axes, TRAIN_LOSS, "forward equivalents")
    _save(figure, axes, path, dpi=75)


def _paper_style(method: str) -> tuple[tuple[str, str], str]:
    kinds = {
        "lqa_paper": (0, "the paper's rule"),
        "sgd+decay": (4, "best decaying rate"),
        "sgd": (1, "best constant rate"),
        "bb": (2, "Barzilai-Borwein"),
        "adamw@1e-3+constant": (3, "Adam, default rate"),
        "adamw": (5, "AdamW, best of the sweep"),
        "lqa": (6, "lqa"),
    }
    found = "sgd+decay" if method.endswith("+decay") else next(kind for kind in kinds if method.startswith(kind))
    return STYLES[kinds[found][0]], kinds[found][1]


def draw_paper(tables: Sequence[Table], chosen: Sequence[Table], path: Path) -> None:
    """Where the paper's rule does what it claims, and, in the last panels, where it does not."""
    of_rule = [t for t in chosen if any(alias(m) == "lqa_paper" and _kept(t, m, "train_loss") for m in t.methods)]
    shown = [table for table in of_rule if table.task.kind == tasks.PAPER]
    shown += [table for table in of_rule if table.task.kind != tasks.PAPER][:2]
    if not shown:
        return
    figure, axes = _panels(len(shown), rows=2 if len(shown) > 1 else 1)
    for ax, table in zip(axes.flat, shown, strict=False):
        of_paper = table.task.kind == tasks.PAPER
        first = []
        for method in paper_methods(table) if of_paper else ["lqa_paper", table.best() or "", "lqa"]:
            if not (runs := _kept(table, method, "train_loss")):
                continue
            (color, line), label = _paper_style(method)
            curves = [_curve(run, "train_loss") for run in runs]
            losses = [mean(values) for values in zip(*(values for _, values in curves), strict=False)]
            ax.plot(curves[0][0][: len(losses)], losses, color=color, linestyle=line, label=label)
            first.append(losses[0])
        ax.set_title(table.task.name)
        if table.task.name in ("linear", "logistic"):
            ax.set_yscale("log")
        # What diverges leaves the picture.
        ax.set_ylim(bottom=None if ax.get_yscale() == "log" else 0, top=1.3 * max(first))
    _label_edges(axes, TRAIN_LOSS, "step")
    _save(figure, axes, path, columns=4)


FIGURES = {
    "sweep.png": (draw_sweep, "How AdamW's result hangs on its rate, and what `lqa` gets without one"),
    "rates.png": (draw_rates, "The learning rates that `lqa` chose, and the best of AdamW's"),
    "loss.png": (draw_losses, "Training loss against steps and against forward equivalents (one seed)"),
    "paper.png": (draw_paper, "The paper's rule on the paper's kinds of task, and in fine-tuning with small batches"),
}
