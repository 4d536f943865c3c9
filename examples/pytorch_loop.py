"""A training loop in plain PyTorch, without choosing a learning rate.

Three lines differ from a loop with AdamW: the optimizer is wrapped, the loss is recorded, and ``step`` gets what was
recorded. The data are made here, so that there is nothing to fetch::

    python examples/pytorch_loop.py --steps 200
"""

from __future__ import annotations

import argparse

import torch
from torch import nn

from hf_lqa import LQA, ReplayedLoss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)

    # Points on two interleaved spirals.
    angle = torch.rand(2000) * 9
    label = torch.randint(2, (2000,))
    radius = angle / 9
    points = torch.stack(
        [radius * torch.cos(angle + torch.pi * label), radius * torch.sin(angle + torch.pi * label)], 1
    )
    model = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))

    # lr multiplies what is measured; total_steps is what a Trainer would say.
    optimizer = LQA(torch.optim.AdamW(model.parameters(), lr=1.0), total_steps=args.steps)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=args.steps)
    for step in range(args.steps):
        rows = torch.randint(len(points), (args.batch_size,))
        closure = ReplayedLoss(model)
        loss = closure.record(lambda rows=rows: nn.functional.cross_entropy(model(points[rows]), label[rows]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(closure)
        schedule.step()
        if (step + 1) % max(1, args.steps // 10) == 0:
            print(f"step {step + 1}: loss {loss.item():.3f}, learning rate {optimizer.step_size:.2e}")

    model.eval()
    with torch.no_grad():
        accuracy = (model(points).argmax(1) == label).float().mean().item()
    print(f"accuracy: {accuracy:.3f}, probe forwards: {optimizer.counts['probe_forwards']}")
    print("next: put your model, data and loss in place of these, then torch.save(model.state_dict(), ...)")


if __name__ == "__main__":
    main()
