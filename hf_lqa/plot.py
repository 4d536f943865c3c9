"""``python -m hf_lqa.plot OUTPUT_DIR``: a run's loss and learning rate, from its ``trainer_state.json`` alone."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .logs import probes, read_log
from .quadratic import Verdict

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
_MARKERS = dict(zip(Verdict, "o^vXDsP", strict=True))


def plot(
    output_dir: str | Path,
    compare: Sequence[str | Path] = (),
    *,
    details: bool = False,
    probe: int | None = None,
    output: str | Path | None = None,
    show: bool = False,
) -> Path:
    """Draw a run and return the path of the picture: its loss, and the learning rate that was applied.

    Args:
        output_dir: a run's ``output_dir``, with a ``trainer_state.json`` in it or in its last checkpoint. It may be of
            any optimizer.
        compare: more of them, to be drawn over the same steps.
        details: draw everything that LQA measured as well.
        probe: draw the parabola that was measured at this step instead.
        output: where to; if not given, ``lqa.png``, ``lqa_compare.png``, ``lqa_details.png`` or ``lqa_probe_STEP.png``
            in `output_dir`.
        show: open a window, too.

    Raises:
        ValueError: there is no log, or not in it what is to be drawn; or more than one of `compare`, `details` and
            `probe` is given.
        ImportError: matplotlib is not installed.
    """
    if bool(compare) + details + (probe is not None) > 1:
        raise ValueError("--compare, --details and --probe are pictures of their own: give one of them")
    figure_class = class_of_figures(show)
    log = read_log(output_dir)
    if details:
        figure, name = _draw_details(figure_class, log, _probes(output_dir, log)), "lqa_details.png"
    elif probe is not None:
        figure, name = _draw_probe(figure_class, _probes(output_dir, log), probe), f"lqa_probe_{probe}.png"
    else:
        runs = [output_dir, *compare]
        names = [Path(run).resolve().name for run in runs]
        names = names if len(set(names)) == len(names) else [str(run) for run in runs]
        logs = {name: read_log(run) for name, run in zip(names, runs, strict=True)}
        figure, name = _draw_runs(figure_class, logs), "lqa_compare.png" if compare else "lqa.png"
    path = Path(output) if output is not None else Path(output_dir) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    if show:
        from matplotlib import pyplot

        pyplot.show()
    return path


def _probes(output_dir: str | Path, log: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    name = f"OUTPUT_DIR={str(output_dir)!r}"
    try:
        measured = probes(log)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    if not measured:
        raise ValueError(
            f"{name}: no probe of LQA in the log. Leave --details and --probe out for a run of another optimizer"
        )
    return measured


def class_of_figures(show: bool) -> Any:
    try:
        from matplotlib.figure import Figure

        if show:
            from matplotlib import pyplot

            return pyplot.figure
    except ImportError as error:
        raise ImportError('plots need matplotlib, which is not installed: pip install "hf-lqa[plot]"') from error
    return Figure


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


def _draw_rate(axes: Any, log: Sequence[dict[str, Any]], name: str = "", color: str = _DARK, line: str = "-") -> None:
    steps, rates = _series(log, "learning_rate")
    rates = [rate or math.nan for rate in rates]  # no place for 0 on a logarithmic scale
    axes.plot(steps, rates, color=color, linestyle=line, label=name or "applied")
    axes.set_yscale("log")
    axes.set_ylabel("learning rate")


def _draw_band(axes: Any, log: Sequence[dict[str, Any]]) -> None:
    """The rates of the slowest and of the fastest tensor; nothing if they never differ."""
    least = most = 1.0
    band = []
    for entry in log:
        least, most = entry.get("lqa_multiplier_min", least), entry.get("lqa_multiplier_max", most)
        if rate := entry.get("learning_rate"):
            band.append((entry["step"], rate * least, rate * most))
    if any(below < above for _, below, above in band):
        label = "from the slowest to the fastest tensor"
        axes.fill_between(*zip(*band, strict=True), color=_DARK, alpha=0.15, linewidth=0, label=label)


def _draw_runs(figure_class: Any, logs: Mapping[str, Sequence[dict[str, Any]]]) -> Any:
    """Loss and learning rate, of one run with its band and of several with their names."""
    figure = figure_class(figsize=(7, 6), layout="constrained")
    loss, rate = figure.subplots(2, sharex=True)
    for i, (name, log) in enumerate(logs.items()):
        style = (name if len(logs) > 1 else "", *_STYLES[i % len(_STYLES)])
        _draw_loss(loss, log, *style)
        _draw_rate(rate, log, *style)
        if len(logs) == 1:
            _draw_band(rate, log)
    loss.legend(fontsize="small")
    if len(rate.get_legend_handles_labels()[0]) > len(logs):
        rate.legend(fontsize="small")
    rate.set_ylabel("learning rate applied")
    rate.set_xlabel("step")
    return figure


def _draw_details(figure_class: Any, log: Sequence[dict[str, Any]], measured: Sequence[dict[str, Any]]) -> Any:
    """Everything about one run with LQA."""
    agreements = _series(log, "lqa_sign_agreement")
    heights = [3, 3, *([2] if agreements[0] else []), 2, 2, 1.3]
    figure = figure_class(figsize=(7, 0.9 * sum(heights)), layout="constrained")
    loss, rate, *agreement, slopes, curvature, verdicts = figure.subplots(
        len(heights), sharex=True, height_ratios=heights
    )

    _draw_loss(loss, log)
    loss.legend(fontsize="small")

    _draw_rate(rate, log)
    _draw_band(rate, log)
    steps, sizes = _series(log, "lqa_base_step_size")
    rate.plot(steps, sizes, color=_BLUE, linestyle="--", label="base step size, before ramp and schedule")
    rate.legend(fontsize="small")

    for axes in agreement:  # lqa_paper measures none
        axes.plot(*agreements, color=_BLUE, marker="^", markersize=3, linewidth=0.8)
        axes.axhline(0, color="0.6", linewidth=0.8)
        axes.set_ylabel("sign agreement\n(below 0: go on)")

    at = [entry["lqa_probe_step"] for entry in measured]
    values = [entry["fit"].slope for entry in measured]
    slopes.plot(at, values, color=_DARK, linestyle="none", marker="o", markersize=4)
    slopes.axhline(0, color="0.6", linewidth=0.8)
    slopes.set_ylabel("slope\n(loss / learning rate)")

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


def _draw_probe(figure_class: Any, measured: Sequence[dict[str, Any]], step: int) -> Any:
    """The parabola measured at one step, with its three points, its minimum and the step that was taken."""
    by_step = {entry["lqa_probe_step"]: entry for entry in measured}
    if step not in by_step:
        known = ", ".join(map(str, by_step))
        raise ValueError(
            f"--probe {step}: no probe of this step was logged; there are: {known} (--logging_steps 1: all)"
        )
    entry = by_step[step]
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
    minimum = "its minimum" if fit.verdict is not Verdict.CLAMPED else "bound, short of its minimum"
    marks = {minimum: fit.step_size, "step taken": applied}
    # What lies very far out, along a direction that is nearly straight, would hide the points.
    near = {name: x for name, x in marks.items() if x is not None and x < 20 * radius}
    ends = [-1.5 * radius, 1.5 * radius, *(1.3 * x for x in near.values())]
    xs = [min(ends) + (max(ends) - min(ends)) * i / 200 for i in range(201)]

    def parabola(x: float) -> float:
        return center + fit.slope * x + fit.curvature / 2 * x * x

    axes.plot(xs, [parabola(x) for x in xs], color=_BLUE, linestyle="--", label="parabola")
    axes.plot([-radius, 0, radius], points, color=_DARK, linestyle="none", marker="o", label="losses measured")
    styles = {
        minimum: {"color": _ORANGE, "linestyle": "none", "marker": "*", "markersize": 13},
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
    parser.add_argument("output_dir", nargs="?", metavar="OUTPUT_DIR", help="the --output_dir of a run")
    parser.add_argument("--compare", nargs="+", default=[], metavar="DIR", help="runs to draw over the same steps")
    parser.add_argument("--details", action="store_true", help="draw everything that was measured as well")
    parser.add_argument("--probe", type=int, metavar="STEP", help="draw the parabola measured at this step")
    parser.add_argument("--output", metavar="FILE", help="where to; a file in OUTPUT_DIR by default")
    parser.add_argument("--show", action="store_true", help="open a window, too")
    args = parser.parse_args()
    runs = [args.output_dir] * (args.output_dir is not None) + args.compare
    if not runs:
        parser.error("no OUTPUT_DIR given")
    chosen = {"details": args.details, "probe": args.probe, "output": args.output, "show": args.show}
    try:
        print(plot(runs[0], runs[1:], **chosen))
    except (ValueError, ImportError) as error:
        sys.exit(f"python -m hf_lqa.plot: error: {error}")


if __name__ == "__main__":
    main()
