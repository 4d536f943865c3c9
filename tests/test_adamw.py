"""`LQAAdamW` where nothing of ours is around it: plain loops, a stock Trainer, Accelerate, a loss scale, Lightning."""

import copy
from collections.abc import Callable
from typing import Any

import lightning
import pytest
import torch
from accelerate import Accelerator
from common import arguments, rows, tiny_bert
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer

from hf_lqa import LQA, LQAAdamW, LQACallback, ReplayedLoss
from hf_lqa.rule.prior import PriorConfig, base_step_size

STEPS = 60


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))


def batches(count: int = STEPS) -> list[tuple[Tensor, Tensor]]:
    """Classes are a linear function of the inputs: a task that can be learned."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(count, 16, 8, generator=generator)
    targets = (inputs @ torch.randn(8, 4, generator=generator)).argmax(-1)
    return list(zip(inputs, targets, strict=True))


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: list[tuple[Tensor, Tensor]],
    step: Callable[[Tensor], Any] | None = None,
) -> list[float]:
    losses = []
    for batch in data:
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        if step is None:
            loss.backward()
            optimizer.step()
        else:
            step(loss)
        losses.append(loss.item())
    return losses


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_it_learns_in_a_plain_loop_from_the_rate_that_shapes_give():
    model, data = network(), batches()
    optimizer = LQAAdamW(model.parameters(), weight_decay=0.0, total_steps=STEPS)
    rates = []
    losses = train(model, optimizer, data[:1])
    start = base_step_size([tuple(p.shape) for p in model.parameters()], STEPS, PriorConfig())
    # AdamW's first update is its learning rate in each element, a small epsilon aside, and a ramp leads there.
    assert optimizer.base_step_size == pytest.approx(start, rel=1e-3)
    assert optimizer.step_size == pytest.approx(start / round(0.03 * STEPS), rel=1e-3)
    for batch in data[1:]:
        losses += train(model, optimizer, [batch])
        rates.append(optimizer.step_size)
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
    # Without a probe it does not grow; what is measured turns its steps.
    assert max(rates) == pytest.approx(start, rel=1e-3) and len({*optimizer.multipliers}) > 2
    assert optimizer.counts["probe_forwards"] == 0 and optimizer.last_probe is None


def test_it_is_lqa_around_an_adamw_bit_for_bit_also_with_closures():
    models = network(), network()
    own = LQAAdamW(models[0].parameters(), betas=(0.8, 0.99), eps=1e-6, weight_decay=0.05, total_steps=STEPS)
    base = torch.optim.AdamW(models[1].parameters(), lr=1.0, betas=(0.8, 0.99), eps=1e-6, weight_decay=0.05)
    for model, optimizer in zip(models, (own, LQA(base, total_steps=STEPS)), strict=True):
        for batch in batches(20):
            closure = ReplayedLoss(model)
            optimizer.zero_grad()
            closure.record(lambda model=model, batch=batch: loss_of(model, batch)).backward()
            optimizer.step(closure)
        assert optimizer.counts["probe_forwards"] >= 2
    assert torch.equal(weights(models[0]), weights(models[1]))


def test_it_goes_on_from_its_state_bit_for_bit():
    data, model = batches(), network()
    optimizer = LQAAdamW(model.parameters(), total_steps=STEPS)
    train(model, optimizer, data[:25])
    again = copy.deepcopy(model)
    resumed = LQAAdamW(again.parameters(), total_steps=STEPS)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert train(model, optimizer, data[25:]) == train(again, resumed, data[25:])
    assert torch.equal(weights(model), weights(again)) and resumed.counts == optimizer.counts


def test_under_a_loss_scale_it_takes_the_same_steps():
    data = batches(30)
    models = network(), network()
    plain, scaled = (LQAAdamW(model.parameters(), total_steps=30) for model in models)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    def step(loss: Tensor) -> None:
        scaler.scale(loss).backward()
        scaler.step(scaled)
        scaler.update()

    assert train(models[0], plain, data) == pytest.approx(train(models[1], scaled, data, step), rel=1e-5)
    assert scaled.base_step_size == pytest.approx(plain.base_step_size, rel=1e-4)


@pytest.mark.parametrize("scaled", [False, True])
def test_a_step_whose_gradient_overflows_changes_nothing(scaled):
    model = network()
    optimizer = LQAAdamW(model.parameters(), total_steps=STEPS)
    train(model, optimizer, batches(5))
    before = weights(model).clone()
    for p in model.parameters():
        p.grad = torch.full_like(p, float("inf"))
    if scaled:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
        scaler.scale(torch.ones(()))  # it knows a device only then
        scaler.step(optimizer)
    else:
        optimizer.step()
    assert torch.equal(weights(model), before) and optimizer.counts["skipped"] == (not scaled)


def stock(tmp_path: Any, *callbacks: Any, **changes: Any) -> Trainer:
    trainer = Trainer(
        model=tiny_bert(),
        args=arguments(tmp_path, optim="adamw_torch", **changes),
        train_dataset=rows(),
        callbacks=list(callbacks),
        optimizer_cls_and_kwargs=(LQAAdamW, {}),
    )
    trainer.train()
    return trainer


def test_a_stock_trainer_runs_it_and_the_callback_tells_it_the_steps_and_logs_the_rate(tmp_path):
    told, untold = stock(tmp_path, LQACallback(), max_steps=30), stock(tmp_path, max_steps=30)
    inside = told.optimizer.optimizer
    assert isinstance(inside, LQAAdamW) and inside.counts["steps"] == 30
    rates = [entry["learning_rate"] for entry in told.state.log_history if "loss" in entry]
    assert rates[-1] == inside.step_size and 0 < max(rates) < 0.3
    # Without it: the schedule's factor, and a run that might be of 1,000 steps.
    factors = [entry["learning_rate"] for entry in untold.state.log_history if "loss" in entry]
    assert factors[0] == 1.0 and factors == sorted(factors, reverse=True)
    first, other = (trainer.state.log_history[4]["loss"] for trainer in (told, untold))
    assert first != other and inside.base_step_size > untold.optimizer.optimizer.base_step_size


def test_a_stock_trainer_resumes_it(tmp_path):
    whole = stock(tmp_path / "whole", LQACallback(), save_strategy="steps", save_steps=8)
    again = Trainer(
        model=tiny_bert(seed=1),
        args=arguments(tmp_path / "again", optim="adamw_torch"),
        train_dataset=rows(),
        callbacks=[LQACallback()],
        optimizer_cls_and_kwargs=(LQAAdamW, {}),
    )
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-8"))
    assert torch.equal(weights(whole.model), weights(again.model))
    assert again.optimizer.optimizer.counts == whole.optimizer.optimizer.counts


def test_the_callback_refuses_another_optimizer(tmp_path):
    trainer = Trainer(
        model=tiny_bert(),
        args=arguments(tmp_path, optim="adamw_torch"),
        train_dataset=rows(),
        callbacks=[LQACallback()],
    )
    with pytest.raises(ValueError, match=r"LQACallback: the Trainer's optimizer is .*AdamW.*optimizer_cls_and_kwargs"):
        trainer.train()


def test_accelerate_prepares_it_and_accumulates():
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, data = network(), batches()
    wrapped, optimizer = accelerator.prepare(model, LQAAdamW(model.parameters(), total_steps=STEPS // 2))
    losses = []
    for batch in data:
        with accelerator.accumulate(wrapped):
            loss = loss_of(wrapped, batch)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert optimizer.optimizer.counts["steps"] == STEPS // 2 and sum(losses[-10:]) < 0.8 * sum(losses[:10])


class Automatic(lightning.LightningModule):
    """A module as it is under AdamW, but for the optimizer's name."""

    def __init__(self) -> None:
        super().__init__()
        self.model = network()
        self.losses: list[float] = []

    def training_step(self, batch: Any, _: int) -> Tensor:
        loss = loss_of(self.model, batch)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        return LQAAdamW(self.parameters(), total_steps=int(self.trainer.estimated_stepping_batches))


def test_lightning_optimizes_with_it_automatically_and_its_closure_is_probed(tmp_path):
    module = Automatic()
    trainer = lightning.Trainer(
        max_steps=STEPS,
        max_epochs=-1,
        default_root_dir=tmp_path,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(batches(), batch_size=None))
    optimizer = module.optimizers().optimizer
    assert optimizer.counts["steps"] == STEPS and optimizer.last_probe.radius > 0
    assert sum(module.losses[-10:]) < 0.7 * sum(module.losses[:10])
