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
    """Steps that were probed, by the logs: at the interval."""
    probed = {int(step) - 1 for step in logged(trainer, "lqa_probe_step")}
    assert probed == set(range(0, trainer.args.max_steps, interval))
    assert trainer.lqa.counts["probe_forwards"] == logged(trainer, "lqa_probe_forwards")[-1] == 2 * len(probed)
    return probed


def test_it_trains_and_logs_what_it_chose(tmp_path):
    trainer = trained(tmp_path, max_steps=60, save_strategy="steps", save_steps=60)
    losses, rates = logged(trainer, "loss"), logged(trainer, "learning_rate")
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    assert rates[-1] == trainer.lqa.step_size and len(set(rates)) > 10
    assert steps_probed(trainer, 100) == {0}
    state = json.loads((tmp_path / "checkpoint-60" / "trainer_state.json").read_text())
    assert all(key in state["log_history"][0] for key in KEYS)
    assert all(math.isfinite(v) for entry in state["log_history"] for v in entry.values())


@pytest.mark.parametrize("optim", ["lqa", "lqa_sgd", "lqa_paper"])
def test_the_three_names(optim, tmp_path):
    trainer = trained(tmp_path, optim=optim, max_steps=8)
    lqa = trainer.lqa
    expected = {"lqa": ("AdamW", "displacement"), "lqa_sgd": ("SGD", "displacement"), "lqa_paper": ("SGD", "paper")}
    assert (type(lqa.base).__name__, lqa.rule.name) == expected[optim]
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
            probe = self.lqa.armed
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
    assert len(set(recorder.steps[-1]["multipliers"])) > 1
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
        callbacks=[WithoutLQA([{"step_size": rate, "multipliers": []} for rate in rates])],
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
    assert resumed.lqa.last_measurement == whole.lqa.last_measurement is not None
    assert_same_weights(weights(resumed.model), weights(whole.model))


def test_resuming_from_another_optimizers_checkpoint_is_an_error(tmp_path):
    trained(tmp_path, trainer_class=Trainer, optim="adamw_torch", max_steps=4, save_strategy="steps", save_steps=2)
    with pytest.raises(ValueError, match="another optimizer"):
        trained(tmp_path, max_steps=4, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_options_reach_optimizer_and_base(tmp_path):
    radii = {}
    for tau in ("0.02", "0.03"):
        options = f"base=rmsprop, momentum=0.5, tau={tau}, probe_micro_batches=1, probe_interval=2"
        trainer = trained(tmp_path, optim="lqa_sgd", optim_args=options, gradient_accumulation_steps=2, max_steps=3)
        assert type(trainer.lqa.base) is torch.optim.RMSprop
        assert trainer.lqa.param_groups[0]["momentum"] == 0.5
        assert logged(trainer, "lqa_probe_step") == [1, 3]
        radii[tau] = logged(trainer, "lqa_probe_radius")[0]
    assert radii["0.02"] == pytest.approx(2 / 3 * radii["0.03"], rel=0.01)


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


def test_the_rule_knows_how_long_it_has(tmp_path):
    trainer = hf_lqa.LQATrainer(tiny_bert(), arguments(tmp_path), train_dataset=rows())
    trainer.create_optimizer_and_scheduler(20)
    assert trainer.lqa.rule.total_steps == 20
    trained = {}
    for epochs in (1, 3):
        args = arguments(tmp_path, num_train_epochs=epochs, max_steps=-1)
        trainer = hf_lqa.LQATrainer(tiny_bert(), args, train_dataset=rows(16))
        trainer.train()
        trained[epochs] = trainer.lqa.rule.total_steps, trainer.state.global_step
    assert trained == {1: (2, 2), 3: (6, 6)}


def test_no_epochs_are_no_error(tmp_path):
    assert trained(tmp_path, num_train_epochs=0, max_steps=-1).state.global_step == 0
