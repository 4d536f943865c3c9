"""How often rounding deceives a probe: signs of the fits in each precision against float64, over a real training run.

::

    python examples/benchmarks/precision.py --model NAME_OR_FOLDER --data CSV_WITH_TEXT_AND_LABEL --steps 60

The model trains in float32 with LQA. At every probe the same three places on the same line are evaluated again in
float64, under bfloat16 autocast, and with the weights themselves in bfloat16 (moved and rounded as training would).
Dropout is off. A row says how many fits were accepted, and the share of those whose slope or curvature has another
sign than float64's.
"""

from __future__ import annotations

import argparse
import copy
import csv
import random
from collections import Counter

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_lqa import LQA, Fit, ReplayedLoss, fit_losses
from hf_lqa.direction import Direction

#: name -> (type of the weights, whether under bfloat16 autocast)
PRECISIONS = {
    "fp64": (torch.float64, False),
    "fp32": (torch.float32, False),
    "bf16 autocast": (torch.float32, True),
    "pure bf16": (torch.bfloat16, False),
}


def losses(model: torch.nn.Module, batch: dict[str, torch.Tensor], line: tuple, autocast: bool) -> list[float]:
    """The loss at -radius, 0 and radius, in the precision of `model`, whose weights are left at the origin."""
    origin, direction, radius = line
    found = []
    params = list(model.parameters())
    for alpha in (-radius, radius, 0.0):
        for p, o, d in zip(params, origin, direction, strict=True):
            p.copy_(o)
            if alpha:
                p.add_(d.to(p.dtype), alpha=alpha)
        with torch.autocast(params[0].device.type, torch.bfloat16, enabled=autocast, cache_enabled=False):
            found.append(float(model(**batch).loss))
    return [found[0], found[2], found[1]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="name on the hub or folder")
    parser.add_argument("--data", required=True, help="a CSV file with the columns text and label")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=2, help="compare at every so many steps")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--length", type=int, default=24)
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
    copies = {name: copy.deepcopy(model).to(dtype) for name, (dtype, _) in PRECISIONS.items()}
    optimizer = LQA(torch.optim.AdamW(model.parameters(), lr=1.0))
    fits: dict[str, list[Fit]] = {name: [] for name in PRECISIONS}

    for step in range(options.steps):
        part = [table[(step * options.batch_size + i) % len(table)] for i in range(options.batch_size)]
        texts = [row["text"] for row in part]
        batch = tokenizer(texts, truncation=True, max_length=options.length, padding=True, return_tensors="pt")
        batch = dict(batch.to(device), labels=torch.tensor([names.index(row["label"]) for row in part], device=device))
        closure = ReplayedLoss(model)
        optimizer.zero_grad()
        closure.record(lambda batch=batch: model(**batch).loss).backward()
        if step % options.every == 0:
            params = [p for p in model.parameters() if p.grad is not None]
            direction = Direction(optimizer.base, [1.0] * len(optimizer.param_groups))
            radius = optimizer.policy.radius(float(closure.loss), float(direction.slope()))
            if radius is not None:
                at = {id(p): i for i, p in enumerate(params)}
                zero = torch.zeros((), device=device)
                along = [
                    direction.unit * direction.tensors[at[id(p)]] if id(p) in at else zero for p in model.parameters()
                ]
                line = ([p.detach() for p in model.parameters()], along, radius)
                with torch.no_grad():
                    for name, (dtype, autocast) in PRECISIONS.items():
                        found = losses(copies[name], batch, line, autocast)
                        eps = torch.finfo(torch.bfloat16 if autocast else dtype).eps
                        noise = 0.0 if name == "fp64" else eps * abs(found[1])
                        fits[name].append(fit_losses(*found, radius, noise=noise))
        optimizer.step(closure)

    print("| precision | probes | accepted | below noise | wrong slope | wrong curvature |\n|---|---|---|---|---|---|")
    for name, own in fits.items():
        verdicts = Counter(str(fit.verdict) for fit in own)
        accepted = [(fit, exact) for fit, exact in zip(own, fits["fp64"], strict=True) if fit.verdict.usable]
        slope = sum(exact.slope >= 0 for _, exact in accepted) / max(len(accepted), 1)
        curvature = sum(exact.curvature <= 0 for _, exact in accepted) / max(len(accepted), 1)
        print(
            f"| {name} | {len(own)} | {len(accepted)} | {verdicts['below_noise']} | {slope:.1%} | {curvature:.1%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
