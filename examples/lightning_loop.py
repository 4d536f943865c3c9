"""Training with Lightning, without choosing a learning rate.

Optimization is manual, because the closure of Lightning's automatic one runs backward, and what a probe asks for is the
loss alone. The data are made here, so that there is nothing to fetch::

    python examples/lightning_loop.py --steps 200
"""

from __future__ import annotations

import argparse
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from hf_lqa import LQA, ReplayedLoss


class Classifier(lightning.LightningModule):
    """A small classifier. It differs from one under AdamW in its optimizer, and in how ``step`` gets the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 4))

    def configure_optimizers(self) -> Any:
        steps = int(self.trainer.estimated_stepping_batches)
        optimizer = LQA(torch.optim.AdamW(self.parameters(), lr=1.0), total_steps=steps)
        return [optimizer], [torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=steps)]

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        inputs, targets = batch
        optimizer: Any = self.optimizers()
        schedule: Any = self.lr_schedulers()
        closure = ReplayedLoss(self)
        loss = closure.record(lambda: nn.functional.cross_entropy(self.model(inputs), targets))
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step(closure)
        schedule.step()
        self.log("loss", loss)
        self.log("learning_rate", optimizer.optimizer.step_size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--output_dir", default="out/lightning")
    args = parser.parse_args()
    lightning.seed_everything(0, verbose=False)

    inputs = torch.randn(2000, 20)
    targets = (inputs @ torch.randn(20, 4)).argmax(1)
    loader = DataLoader(TensorDataset(inputs, targets), batch_size=16, shuffle=True)
    module = Classifier()
    trainer = lightning.Trainer(
        max_steps=args.steps,
        max_epochs=-1,
        default_root_dir=args.output_dir,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader)

    module.eval()
    with torch.no_grad():
        accuracy = (module.model(inputs).argmax(1) == targets).float().mean().item()
    lqa: Any = trainer.optimizers[0]
    print(f"steps: {trainer.global_step}, learning rate {lqa.step_size:.2e}")
    print(f"accuracy: {accuracy:.3f}, probe forwards: {lqa.counts['probe_forwards']}")


if __name__ == "__main__":
    main()
