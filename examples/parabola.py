"""Draw the figure of the README: three losses of one training step, the parabola through them, and the true loss.

The step is a real one, of MiniLM-L6 on Reuters-R8, along the gradient. The true loss is that of the same batch with the
same dropout masks, at many points along the direction.

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

from hf_lqa import LQA, ReplayedLoss, fit_losses
from hf_lqa.direction import Direction
from hf_lqa.rule.radius import Radius, RadiusConfig, radius

DARK, BLUE, ORANGE = "#000000", "#0072B2", "#E69F00"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache_dir", type=Path, default=CACHE, help="of quickstart.py")
    parser.add_argument("--step", type=int, default=16, help="the step to draw, counted from 1")
    parser.add_argument("--points", type=int, default=33, help="of the true loss")
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

    optimizer = LQA(torch.optim.AdamW(model.parameters(), lr=1.0), total_steps=args.step)
    for step in range(1, args.step + 1):
        batch = random.sample(rows, args.batch_size)
        texts = [row["text"] for row in batch]
        inputs = tokenizer(texts, truncation=True, max_length=64, padding=True, return_tensors="pt")
        inputs["labels"] = torch.tensor([classes.index(row["label"]) for row in batch])
        optimizer.zero_grad()
        closure = ReplayedLoss(model)
        loss = closure.record(lambda inputs=inputs: model(**inputs).loss)
        loss.backward()
        print(f"step {step}: loss {loss:.3f}", flush=True)
        if step < args.step:
            optimizer.step(closure)

    direction = Direction(torch.optim.SGD(model.parameters(), lr=1.0))

    def loss_at(distance: float) -> float:
        direction.move_to(distance)
        return float(closure())

    reach = radius(RadiusConfig(), Radius(), loss.item(), direction.slope().item(), None)
    if reach is None:
        raise SystemExit(f"--step {args.step}: its loss or gradient is 0 or not finite; try another step")
    losses = [loss_at(x) for x in (-reach, 0, reach)]
    fit = fit_losses(*losses, reach)
    print(fit)
    if fit.step_size is None:
        raise SystemExit(f"--step {args.step}: there is no minimum to draw; try another step")

    def parabola(distance: float) -> float:
        return losses[1] + fit.slope * distance + fit.curvature / 2 * distance**2

    start, end = -1.6 * reach, max(1.6 * reach, 1.7 * fit.step_size)
    xs = [start + (end - start) * i / (args.points - 1) for i in range(args.points)]
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.plot(xs, [loss_at(x) for x in xs], color=DARK, label="the loss itself")
    axes.plot(xs, [parabola(x) for x in xs], color=BLUE, linestyle="--", label="parabola through three losses")
    axes.plot([-reach, 0, reach], losses, color=BLUE, linestyle="none", marker="o", label="the three losses")
    style = {"color": ORANGE, "linestyle": "none", "marker": "*", "markersize": 14, "markeredgecolor": DARK}
    axes.plot([fit.step_size], [parabola(fit.step_size)], label=f"its minimum: {fit.step_size:.2g}", **style)
    axes.set_xlabel("learning rate: distance along the negative gradient")
    axes.set_ylabel("loss of the batch")
    axes.legend(fontsize="small")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output, dpi=110)
    print(f"picture: {args.output}; another step: --step N")


if __name__ == "__main__":
    main()
