"""DDP and FSDP2 on gloo processes: every rank decides the same, and what one process would decide."""

import json
from pathlib import Path

import pytest
import torch
from common import Recorder, arguments, language_rows, launch, tiny_llama

import hf_lqa

DDP, FULL, SHARDED = {}, {"state_dict_type": "FULL_STATE_DICT"}, {"state_dict_type": "SHARDED_STATE_DICT"}
#: A schedule, so that a resumed run must find its place in it.
SAVING = {"max_steps": 18, "save_strategy": "steps", "save_steps": 15, "optim_args": "probe_interval=2"}
# A wide radius: float32 rounds second differences at the default one by more than the 1e-5 that is asserted below.
WHOLE = {"max_steps": 4, "optim_args": "probe_interval=1,tau=0.3", "lr_scheduler_type": "constant"}


class Result:
    def __init__(self, out, processes):
        self.ranks = [json.loads((out / f"rank{i}.json").read_text()) for i in range(processes)]
        self.steps, self.type = self.ranks[0]["steps"], self.ranks[0]["type"]
        self.sharded = self.ranks[0]["sharded"]
        self.weights = torch.load(out / "weights.pt")


def runs(folder, processes, kinds):
    """name -> Result; per kind a comparison with one process, one move of the root group alone, a resumed run."""
    specs = {}
    for name, kind in kinds.items():
        whole = {**WHOLE, "per_device_train_batch_size": 32 // processes}
        specs[f"{name}-whole"] = {"model": "llama", "arguments": whole, **kind}
        specs[f"{name}-root"] = {"train_only": "classifier", "arguments": {**WHOLE, "max_steps": 1}, **kind}
        specs[f"{name}-straight"] = {"arguments": SAVING, "sampled": True, **kind}
        checkpoint = folder / f"{name}-straight" / "trainer" / "checkpoint-15"
        specs[f"{name}-resumed"] = {"arguments": SAVING, "sampled": True, "resume": str(checkpoint), **kind}
    for name, spec in specs.items():
        spec["out"] = str(folder / name)
    done = launch(processes, list(specs.values()), folder)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return {name: Result(folder / name, processes) for name in specs}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return runs(tmp_path_factory.mktemp("two"), 2, {"ddp": DDP, "full": FULL, "sharded": SHARDED})


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    torch.set_num_threads(1)
    args = arguments(tmp_path_factory.mktemp("alone"), per_device_train_batch_size=32, **WHOLE)
    trainer = hf_lqa.LQATrainer(tiny_llama(), args, train_dataset=language_rows(128))
    recorder = Recorder(trainer)
    trainer.train()
    return recorder.steps


def same_decisions(result):
    assert all(rank["steps"] == result.steps for rank in result.ranks), "ranks decided differently"
    assert result.steps[-1]["forwards"] > 0


def near(left, right, relative):
    for a, b in zip(left, right, strict=True):
        for key in ("slope", "curvature", "step_size"):
            assert a[key] == pytest.approx(b[key], rel=relative), (a["step"], key)


@pytest.mark.parametrize("kind", ["ddp", "full", "sharded"])
def test_every_rank_decides_the_same_bit_for_bit(kind, two):
    for run in ("whole", "root", "straight", "resumed"):
        result = two[f"{kind}-{run}"]
        same_decisions(result)
        assert result.sharded == (kind != "ddp") and result.type == ("MULTI_CPU" if kind == "ddp" else "FSDP")


def test_two_processes_with_half_the_batch_measure_what_one_process_does(two, alone):
    # The first step is the same computation in another order; later ones start from weights that differ by rounding.
    near(two["ddp-whole"].steps[:1], alone[:1], 1e-5)
    near(two["ddp-whole"].steps, alone, 1e-3)


@pytest.mark.parametrize("kind", ["full", "sharded"])
def test_fsdp2_measures_what_ddp_does(kind, two):
    near(two[f"{kind}-whole"].steps[:1], two["ddp-whole"].steps[:1], 1e-5)
    near(two[f"{kind}-whole"].steps, two["ddp-whole"].steps, 1e-3)
    # Measured from the second step on, along the way from the weights of the first.
    ours, theirs = (two[name].steps[1:] for name in (f"{kind}-whole", "ddp-whole"))
    agreements, references = ([step["agreement"] for step in steps] for steps in (ours, theirs))
    assert len(agreements) == 3 and agreements == pytest.approx(references, abs=2e-3)
    assert max(map(abs, agreements)) > 0.03, "they would be near anyway"
    for step, reference in zip(ours, theirs, strict=True):
        largest = max(map(abs, reference["slopes"]))
        assert step["slopes"] == pytest.approx(reference["slopes"], rel=1e-3, abs=1e-3 * largest)


@pytest.mark.parametrize("kind", ["full", "sharded"])
def test_a_probe_moves_fsdp2s_root_group(kind, two):
    # Its weights stay gathered after a forward without gradient: moved shards would not be seen.
    (step,), (reference,) = two[f"{kind}-root"].steps, two["ddp-root"].steps
    minus, center, plus = step["losses"]
    assert minus > center > plus
    assert step["losses"] == pytest.approx(reference["losses"], rel=1e-6)
    near([step], [reference], 1e-2)  # second differences of nearly equal losses


@pytest.mark.parametrize("kind", ["ddp", "full", "sharded"])
def test_resuming_is_as_if_never_interrupted(kind, two):
    straight, resumed = two[f"{kind}-straight"], two[f"{kind}-resumed"]
    assert resumed.steps == straight.steps[15:]
    # By then every second step is measured.
    assert resumed.steps[1]["slopes"] != straight.steps[14]["slopes"], "nothing was measured: the beginning was lost"
    for name, weight in straight.weights.items():
        assert torch.equal(weight, resumed.weights[name]), name


def test_four_processes(tmp_path, alone):
    results = {}
    specs = {
        name: {"model": "llama", "arguments": {**WHOLE, "per_device_train_batch_size": 8}, "out": str(tmp_path / name)}
        for name in ("ddp", "sharded")
    }
    specs["sharded"] |= SHARDED
    done = launch(4, list(specs.values()), tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    for name in specs:
        results[name] = Result(tmp_path / name, 4)
        same_decisions(results[name])
        near(results[name].steps[:1], alone[:1], 1e-5)


def test_replays_with_autograd_on(two, tmp_path):
    """Neither DDP's reducer nor FSDP2's prefetching is confused by forwards that no backward follows."""
    kinds = {"ddp": DDP, "sharded": SHARDED}
    whole = {"model": "llama", "arguments": {**WHOLE, "per_device_train_batch_size": 16}, "autograd": True}
    specs = [{**whole, **kind, "out": str(tmp_path / name)} for name, kind in kinds.items()]
    done = launch(2, specs, tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    for name in kinds:
        result = Result(tmp_path / name, 2)
        same_decisions(result)
        assert result.steps == two[f"{name}-whole"].steps


def test_when_a_rank_dies_the_others_end_with_an_error(tmp_path):
    spec = {"arguments": {**WHOLE, "max_steps": 50}, "dies": 1, "out": str(tmp_path / "run")}
    done = launch(2, [spec], tmp_path, timeout=200)  # a hang is a TimeoutExpired
    assert done.returncode != 0
    assert "exitcode  : 3" in done.stderr and not (tmp_path / "run" / "rank0.json").exists()


def test_accelerate_launch_does_what_torchrun_does(two, tmp_path):
    config = Path(__file__).parent.parent / "configs" / "accelerate" / "two_cpu_processes.yaml"
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(config), "--main_process_port", "0"]
    whole = {**WHOLE, "per_device_train_batch_size": 16}
    spec = {"model": "llama", "arguments": whole, "out": str(tmp_path / "run")}
    done = launch(2, [spec], tmp_path, launcher=launcher)
    assert done.returncode == 0, done.stderr[-4000:]
    result = Result(tmp_path / "run", 2)
    same_decisions(result)
    assert result.steps == two["ddp-whole"].steps
