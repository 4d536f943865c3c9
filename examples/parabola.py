"""Draw the figure of the README: three losses of one training step, the parabola through them, and the true loss.

The step is a real one, of MiniLM-L6 on Reuters-R8, with the direction of AdamW. The true loss is that of the same
batch with the same dropout masks, at many points along the direction.

::

    python examples/parabola.py --output parabola.png
"""

from __future__ import annotations

import argparse
import csv
import random
from pathlib import Path

import torch
from matplotlib.figure import Figure
from quickstart import CACHE, minilm, reuters
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_lqa import LQA, ReplayedLoss
from hf_lqa.direction import Direction

DARK, BLUE, ORANGE = "#000000", "#0072B2", "#E69F00"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache_dir", type=Path, default=CACHE, help="of quickstart.py")
    parser.add_argument("--step", type=int, default=9, help="the step to draw, counted from 1")
    parser.add_argument("--points", type=int, default=41, help="of the true loss")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "images" / "parabola.png")
    args = parser.parse_args()
    torch.manual_seed(0)
    random.seed(0)

    with reuters(args.cache_dir)[0].open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    classes = sorted({row["label"] for row in rows})
    folder = minilm(args.cache_dir)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(classes)).train()

    optimizer = LQA(torch.optim.AdamW(model.parameters(), lr=1.0), probe_interval=1)
    for step in range(1, args.step + 1):
        batch = random.sample(rows, args.batch_size)
        texts = [row["text"] for row in batch]
        inputs = tokenizer(texts, truncation=True, max_length=64, padding=True, return_tensors="pt")
        inputs["labels"] = torch.tensor([classes.index(r["label"]) for r in batch])
        optimizer.zero_grad()
        closure = ReplayedLoss(model)
        closure.record(lambda inputs=inputs: model(**inputs).loss).backward()
        if step == args.step:
            direction = Direction(optimizer.base, [1.0])
        optimizer.step(closure)
        print(f"step {step}: loss {closure.loss:.3f}, {optimizer.last_fit}", flush=True)

    probe, fit = optimizer.last_probe, optimizer.last_fit
    if fit.step_size is None:
        raise SystemExit(f"--step {args.step}: its fit was {fit.verdict}, there is no minimum to draw; try another")

    # The optimizer has stepped on: `direction` still knows where from.
    start, end = -1.6 * probe.radius, max(1.6 * probe.radius, 1.6 * fit.step_size)
    xs = [start + (end - start) * i / (args.points - 1) for i in range(args.points)]
    true = []
    for x in xs:
        direction.move_to(x)
        true.append(float(closure()))

    def parabola(x: float) -> float:
        return probe.loss_center + fit.slope * x + fit.curvature / 2 * x * x

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.plot(xs, true, color=DARK, linewidth=1.5, label=f"loss along the step, at {args.points} points")
    axes.plot(xs, [parabola(x) for x in xs], color=BLUE, linestyle="--", label="parabola through three losses")
    axes.plot(
        [-probe.radius, 0, probe.radius],
        [probe.loss_minus, probe.loss_center, probe.loss_plus],
        **{"color": BLUE, "linestyle": "none", "marker": "o", "label": "the three losses"},
    )
    minimum = fit.step_size
    style = {"color": ORANGE, "linestyle": "none", "marker": "*", "markersize": 14, "markeredgecolor": DARK}
    axes.plot([minimum], [parabola(minimum)], label=f"its minimum: {minimum:.2g}", **style)
    axes.set_xlabel("learning rate: distance along AdamW's step")
    axes.set_ylabel("loss of the batch")
    axes.ticklabel_format(axis="x", style="sci", scilimits=(-4, -4), useMathText=True)
    axes.legend(fontsize="small")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output, dpi=110)
    print(args.output)


if __name__ == "__main__":
    main()
