"""How often rounding deceives a probe: signs of the fits in each precision against float64, over a real training run.

::

    python examples/benchmarks/precision.py --model NAME_OR_FOLDER --data CSV_WITH_TEXT_AND_LABEL --steps 120

The model trains in float32 with LQA. At every probe the same three places on the same line are evaluated in float64
and in each precision: plainly in float32, under autocast, and with the weights themselves in bfloat16 (moved and
rounded as training would; float64 then starts from the rounded weights, too). Each precision has its own probe radius,
which grows while its fits are below its noise. Dropout is off.

A row says how far its radius was from the default (median), the error of the second difference of its losses in units
of its machine epsilon (root of the mean square, relative to the loss), what its fits came to, and of the accepted ones
the share whose slope or curvature has another sign than float64's; in brackets that share among all fits that have a
minimum, if none were thrown out for noise.
"""

from __future__ import annotations

import argparse
import copy
import csv
import math
import random
import statistics

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_lqa import LQA, Fit, ReplayedLoss, Verdict, fit_losses
from hf_lqa.direction import Direction
from hf_lqa.groups import rescaled
from hf_lqa.replay import rounding_error
from hf_lqa.rule.radius import Radius, RadiusConfig, adapted, radius

#: name -> (type of the weights, type of autocast)
PRECISIONS: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "fp32": (torch.float32, None),
    "fp16 autocast": (torch.float32, torch.float16),
    "bf16 autocast": (torch.float32, torch.bfloat16),
    "pure bf16": (torch.bfloat16, None),
}

Losses = tuple[float, float, float]


def losses(
    model: torch.nn.Module,
    batch: dict[str, torch.Tensor],
    line: tuple[list[torch.Tensor], list[torch.Tensor]],
    radius: float,
    autocast: torch.dtype | None = None,
) -> Losses:
    """The loss at -radius, 0 and radius, in the precision of `model`, whose weights are left at the origin."""
    found = []
    for alpha in (-radius, radius, 0.0):
        for p, origin, direction in zip(model.parameters(), *line, strict=True):
            p.copy_(origin)
            if alpha:
                p.add_(direction.to(p.dtype), alpha=alpha)
        kind = next(model.parameters()).device.type
        with torch.autocast(kind, autocast or torch.bfloat16, enabled=autocast is not None, cache_enabled=False):
            found.append(float(model(**batch).loss))
    return found[0], found[2], found[1]


class Row:
    """The fits in one precision, each beside float64's, and the state that their radius follows."""

    def __init__(self, weights: torch.dtype, autocast: torch.dtype | None, model: torch.nn.Module):
        self.autocast = autocast
        self.model = copy.deepcopy(model).to(weights)
        self.config, self.state = RadiusConfig(), Radius()
        self.noise = rounding_error(self.model, autocast)
        self.eps = torch.finfo(autocast or weights).eps
        self.fits: list[tuple[Fit, Fit, Fit]] = []
        self.scales: list[float] = []
        self.errors: list[float] = []

    def probe(
        self,
        batch: dict[str, torch.Tensor],
        line: tuple[list[torch.Tensor], list[torch.Tensor]],
        radius_from: tuple[float, float],
        exact_model: torch.nn.Module,
    ) -> None:
        origin, direction = line
        line = [o.to(p.dtype).to(o.dtype) for o, p in zip(origin, self.model.parameters(), strict=True)], direction
        reach = radius(self.config, self.state, *radius_from, None)
        if reach is None:
            return
        own = losses(self.model, batch, line, reach, self.autocast)
        exact = losses(exact_model, batch, line, reach)
        fit = fit_losses(*own, reach, noise=self.noise * abs(own[1]))
        self.fits.append((fit, fit_losses(*own, reach), fit_losses(*exact, reach)))
        self.scales.append(self.state.scale)
        error = sum(weight * (a - b) for weight, a, b in zip((1, -2, 1), own, exact, strict=True))
        self.errors.append((error / exact[1] / self.eps) ** 2)
        self.state = adapted(self.config, self.state, fit, by_loss=True)

    def line(self) -> str:
        accepted = [(fit, exact) for fit, _, exact in self.fits if fit.verdict.usable]
        unfiltered = [(fit, exact) for _, fit, exact in self.fits if fit.verdict.usable]

        def wrong(fits: list[tuple[Fit, Fit]]) -> tuple[str, str]:
            slope = sum(exact.slope >= 0 for _, exact in fits)
            curvature = sum(exact.curvature <= 0 for _, exact in fits)
            return f"{slope / max(len(fits), 1):.1%}", f"{curvature / max(len(fits), 1):.1%}"

        slopes, curvatures = zip(wrong(accepted), wrong(unfiltered), strict=True)
        counts = [len(self.fits), len(accepted), sum(f.verdict is Verdict.BELOW_NOISE for f, _, _ in self.fits)]
        error = math.sqrt(statistics.fmean(self.errors))
        cells = [f"{statistics.median(self.scales):g}", f"{error:.2g}", *counts]
        return " | ".join(map(str, [*cells, f"{slopes[0]} ({slopes[1]})", f"{curvatures[0]} ({curvatures[1]})"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="name on the hub or folder")
    parser.add_argument("--data", required=True, help="a CSV file with the columns text and label")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--every", type=int, default=2, help="compare at every so many steps")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--length", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    with open(options.data, newline="") as file:
        table = list(csv.DictReader(file))
    random.Random(options.seed).shuffle(table)
    names = sorted({row["label"] for row in table})
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=len(names)).to(device).eval()
    exact_model = copy.deepcopy(model).double()
    rows = {name: Row(*kinds, model) for name, kinds in PRECISIONS.items()}
    optimizer = LQA(torch.optim.AdamW(model.parameters(), lr=1.0), total_steps=options.steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / options.steps)

    for step in range(options.steps):
        part = [table[(step * options.batch_size + i) % len(table)] for i in range(options.batch_size)]
        texts = [row["text"] for row in part]
        batch = tokenizer(texts, truncation=True, max_length=options.length, padding=True, return_tensors="pt")
        batch = dict(batch.to(device), labels=torch.tensor([names.index(row["label"]) for row in part], device=device))
        closure = ReplayedLoss(model)
        optimizer.zero_grad()
        closure.record(lambda batch=batch: model(**batch).loss).backward()
        if step % options.every == 0:
            with torch.no_grad():
                moved = [p for p in model.parameters() if p.grad is not None]
                with rescaled(optimizer.base, 1 / optimizer.param_groups[0]["lr"], []):  # the schedule's factor
                    direction = Direction(optimizer.base)
                along = {p: direction.unit * d for p, d in zip(moved, direction.tensors, strict=True)}
                line = (
                    [p.detach() for p in model.parameters()],
                    [along.get(p, torch.zeros_like(p)) for p in model.parameters()],
                )
                for row in rows.values():
                    row.probe(batch, line, (float(closure.loss), float(direction.slope())), exact_model)
        optimizer.step(closure)
        schedule.step()

    print("| precision | radius | error / eps | probes | accepted | below noise | wrong slope | wrong curvature |")
    print("|---|---|---|---|---|---|---|---|")
    for name, row in rows.items():
        print(f"| {name} | {row.line()} |", flush=True)


if __name__ == "__main__":
    main()
