"""``python -m hf_lqa.plot OUTPUT_DIR``: what a run measured and chose, from its ``trainer_state.json`` alone."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .quadratic import Fit, Verdict, fit_losses

#: Okabe and Ito's colours in an order of falling darkness, each with its own line style: they work in grey, too.
_STYLES = [
    ("#000000", "-"),
    ("#0072B2", "--"),
    ("#D55E00", "-."),
    ("#009E73", ":"),
    ("#E69F00", "-"),
    ("#56B4E9", "--"),
]
_DARK, _BLUE, _ORANGE = "#000000", "#0072B2", "#E69F00"
_EPSILON = 2.0**-23  # of float32; with less precise types, more fits drown in rounding errors
_MARKERS = dict(zip(Verdict, "o^vXDsP", strict=True))


def read_log(output_dir: str | Path) -> list[dict[str, Any]]:
    """The log of a run: ``trainer_state.json`` of the folder itself or of its last ``checkpoint-*``.

    Raises:
        ValueError: there is none, or it has no training loss.
    """
    folder = Path(output_dir)
    checkpoints = [p for p in folder.glob("checkpoint-*/trainer_state.json") if p.parent.name[11:].isdigit()]
    checkpoints.sort(key=lambda p: int(p.parent.name[11:]))
    path = next((p for p in (folder / "trainer_state.json", *reversed(checkpoints)) if p.is_file()), None)
    if path is None:
        raise ValueError(
            f"OUTPUT_DIR={str(output_dir)!r}: no trainer_state.json in it or in a checkpoint-*; give the --output_dir"
            " of a run, and call trainer.save_state() after training or save checkpoints"
        )
    log: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["log_history"]
    if not any("loss" in entry for entry in log):
        raise ValueError(
            f"OUTPUT_DIR={str(output_dir)!r}: {path.name} has no training loss; train with --logging_steps"
        )
    return log


def probes(log: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry per logged probe, with its ``fit``: an entry of the log shows the last probe before it."""
    entries = [entry for entry in log if "lqa_probe_step" in entry]
    return [{**entry, "fit": _fit(entry)} for entry in _changes(entries, "lqa_probe_step")]


def _fit(entry: dict[str, Any]) -> Fit:
    """The fit behind an entry. Bound and rounding error are not logged, but whether it gave a step size is."""
    names = ("lqa_loss_minus", "lqa_loss_center", "lqa_loss_plus", "lqa_probe_radius")
    minus, center, plus, radius = (entry.get(name, math.nan) for name in names)
    if not radius > 0:  # nothing to probe along: flat, or not finite
        flat = entry.get("lqa_slope") == 0
        return Fit(
            entry.get("lqa_slope", math.nan), math.nan, None, Verdict.NON_DESCENT if flat else Verdict.NON_FINITE
        )
    if math.isnan(minus) and math.isnan(plus) and "lqa_slope" in entry:  # known without them: the gradient's
        return Fit(entry["lqa_slope"], math.nan, None, Verdict.NOT_REPLAYABLE)
    fit, found = fit_losses(minus, center, plus, radius), entry.get("lqa_fit_step_size")
    if found is not None:
        clamped = fit.step_size is not None and found < 0.999 * fit.step_size
        return Fit(fit.slope, fit.curvature, found, Verdict.CLAMPED if clamped else Verdict.ACCEPTED)
    refused = fit_losses(minus, center, plus, radius, noise=_EPSILON * abs(center))
    return refused if not refused.verdict.usable else Fit(fit.slope, fit.curvature, None, Verdict.BELOW_NOISE)


def plot(
    output_dir: str | Path,
    compare: Sequence[str | Path] = (),
    *,
    probe: int | None = None,
    output: str | Path | None = None,
    show: bool = False,
) -> Path:
    """Draw a run and return the path of the picture.

    Args:
        output_dir: a run's ``output_dir``, with a ``trainer_state.json`` in it or in its last checkpoint.
        compare: more of them: loss and learning rate of all in one picture. They may be of any optimizer.
        probe: draw the parabola that was measured at this step instead.
        output: where to; ``OUTPUT_DIR/lqa.png``, ``lqa_compare.png`` or ``lqa_probe_STEP.png`` if not given.
        show: open a window, too.

    Raises:
        ValueError: there is no log, or no probe of that step in it.
        ImportError: matplotlib is not installed.
    """
    figure_class = _figure_class(show)
    log = read_log(output_dir)
    if probe is not None:
        figure, name = _draw_probe(figure_class, log, probe), f"lqa_probe_{probe}.png"
    elif compare:
        runs = [output_dir, *compare]
        names = [Path(run).resolve().name for run in runs]
        names = names if len(set(names)) == len(names) else [str(run) for run in runs]
        logs = {name: read_log(run) for name, run in zip(names, runs, strict=True)}
        figure, name = _draw_runs(figure_class, logs), "lqa_compare.png"
    elif any("lqa_step_size" in entry for entry in log):
        figure, name = _draw_run(figure_class, log), "lqa.png"
    else:
        figure, name = _draw_runs(figure_class, {Path(output_dir).resolve().name: log}), "lqa.png"
    path = Path(output) if output is not None else Path(output_dir) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    if show:
        from matplotlib import pyplot

        pyplot.show()
    return path


def _figure_class(show: bool) -> Any:
    try:
        from matplotlib.figure import Figure

        if show:
            from matplotlib import pyplot

            return pyplot.figure
    except ImportError as error:
        raise ImportError('plots need matplotlib, which is not installed: pip install "hf-lqa[plot]"') from error
    return Figure


def _changes(log: Sequence[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    """The entries in which `key` has a new value: a measurement is logged again until there is the next."""
    entries = [entry for entry in log if key in entry]
    return [e for i, e in enumerate(entries) if i == 0 or e[key] != entries[i - 1][key]]


def _series(log: Sequence[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    entries = [entry for entry in log if key in entry]
    return [entry["step"] for entry in entries], [entry[key] for entry in entries]


def _running_mean(values: Sequence[float]) -> list[float]:
    """Exponential mean over about a fifteenth of the values, without the bias of its start; passes over NaN."""
    decay = max(0.0, 1 - 15 / len(values))
    total = weight = 0.0
    means = []
    for value in values:
        if math.isfinite(value):
            total, weight = decay * total + (1 - decay) * value, decay * weight + (1 - decay)
        means.append(total / weight if weight else math.nan)
    return means


def _draw_loss(axes: Any, log: Sequence[dict[str, Any]], name: str = "", color: str = _DARK, line: str = "-") -> None:
    steps, losses = _series(log, "loss")
    long = len(losses) >= 20
    axes.plot(steps, losses, color=color, linestyle=line, linewidth=0.6 if long else 1.5, alpha=0.4 if long else 1.0)
    if long:
        axes.plot(steps, _running_mean(losses), color=color, linestyle=line, linewidth=1.5)
    axes.lines[-1].set_label(name or ("training loss, running mean" if long else "training loss"))
    steps, losses = _series(log, "eval_loss")
    if steps:
        label = f"{name}, evaluation" if name else "evaluation loss"
        axes.plot(steps, losses, color=color, linestyle="none", marker="D", markersize=5, fillstyle="none", label=label)
    axes.set_ylabel("loss")


def _draw_runs(figure_class: Any, logs: Mapping[str, Sequence[dict[str, Any]]]) -> Any:
    """Loss and learning rate of several runs."""
    figure = figure_class(figsize=(7, 6), layout="constrained")
    top, bottom = figure.subplots(2, sharex=True)
    for i, (name, log) in enumerate(logs.items()):
        color, line = _STYLES[i % len(_STYLES)]
        _draw_loss(top, log, name, color, line)
        steps, rates = _series(log, "learning_rate")
        bottom.plot(steps, [rate or math.nan for rate in rates], color=color, linestyle=line, label=name)
    bottom.set_yscale("log")
    bottom.set_ylabel("learning rate applied")
    bottom.set_xlabel("step")
    top.legend(fontsize="small")
    return figure


def _draw_run(figure_class: Any, log: Sequence[dict[str, Any]]) -> Any:
    """Everything about one run with LQA."""
    measured = probes(log)
    figure = figure_class(figsize=(7, 10), layout="constrained")
    loss, rate, slopes, curvature, verdicts = figure.subplots(5, sharex=True, height_ratios=[3, 3, 2, 2, 1.3])

    _draw_loss(loss, log)
    loss.legend(fontsize="small")

    steps, rates = _series(log, "learning_rate")
    rate.plot(steps, [r or math.nan for r in rates], color=_DARK, label="applied")
    spread = [e for e in log if e.get("learning_rate") and "lqa_relative_rate_min" in e]
    least, most = ([e["learning_rate"] * e[f"lqa_relative_rate_{end}"] for e in spread] for end in ("min", "max"))
    if spread:
        steps = [entry["step"] for entry in spread]
        rate.fill_between(steps, least, most, color=_DARK, alpha=0.15, linewidth=0, label="of all parameters")
    steps, levels = _series(log, "lqa_level")
    rate.plot(steps, levels, color=_BLUE, linestyle="--", label="level, before warm-up and schedule")
    rate.set_yscale("log")
    rate.set_ylabel("learning rate")
    rate.legend(fontsize="small")

    at = [entry["lqa_probe_step"] for entry in measured]
    values = [entry["fit"].slope for entry in measured]
    slopes.plot(at, values, color=_DARK, linestyle="none", marker="o", markersize=4, label="at the start of a step")
    steps, values = _series(_changes(log, "lqa_end_slope"), "lqa_end_slope")
    style = {"color": _ORANGE, "marker": "^", "markersize": 3, "linewidth": 0.8, "linestyle": "--"}
    slopes.plot(steps, values, label="at the end, next batch", **style)
    slopes.axhline(0, color="0.6", linewidth=0.8)
    slopes.set_ylabel("slope\n(loss / learning rate)")
    slopes.legend(fontsize="small")

    values = [entry["fit"].curvature for entry in measured]
    curvature.plot(at, values, color=_DARK, linestyle="none", marker="o", markersize=4)
    # Symmetric, because a curvature may be negative; linear within the smallest tenth's power of ten.
    sizes = sorted(abs(v) for v in values if v and math.isfinite(v))
    smallest = 10.0 ** math.floor(math.log10(sizes[len(sizes) // 10])) if sizes else 1.0
    curvature.set_yscale("symlog", linthresh=smallest, linscale=0.8)
    if sizes:  # a few powers of ten on either side: all of them, and those next to 0, would overlap
        low, high = round(math.log10(smallest)), math.ceil(math.log10(sizes[-1]))
        powers = [10.0**k for k in range(high, low, -max(1, math.ceil((high - low) / 3)))] or [smallest]
        signs = [sign for sign in (-1, 1) if any(sign * v > 0 for v in values)]
        curvature.set_yticks([0.0, *(sign * power for sign in signs for power in powers)])
    curvature.axhline(0, color="0.6", linewidth=0.8)
    curvature.set_ylabel("curvature\n(loss / learning rate²)")

    seen = [v for v in Verdict if any(entry["fit"].verdict is v for entry in measured)]
    for row, verdict in enumerate(reversed(seen)):
        steps = [entry["lqa_probe_step"] for entry in measured if entry["fit"].verdict is verdict]
        color = _DARK if verdict.usable else _ORANGE
        verdicts.plot(steps, [row] * len(steps), color=color, linestyle="none", marker=_MARKERS[verdict], markersize=4)
    verdicts.set_yticks(range(len(seen)), [v.value.replace("_", " ") for v in reversed(seen)])
    verdicts.set_ylim(-0.7, len(seen) - 0.3)
    verdicts.set_ylabel("fits")
    verdicts.set_xlabel("step")
    return figure


def _draw_probe(figure_class: Any, log: Sequence[dict[str, Any]], step: int) -> Any:
    """The parabola measured at one step, with its three points, its minimum and the step that was taken."""
    measured = {entry["lqa_probe_step"]: entry for entry in probes(log)}
    if step not in measured:
        known = ", ".join(map(str, measured)) or "none"
        raise ValueError(
            f"--probe {step}: no probe of this step was logged; there are: {known} (--logging_steps 1: all)"
        )
    entry = measured[step]
    fit, radius = entry["fit"], entry.get("lqa_probe_radius")
    points = [entry.get(f"lqa_loss_{at}", math.nan) for at in ("minus", "center", "plus")]
    if fit.verdict is Verdict.NOT_REPLAYABLE:
        raise ValueError(f"--probe {step}: its losses could not be replayed, so there is no parabola")
    if radius is None or not all(map(math.isfinite, points)):
        raise ValueError(f"--probe {step}: its losses were not finite, so there is no parabola")
    applied = entry["learning_rate"] if entry["step"] == step else None
    center = points[1]
    figure = figure_class(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    marks = {"its minimum": fit.step_size, "step taken": applied}
    # What lies very far out, along a direction that is nearly straight, would hide the points.
    near = {name: x for name, x in marks.items() if x is not None and x < 20 * radius}
    ends = [-1.5 * radius, 1.5 * radius, *(1.3 * x for x in near.values())]
    xs = [min(ends) + (max(ends) - min(ends)) * i / 200 for i in range(201)]

    def parabola(x: float) -> float:
        return center + fit.slope * x + fit.curvature / 2 * x * x

    axes.plot(xs, [parabola(x) for x in xs], color=_BLUE, linestyle="--", label="parabola")
    axes.plot([-radius, 0, radius], points, color=_DARK, linestyle="none", marker="o", label="losses measured")
    styles = {
        "its minimum": {"color": _ORANGE, "linestyle": "none", "marker": "*", "markersize": 13},
        "step taken": {"color": "0.4", "linestyle": "none", "marker": "|", "markersize": 13, "markeredgewidth": 2},
    }
    for name, x in marks.items():
        if x is not None:
            at = [x] if name in near else []
            label = f"{name}: {x:.2g}" + ("" if at else " (beyond the right end)")
            axes.plot(at, [parabola(x) for x in at], label=label, **styles[name])
    axes.ticklabel_format(axis="x", style="sci", scilimits=(0, 0), useMathText=True)
    axes.set_title(f"step {step}: {fit.verdict.value.replace('_', ' ')}", fontsize="medium")
    axes.set_xlabel("learning rate: distance along the step's direction")
    axes.set_ylabel("loss of the step's batch")
    axes.legend(fontsize="small")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m hf_lqa.plot", description=__doc__)
    parser.add_argument("output_dir", metavar="OUTPUT_DIR", help="the --output_dir of a run")
    parser.add_argument("--compare", nargs="+", default=[], metavar="OTHER_DIR", help="runs to draw beside it")
    parser.add_argument("--probe", type=int, metavar="STEP", help="draw the parabola measured at this step")
    parser.add_argument("--output", metavar="FILE", help="where to; a file in OUTPUT_DIR by default")
    parser.add_argument("--show", action="store_true", help="open a window, too")
    args = parser.parse_args()
    try:
        print(plot(args.output_dir, args.compare, probe=args.probe, output=args.output, show=args.show))
    except (ValueError, ImportError) as error:
        sys.exit(f"python -m hf_lqa.plot: error: {error}")


if __name__ == "__main__":
    main()
