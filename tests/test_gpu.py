"""What only a GPU can show; skipped where there is none."""

import collections
import itertools
import json
import os
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.attention
from common import (
    Recorder,
    Replays,
    WithoutLQA,
    arguments,
    assert_same_weights,
    language_rows,
    launch,
    rows,
    tiny_bert,
    tiny_llama,
    weights,
)
from torch import nn
from transformers import Trainer, TrainerCallback

import hf_lqa
from hf_lqa import LQA, ReplayedLoss, products

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for `repeatable`, read when CUDA starts
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
ROOT = Path(__file__).parent.parent
EVERY = {"optim": "lqa_paper", "optim_args": "base=adamw_torch_fused,probe_interval=1,tau=0.02", "use_cpu": False}
PRECISIONS = {"fp32": {}, "bf16": {"bf16": True}, "fp16": {"fp16": True}}


def run(folder, model=None, data=None, **changes):
    model = tiny_bert() if model is None else model
    trainer = hf_lqa.LQATrainer(
        model, arguments(folder, **{"max_steps": 4, **EVERY, **changes}), train_dataset=data or rows()
    )
    recorder, replays = Recorder(trainer), Replays(trainer)
    trainer.train()
    return trainer, recorder, replays


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_replay_is_the_training_loss_bit_for_bit(precision, accumulation, tmp_path):
    settings = {"gradient_accumulation_steps": accumulation, **PRECISIONS[precision]}
    trainer, recorder, replays = run(tmp_path, **settings)
    assert next(trainer.model.parameters()).is_cuda
    assert len(replays.pairs) >= 4 - (precision == "fp16")
    assert all(trained == again for trained, again in replays.pairs), replays.pairs
    assert len({*recorder.steps[-1]["losses"]}) == 3


@pytest.mark.parametrize("precision", PRECISIONS)
def test_slopes_are_those_of_the_unscaled_loss(precision, tmp_path):
    """The slope of the probes against the gradient's, which the radius shows: radius = tau loss / abs(g d)."""
    # Close to the derivative; where rounding errors need a longer way, at least of its order: fp16's scale is 65,536.
    tau, factor = (0.002, 1.05) if precision == "fp32" else (0.02, 5)
    settings = {"optim_args": f"base=adamw_torch_fused,probe_interval=1,tau={tau}", **PRECISIONS[precision]}
    _, recorder, _ = run(tmp_path, tiny_bert(dropout=0.0), **settings)
    for step in recorder.steps:
        from_gradient = tau * abs(step["losses"][1]) / step["radius"]
        assert 1 / factor < abs(step["slope"]) / from_gradient < factor, step


class Overflow(TrainerCallback):
    """Lets the scaled gradients of one step overflow, as fp16's do."""

    def __init__(self, trainer, at):
        self.trainer, self.weights, self.scales, self.counts = trainer, [], [], []
        backward = trainer.accelerator.backward

        def overflowing(loss, **kwargs):
            backward(loss, **kwargs)
            if trainer.state.global_step == at:
                next(trainer.model.parameters()).grad.view(-1)[0] = float("inf")

        trainer.accelerator.backward = overflowing
        trainer.add_callback(self)

    def on_step_begin(self, args, state, control, **kwargs):
        self.weights.append(weights(self.trainer.model))

    def on_step_end(self, args, state, control, **kwargs):
        self.scales.append(self.trainer.accelerator.scaler.get_scale())
        self.counts.append(self.trainer.lqa.counts["steps"])


def test_fp16_overflow_skips_the_step_and_nothing_else(tmp_path):
    trainer = hf_lqa.LQATrainer(tiny_bert(), arguments(tmp_path, max_steps=6, fp16=True, **EVERY), train_dataset=rows())
    overflow = Overflow(trainer, at=2)
    trainer.train()
    assert_same_weights(overflow.weights[2], overflow.weights[3])
    assert any(not torch.equal(a, b) for a, b in zip(*(overflow.weights[i].values() for i in (3, 4)), strict=True))
    assert overflow.scales[2] == overflow.scales[1] / 2
    assert overflow.counts[2] == overflow.counts[1] and trainer.lqa.last_probe.step == trainer.lqa.counts["steps"] - 1
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


@pytest.mark.parametrize("precision", PRECISIONS)
def test_it_learns_in_every_precision(precision, tmp_path):
    trainer = hf_lqa.LQATrainer(
        tiny_bert(), arguments(tmp_path, max_steps=80, use_cpu=False, **PRECISIONS[precision]), train_dataset=rows()
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


@pytest.fixture
def repeatable():
    """Kernels that sum in the same order each time."""
    torch.use_deterministic_algorithms(True)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_probes_leave_no_trace_in_training(precision, tmp_path, repeatable):
    settings = {"use_cpu": False, "max_steps": 20, **PRECISIONS[precision]}
    ours = hf_lqa.LQATrainer(
        tiny_bert(), arguments(tmp_path, optim_args="probe_interval=3", **settings), train_dataset=rows()
    )
    recorder = Recorder(ours)
    ours.train()
    assert ours.lqa.counts["probe_forwards"] >= 10 and len(set(recorder.steps[-1]["multipliers"])) > 1
    stock = Trainer(
        tiny_bert(),
        arguments(tmp_path, optim="adamw_torch_fused", **settings),
        train_dataset=rows(),
        callbacks=[WithoutLQA(recorder.steps)],
    )
    stock.train()
    assert_same_weights(weights(stock.model), weights(ours.model))


def test_torch_compile(tmp_path):
    _, recorder, replays = run(tmp_path, tiny_bert(dropout=0.0), max_steps=2, torch_compile=True)
    _, eager, _ = run(tmp_path / "eager", tiny_bert(dropout=0.0), max_steps=2)
    assert all(a == pytest.approx(b, rel=1e-5) for a, b in replays.pairs)
    for step, reference in zip(recorder.steps, eager.steps, strict=True):
        assert step["losses"] == pytest.approx(reference["losses"], rel=1e-4)


def prepared(sizes=(64, 64, 64), weight_decay=0.0, **options):
    """Models with the same weights and gradients, each with LQA or its base, after two steps."""
    found = []
    for with_lqa in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))).cuda()
        base = torch.optim.AdamW(
            model.parameters(), lr=1.0 if with_lqa else 1e-3, weight_decay=weight_decay, fused=True
        )
        optimizer = LQA(base, **options) if with_lqa else base
        for _ in range(2):
            optimizer.zero_grad()
            closure = ReplayedLoss(model)
            closure.record(lambda model=model: model(torch.ones(4, sizes[0], device="cuda")).square().mean()).backward()
            optimizer.step(*((closure,) if with_lqa else ()))
        found.append((model, optimizer, closure))
    return found


def kernels(step):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    return [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]


def synchronizations(step):
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return len([w for w in caught if "synchroniz" in str(w.message)])


@pytest.mark.parametrize("depth", [3, 40])
def test_a_step_without_probe_looks_at_its_gradients_once_and_launches_what_the_base_launches(depth):
    (_, lqa, _), (_, base, _) = prepared((64,) * depth, rule="paper", probe_interval=100)
    assert (synchronizations(lqa.step), synchronizations(base.step)) == (1, 0)
    ours, theirs = collections.Counter(kernels(lqa.step)), collections.Counter(kernels(base.step))
    assert not theirs - ours and (ours - theirs).total() <= 20, "the largest elements of all, whatever the depth"


@pytest.mark.parametrize("depth", [2, 40])
def test_a_probe_waits_three_times_and_a_measured_step_once_whatever_the_depth(depth):
    # Once to see that gradients are finite, once for the slope that gives the radius, once for both losses; with weight
    # decay once for the rehearsal's scale.
    for weight_decay, expected in ((0.0, 3), (0.1, 4)):
        (_, lqa, closure), _ = prepared((64,) * depth, weight_decay, rule="paper", probe_interval=1)
        assert synchronizations(lambda lqa=lqa, closure=closure: lqa.step(closure)) == expected
    (_, lqa, _), _ = prepared((64,) * depth)
    assert not lqa.wants_probe and lqa.rule.wants_measurement(lqa.counts["steps"])
    assert synchronizations(lqa.step) == 1


def test_launches_of_a_measured_step_do_not_grow_with_the_depth():
    counts = []
    for depth in (3, 40):
        (_, lqa, _), (_, base, _) = prepared((64,) * depth)
        lqa.rule.multipliers = lambda count: []  # several have launches of their own
        assert lqa.rule.wants_measurement(lqa.counts["steps"])
        counts.append(len(kernels(lqa.step)) - len(kernels(base.step)))
    assert counts[1] <= counts[0] + 10, counts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_gradients_say_of_moves_at_once_is_what_they_say_one_after_the_other(dtype):
    sides = [[torch.randn(n, 700, device="cuda").to(dtype) for n in (3, 1, 900, 7000)] for _ in range(3)]
    together = products.along_moves(*sides)
    for i, (gradient, now, before) in enumerate(zip(*sides, strict=True)):
        move = now.double() - before.double()
        terms = gradient.double() * move
        assert float(together[0, i]) == pytest.approx(float(terms.sum()), abs=1e-6 * float(terms.abs().sum()))
        signs = float((torch.sign(gradient) * torch.sign(move)).sum(dtype=torch.float64))
        slope, alone = products.along_move(gradient, now, before).tolist()
        assert slope == pytest.approx(float(together[0, i]), rel=1e-3)
        assert float(together[1, i]) == alone == signs


def test_different_rates_launch_the_base_once_for_each():
    (_, lqa, _), (_, base, _) = prepared((64,) * 12, rule="paper", probe_interval=100)
    one = len(kernels(base.step))
    lqa.rule.multipliers = lambda count: [2.0 ** (i % 4 / 2) for i in range(count)]
    lqa.step()
    # Beside them the gradients are looked at, whether they are finite.
    assert synchronizations(lqa.step) == 1
    assert len(kernels(lqa.step)) <= 4 * one + 20


def first_rank(spec, folder, launcher=None):
    done = launch(1, [spec], folder, launcher=launcher)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads((Path(spec["out"]) / "rank0.json").read_text())


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_nccl_with_one_process(kind, tmp_path):
    options = {**EVERY, "max_steps": 3, "lr_scheduler_type": "constant", "optim_args": "probe_interval=1,tau=0.3"}
    spec = {"model": "llama", "arguments": options, "out": str(tmp_path / "run")}
    if kind == "fsdp2":
        spec["state_dict_type"] = "SHARDED_STATE_DICT"
    found = first_rank(spec, tmp_path)
    assert found["sharded"] == (kind == "fsdp2")
    _, recorder, _ = run(tmp_path / "alone", tiny_llama(), language_rows(128), **options)
    for step, reference in zip(found["steps"], recorder.steps, strict=True):
        for key in ("slope", "curvature", "step_size"):
            assert step[key] == pytest.approx(reference[key], rel=1e-2), (step["step"], key)


@pytest.mark.parametrize("name", ["one_gpu_bf16", "one_gpu_fp16"])
def test_the_configurations_for_a_gpu_run(name, tmp_path):
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / f"configs/accelerate/{name}.yaml")]
    spec = {"arguments": {"use_cpu": False, "max_steps": 3}, "out": str(tmp_path / "run")}
    found = first_rank(spec, tmp_path, launcher)
    assert found["steps"][-1]["forwards"] > 0
    assert (found["type"], found["precision"]) == ("NO", name.removeprefix("one_gpu_"))
