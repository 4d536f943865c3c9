"""A training loop with Accelerate and gradient accumulation, without choosing a learning rate.

Works on one process and on several. The data are made here, so that there is nothing to fetch::

    accelerate launch --cpu examples/accelerate_loop.py
    torchrun --nproc_per_node 2 examples/accelerate_loop.py --cpu
"""

from __future__ import annotations

import argparse
import math

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from hf_lqa import LQA, ReplayedLoss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--accumulate", type=int, default=2)
    parser.add_argument("--cpu", action="store_true")
    args = parser.parse_args()
    accelerator = Accelerator(cpu=args.cpu, gradient_accumulation_steps=args.accumulate)
    set_seed(0)

    inputs = torch.randn(2000, 20)
    targets = (inputs @ torch.randn(20, 4)).argmax(1)
    loader = DataLoader(TensorDataset(inputs, targets), batch_size=16, shuffle=True)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 4))

    steps = args.epochs * math.ceil(math.ceil(len(loader) / accelerator.num_processes) / args.accumulate)
    lqa = LQA(torch.optim.AdamW(model.parameters(), lr=1.0), total_steps=steps)
    model, optimizer, loader = accelerator.prepare(model, lqa, loader)
    # accelerator.backward divides the loss by the number of micro-batches: so does what is probed.
    closure = None
    for epoch in range(args.epochs):
        for x, y in loader:
            with accelerator.accumulate(model):
                if closure is None:
                    closure = ReplayedLoss(model, weight=1 / args.accumulate)
                loss = closure.record(lambda x=x, y=y: nn.functional.cross_entropy(model(x), y))
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    # Accelerate's optimizer passes no closure on, so it is handed over before.
                    lqa.arm(closure)
                    closure = None
                    lqa.observe_clipping(accelerator.clip_grad_norm_(model.parameters(), 1.0), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        accelerator.print(f"epoch {epoch + 1}: loss {loss.item():.3f}, learning rate {lqa.step_size:.2e}")

    model.eval()
    with torch.no_grad():
        accuracy = (model(inputs.to(accelerator.device)).argmax(1) == targets.to(accelerator.device)).float().mean()
    accelerator.print(f"accuracy: {accuracy.item():.3f}, probe forwards: {lqa.counts['probe_forwards']}")
    accelerator.print("next: put your model, data and loss in place of these, then accelerator.save_model(model, ...)")
    # The DDP model first: gloo's threads are waited for safely only where nothing else holds the process group.
    model, optimizer, loader = accelerator.free_memory(model, optimizer, loader)
    accelerator.end_training()


if __name__ == "__main__":
    main()
