import json
import math

import pytest
import torch
from common import Recorder, WithoutLQA, arguments, assert_same_weights, logged, rows, tiny_bert, trained, weights
from transformers import Trainer, TrainerCallback

import hf_lqa
from hf_lqa import LQA
from hf_lqa.options import parse_options

KEYS = ["lqa_base_step_size", "lqa_slope", "lqa_curvature", "lqa_probe_radius", "lqa_loss_minus", "lqa_probe_forwards"]


def steps_probed(trainer, interval):
    """Steps that were probed, by the logs: at the interval, and at 4, 7 and 10 until a parabola opened downwards."""
    probed = {int(step) - 1 for step in logged(trainer, "lqa_probe_step")}
    regular = set(range(0, trainer.args.max_steps, interval))
    first = [step for step in (4, 7, 10) if step < trainer.args.max_steps and step not in regular]
    kept = [step for step in first if step in probed]
    assert probed == regular | set(kept) and kept == first[: len(kept)]
    assert kept == first or trainer.lqa.policy.convex is False
    assert trainer.lqa.counts["probe_forwards"] == logged(trainer, "lqa_probe_forwards")[-1] == 2 * len(probed)
    return probed


def test_it_trains_and_logs_what_it_chose(tmp_path):
    trainer = trained(tmp_path, max_steps=60, save_strategy="steps", save_steps=60)
    losses, rates = logged(trainer, "loss"), logged(trainer, "learning_rate")
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    assert rates[-1] == trainer.lqa.step_size and len(set(rates)) > 10
    assert 0 in steps_probed(trainer, 100)
    state = json.loads((tmp_path / "checkpoint-60" / "trainer_state.json").read_text())
    assert all(key in state["log_history"][0] for key in KEYS)
    assert all(math.isfinite(v) for entry in state["log_history"] for v in entry.values())


def test_the_first_steps_are_probed_again(tmp_path):
    """Short steps and always the same batch: none can overshoot before the second probe, whatever the rounding."""
    short = trained(tmp_path, tiny_bert(dropout=0.0), optim_args="tau=0.001", train_dataset=rows(8))
    assert {0, 4} <= steps_probed(short, 100)


@pytest.mark.parametrize("optim", ["lqa", "lqa_sgd", "lqa_paper"])
def test_the_three_names(optim, tmp_path):
    trainer = trained(tmp_path, optim=optim, max_steps=8)
    lqa = trainer.lqa
    expected = {"lqa": ("AdamW", "cross_batch"), "lqa_sgd": ("SGD", "cross_batch"), "lqa_paper": ("SGD", "paper")}
    assert (type(lqa.base).__name__, lqa.policy.name) == expected[optim]
    if optim == "lqa_paper":
        assert lqa.counts["probe_forwards"] == 16


@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_probe_at_the_origin_is_the_training_loss_bit_for_bit(accumulation, tmp_path):
    """With dropout, clipping and accumulation the recorded loss is what was back-propagated, and replays exactly."""
    seen = []

    class Checked(hf_lqa.LQATrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = super().training_step(model, inputs, num_items_in_batch)
            scalar = loss / self.accelerator.gradient_accumulation_steps  # not 1 before Transformers 5.5.4
            self.summed = scalar if self.summed is None else self.summed + scalar
            probe = self.lqa._armed
            if probe is not None:
                grads = [p.grad.clone() for p in model.parameters()]
                rng = torch.get_rng_state()
                assert len(probe) == accumulation
                assert torch.equal(probe.loss, self.summed)
                assert torch.equal(probe(), probe.loss)
                assert torch.equal(torch.get_rng_state(), rng)
                assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
                seen.append(float(probe.loss))
            if self.accelerator.sync_gradients:
                self.summed = None
            return loss

        summed = None

    settings = {"max_steps": 10, "gradient_accumulation_steps": accumulation, "optim_args": "probe_interval=2"}
    trainer = trained(tmp_path, trainer_class=Checked, **settings)
    assert len(set(seen)) == len(steps_probed(trainer, 2))


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 2}, {"bf16": True}], ids=str)
def test_probes_leave_no_trace_in_training(settings, tmp_path):
    """A stock AdamW that is given the chosen rates has the same losses and ends with the same weights, bit for bit."""
    options = arguments(tmp_path, max_steps=20, optim_args="probe_interval=3", **settings)
    ours = hf_lqa.LQATrainer(tiny_bert(), options, train_dataset=rows())
    recorder = Recorder(ours)
    ours.train()
    steps_probed(ours, 3)
    assert len(set(recorder.steps[-1]["relative_rates"])) > 1
    stock = Trainer(
        tiny_bert(),
        arguments(tmp_path, max_steps=20, optim=parse_options(ours.args).base, **settings),
        train_dataset=rows(),
        callbacks=[WithoutLQA(recorder.steps)],
    )
    stock.train()
    assert logged(stock, "loss") == logged(ours, "loss")
    assert logged(stock, "grad_norm") == logged(ours, "grad_norm")
    assert_same_weights(weights(stock.model), weights(ours.model))


def test_a_huge_interval_is_the_base_optimizer_for_100_steps(tmp_path):
    ours = trained(
        tmp_path, optim="lqa_paper", optim_args="base=adamw_torch,probe_interval=1000000", max_steps=100, seed=3
    )
    rates = logged(ours, "learning_rate")
    assert ours.lqa.counts["probe_forwards"] == 2
    # The linear schedule's factor times the one rate that was measured.
    assert rates == pytest.approx([rates[0] * (1 - step / 100) for step in range(100)])
    stock = Trainer(
        tiny_bert(),
        arguments(tmp_path, optim="adamw_torch", max_steps=100, seed=3),
        train_dataset=rows(),
        callbacks=[WithoutLQA([{"step_size": rate, "relative_rates": []} for rate in rates])],
    )
    stock.train()
    assert_same_weights(weights(stock.model), weights(ours.model))


@pytest.mark.parametrize("stop", [60, 61])
def test_resuming_is_as_if_never_interrupted(stop, tmp_path):
    settings = {"max_steps": 100, "save_strategy": "steps", "save_steps": stop, "gradient_accumulation_steps": 2}
    whole = trained(tmp_path / "whole", **settings)

    class Killed(Exception):
        pass

    class Kill(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == stop + 1:
                raise Killed

    trainer = hf_lqa.LQATrainer(
        tiny_bert(), arguments(tmp_path / "cut", **settings), train_dataset=rows(), callbacks=[Kill()]
    )
    with pytest.raises(Killed):
        trainer.train()
    # Another model: everything comes from the checkpoint.
    checkpoint = str(tmp_path / "cut" / f"checkpoint-{stop}")
    resumed = trained(tmp_path / "cut", tiny_bert(seed=9), resume_from_checkpoint=checkpoint, **settings)
    assert logged(resumed, "learning_rate") == logged(whole, "learning_rate")
    assert resumed.lqa.counts == whole.lqa.counts
    assert_same_weights(weights(resumed.model), weights(whole.model))


def test_resuming_from_another_optimizers_checkpoint_is_an_error(tmp_path):
    trained(tmp_path, trainer_class=Trainer, optim="adamw_torch", max_steps=4, save_strategy="steps", save_steps=2)
    with pytest.raises(ValueError, match="another optimizer"):
        trained(tmp_path, max_steps=4, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_options_reach_optimizer_and_base(tmp_path):
    trainer = trained(
        tmp_path,
        optim="lqa_sgd",
        optim_args="base=rmsprop, momentum=0.5, tau=0.02, probe_micro_batches=1",
        gradient_accumulation_steps=2,
        max_steps=3,
    )
    assert type(trainer.lqa.base) is torch.optim.RMSprop
    assert trainer.lqa.param_groups[0]["momentum"] == 0.5
    assert trainer.lqa.policy.tau == 0.02


def test_an_lqa_given_as_optimizers_is_probed_too(tmp_path):
    model = tiny_bert()
    optimizer = LQA(torch.optim.AdamW(model.parameters(), lr=1.0))
    trainer = hf_lqa.LQATrainer(
        model, arguments(tmp_path, optim="adamw_torch", max_steps=6), train_dataset=rows(), optimizers=(optimizer, None)
    )
    trainer.train()
    assert optimizer.counts["probe_forwards"] > 0
    assert logged(trainer, "learning_rate")[-1] == optimizer.step_size


def test_another_optim_is_left_alone(tmp_path):
    ours = trained(tmp_path, optim="adamw_torch", learning_rate=1e-3)
    stock = trained(tmp_path, trainer_class=Trainer, optim="adamw_torch", learning_rate=1e-3)
    assert ours.lqa is None
    for key in ("loss", "grad_norm", "learning_rate", "epoch"):
        assert logged(ours, key) == logged(stock, key)
    assert ours.state.log_history[0].keys() == stock.state.log_history[0].keys()
    assert_same_weights(weights(ours.model), weights(stock.model))


def test_a_nan_loss_never_reaches_the_weights(tmp_path):
    class Poisoned(hf_lqa.LQATrainer):
        def compute_loss(self, model, inputs, **kwargs):
            loss = super().compute_loss(model, inputs, **kwargs)
            return loss * math.nan if self.state.global_step in (0, 5, 8) else loss

    trainer = trained(tmp_path, trainer_class=Poisoned, max_steps=30)
    assert trainer.lqa.counts["skipped"] == 3
    assert logged(trainer, "lqa_skipped")[-1] == 3
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    assert logged(trainer, "learning_rate")[-1] > 0


def test_a_frozen_model_and_an_empty_batch_are_clear_errors(tmp_path):
    frozen = tiny_bert()
    frozen.requires_grad_(False)
    with pytest.raises(ValueError, match="frozen"):
        trained(tmp_path, frozen)
    with pytest.raises(ValueError, match="batch received was empty"):
        trained(tmp_path, train_dataset=[{}] * 16)


def test_a_training_step_that_cannot_be_replayed_is_an_error(tmp_path):
    class Twice(hf_lqa.LQATrainer):
        def compute_loss(self, model, inputs, **kwargs):
            return super().compute_loss(model, inputs, **kwargs)

    class Doubled(Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            self.compute_loss(model, self._prepare_inputs(inputs))
            return super().training_step(model, inputs, num_items_in_batch)

    class Mixed(hf_lqa.LQATrainerMixin, Doubled):
        pass

    trained(tmp_path, trainer_class=Twice, max_steps=2)
    with pytest.raises(ValueError, match=r"called compute_loss 2 times"):
        trained(tmp_path, trainer_class=Mixed, max_steps=2)


def test_it_says_what_it_does(tmp_path, capsys):
    trained(tmp_path, learning_rate=3e-4)
    out = capsys.readouterr().out
    assert "LQA: no --learning_rate is needed: AdamW's is measured" in out
    assert "LQA: learning rates from " in out


@pytest.mark.parametrize(
    "schedule, final",
    [
        ({"lr_scheduler_type": "linear"}, 0.0),
        ({"lr_scheduler_type": "linear", "warmup_steps": 2}, 0.0),
        ({"lr_scheduler_type": "cosine"}, 0.0),
        ({"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}}, 0.1),
        ({"lr_scheduler_type": "constant"}, 1.0),
        ({"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2}, 1.0),
        ({"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps"}, 1.0),
    ],
    ids=str,
)
def test_the_policy_knows_how_long_it_has_and_what_the_schedule_takes_back(schedule, final, tmp_path):
    args = arguments(tmp_path, **schedule)
    trainer = hf_lqa.LQATrainer(tiny_bert(), args, train_dataset=rows(), eval_dataset=rows(8))
    planned = []
    trainer.create_optimizer()
    trainer.lqa.policy.plan = lambda *known: planned.append(known)
    trainer.create_scheduler(20)
    assert planned == [(20, pytest.approx(final))]


def test_no_epochs_are_no_error(tmp_path):
    assert trained(tmp_path, num_train_epochs=0, max_steps=-1).state.global_step == 0
