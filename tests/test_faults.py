"""Whatever goes wrong, the weights, the gradients and both optimizers are what they were, or the error is clear."""

import copy
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from common import arguments, assert_same_weights, rows, tiny_bert, trained, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import hf_lqa
from hf_lqa import LQA, ReplayedLoss
from hf_lqa.options import parse_options
from hf_lqa.rule import build


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Tanh(), nn.Linear(8, 3))


def started(rule="displacement"):
    """A network in the middle of training, with gradients, and the closure of the step that is due."""
    model = network()
    optimizer = LQA(torch.optim.AdamW(model.parameters(), lr=1.0), rule, probe_interval=1)
    generator = torch.Generator().manual_seed(1)
    closure = None
    for step in range(4):
        x, y = torch.randn(16, 6, generator=generator), torch.randint(0, 3, (16,), generator=generator)
        closure = ReplayedLoss(model)
        optimizer.zero_grad()
        closure.record(lambda x=x, y=y: nn.functional.cross_entropy(model(x), y)).backward()
        if step < 3:
            optimizer.step(closure)
    return model, optimizer, closure


def everything(model, optimizer):
    """All that a step may change, in one comparable string of bytes per name."""
    state = optimizer.state_dict()
    tensors = {f"w.{k}": v for k, v in model.state_dict().items()}
    tensors |= {f"g.{k}": p.grad for k, p in model.named_parameters()}
    tensors |= {f"s.{i}.{k}": v for i, s in state["state"].items() for k, v in s.items()}
    tensors["rng"] = torch.get_rng_state()
    found = {k: v.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() for k, v in tensors.items()}
    own = [{k: v for k, v in group.items() if k != "params"} for group in state["param_groups"]]
    numpy_state = np.random.get_state()
    return found | {
        "groups": repr(own),
        "python": repr(random.getstate()),
        "numpy": (numpy_state[1].tobytes(), numpy_state[2]),
    }


class Breaks:
    """A closure that fails at one of its calls."""

    def __init__(self, closure, call, with_loss):
        self.closure, self.call, self.calls = closure, call, 0
        self.relative_noise = closure.relative_noise
        if with_loss:
            self.loss = closure.loss

    def __call__(self):
        self.calls += 1
        value = self.closure()
        if self.calls == self.call:
            raise RuntimeError("out of memory")
        return value


@pytest.mark.parametrize("rule", ["displacement", "paper"])
@pytest.mark.parametrize(("with_loss", "call"), [(True, 1), (True, 2), (False, 1), (False, 2), (False, 3)])
def test_a_closure_that_raises_has_changed_nothing_and_can_be_tried_again(rule, with_loss, call):
    model, optimizer, closure = started(rule)
    before = everything(model, optimizer)
    broken = Breaks(closure, call, with_loss)
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step(broken)
    assert everything(model, optimizer) == before
    # Nor is anything lost in a checkpoint that is saved in between.
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.step(broken)
    other_model, other, undisturbed = started(rule)
    other.step(Breaks(undisturbed, None, with_loss))
    assert everything(model, optimizer) == everything(other_model, other)


def test_a_forward_that_raises_midway_leaves_the_buffers():
    model, optimizer, closure = started()
    before = everything(model, optimizer)

    def fail(*_):
        raise RuntimeError("midway")

    handle = model[4].register_forward_pre_hook(fail)  # after BatchNorm and Dropout
    with pytest.raises(RuntimeError, match="midway"):
        optimizer.step(closure)
    handle.remove()
    assert everything(model, optimizer) == before


def test_a_base_optimizer_that_raises_in_its_rehearsal_has_changed_nothing():
    model, optimizer, closure = started()
    before = everything(model, optimizer)
    own, calls = type(optimizer.base).step, []

    class Broken(torch.optim.AdamW):
        def step(self, closure=None):
            calls.append(1)
            own.__wrapped__(self) if hasattr(own, "__wrapped__") else own(self)
            if len(calls) == 2:  # after some of the parameters
                raise RuntimeError("kernel")

    optimizer.base.__class__ = Broken
    with pytest.raises(RuntimeError, match="kernel"):
        optimizer.step(closure)
    optimizer.base.__class__ = torch.optim.AdamW
    assert everything(model, optimizer) == before


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize("rule", ["displacement", "paper"])
def test_a_probe_that_is_not_finite_is_a_verdict(rule, call, value):
    model, optimizer, closure = started(rule)
    held, calls = optimizer.base_step_size, []

    def closure_with_a_hole():
        calls.append(1)
        return torch.tensor(value) if len(calls) == call else closure()

    closure_with_a_hole.loss = closure.loss
    twin_model, twin, undisturbed = started(rule)
    optimizer.step(closure_with_a_hole)
    assert optimizer.last_probe.fit.verdict == "non_finite" and optimizer.counts["non_finite"] == 1
    if rule == "paper":
        # The step is the base optimizer's at the held rate.
        assert optimizer.step_size == held
        for group in twin.base.param_groups:
            group["lr"] = held
        twin.base.step()
    else:
        # Nothing depends on a probe that is not the first.
        twin.step(undisturbed)
    assert_same_weights(weights(model), weights(twin_model))
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_gradients_that_are_not_finite_are_skipped(value):
    model, optimizer, closure = started()
    model[0].weight.grad[0, 0] = value
    before, state = weights(model), copy.deepcopy(optimizer.base.state_dict()["state"])
    optimizer.step(closure)
    assert_same_weights(weights(model), before)
    assert all(
        torch.equal(v, state[i][k]) for i, s in optimizer.base.state_dict()["state"].items() for k, v in s.items()
    )
    assert optimizer.counts["skipped"] == 1


keys = st.sampled_from(
    [
        "tau",
        "probe_interval",
        "probe_radius",
        "eta",
        "warmup",
        "base",
        "probe_micro_batches",
        "momentum",
        "lr",
        "",
        "ta u",
    ]
)
values = st.one_of(
    st.sampled_from(
        [
            "0.1",
            "1",
            "0",
            "-1",
            "nan",
            "inf",
            "1e400",
            "None",
            "True",
            "sgd",
            "adamw_torch",
            "lqa",
            "lomo",
            "",
            "=",
            "1,",
        ]
    ),
    st.floats().map(repr),
    st.integers().map(str),
    st.text(max_size=5),
)


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(["lqa", "lqa_sgd", "lqa_paper"]), st.lists(st.tuples(keys, values), max_size=3))
def test_any_optim_args_are_right_or_a_clear_error(name, pairs):
    class Arguments:
        optim, optim_args = name, ",".join(f"{k}={v}" for k, v in pairs)

    try:
        options = parse_options(Arguments)
    except ValueError as error:
        assert "optim_args" in str(error)
        return
    LQA(torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=1.0), options.rule, **options.rule_options)
    for value in options.rule_options.values():
        assert value is None or math.isfinite(value)
    rule, radius = build(options.rule, options.rule_options)
    assert 0 < radius.tau < 1 and rule.config.probe_interval >= 1
    assert options.probe_micro_batches is None or options.probe_micro_batches >= 1


def test_a_run_survives_an_interrupted_save(tmp_path):
    """The newest checkpoint was cut off: an error that names it, and the one before it still resumes bit for bit."""
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6, "optim_args": "probe_interval=2"}
    straight = trained(tmp_path / "run", **settings)
    newest = tmp_path / "run" / "checkpoint-4"
    optimizer_file = newest / "optimizer.pt"
    optimizer_file.write_bytes(optimizer_file.read_bytes()[:1000])
    with pytest.raises(Exception, match=r"(?i)zip|archive|pickle|checkpoint|corrupt"):
        trained(tmp_path / "other", resume_from_checkpoint=str(newest), **settings)
    resumed = trained(tmp_path / "again", resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"), **settings)
    assert_same_weights(weights(resumed.model), weights(straight.model))


def test_state_of_lqa_in_a_checkpoint_that_is_cut_off_is_an_error_before_anything_is_loaded():
    model, optimizer, _ = started()
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"][0]["lqa"] = state["param_groups"][0]["lqa"][:20]
    before = everything(model, optimizer)
    with pytest.raises(json.JSONDecodeError):
        optimizer.load_state_dict(state)
    assert everything(model, optimizer) == before


def test_micro_batches_of_an_interrupted_step_are_forgotten(tmp_path):
    """KeyboardInterrupt, or out of memory under auto_find_batch_size; then the same Trainer trains again."""

    class Interrupted(hf_lqa.LQATrainer):
        interrupt = True

        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            if self.interrupt:
                raise KeyboardInterrupt
            return loss

    settings = {"max_steps": 3, "gradient_accumulation_steps": 2}
    trainer = Interrupted(tiny_bert(dropout=0.0), arguments(tmp_path, **settings), train_dataset=rows())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.interrupt = False
    trainer.train()
    reference = trained(tmp_path / "reference", tiny_bert(dropout=0.0), **settings)
    assert trainer.lqa.last_probe == reference.lqa.last_probe
    assert_same_weights(weights(trainer.model), weights(reference.model))


KILLED = """
import os, sys
import torch
from common import trained
from hf_lqa.prober import Prober
torch.set_num_threads(1)
observed = Prober.observed

def die(self, probed):
    if probed.record.step == 4:
        os._exit(9)  # the probe of the fifth step is done, the step is not
    observed(self, probed)

Prober.observed = die
trained(sys.argv[1], save_strategy="steps", save_steps=3, max_steps=6, optim_args="probe_interval=2")
"""


def test_a_process_that_is_killed_between_probe_and_step_resumes(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6, "optim_args": "probe_interval=2"}
    straight = trained(tmp_path / "straight", **settings)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-c", KILLED, str(tmp_path / "killed")]
    assert subprocess.run(command, env=environment, capture_output=True, timeout=300).returncode == 9
    checkpoint = tmp_path / "killed" / "checkpoint-3"
    resumed = trained(tmp_path / "killed", resume_from_checkpoint=str(checkpoint), **settings)
    assert_same_weights(weights(resumed.model), weights(straight.model))
    assert resumed.lqa.counts == straight.lqa.counts


@pytest.mark.parametrize(
    "change, message",
    [
        ({"version": 5}, "is of version 5, this hf_lqa reads version 6"),
        ({"version": None}, "is of version None"),
        ({"rule": {"name": "paper", "state": {}}}, "saved with the rule 'paper', not 'displacement'"),
    ],
)
def test_a_state_of_another_version_or_rule_is_refused_before_anything_is_loaded(change, message):
    weights = torch.nn.Parameter(torch.ones(3))
    lqa = LQA(torch.optim.AdamW([weights], lr=1.0))
    (weights**2).sum().backward()
    lqa.step(lambda: (weights**2).sum().detach())
    state, before = lqa.state_dict(), lqa.state_dict()
    state["param_groups"][0]["lqa"] = json.dumps({**json.loads(state["param_groups"][0]["lqa"]), **change})
    with pytest.raises(ValueError, match=message):
        lqa.load_state_dict(state)
    assert lqa.state_dict()["param_groups"] == before["param_groups"]
