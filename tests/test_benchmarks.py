"""The benchmark: every method runs, finished runs are not repeated, the report is written, the peers do as they say."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

for module in ("datasets", "evaluate", "matplotlib", "peft"):
    pytest.importorskip(module)

from tokenizers import Tokenizer, models, pre_tokenizers, processors  # noqa: E402
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "benchmarks"))

import cost  # noqa: E402
import gpu_cost  # noqa: E402
import gpu_quality  # noqa: E402
import held_out  # noqa: E402
import paper  # noqa: E402
import peers  # noqa: E402
import report  # noqa: E402
import run  # noqa: E402

PACKAGES = {
    "prodigy": "prodigyopt",
    "dadapt_adam": "dadaptation",
    "dog": "dog",
    "ldog": "dog",
    "momo_adam": "momo",
    "mechanic_adamw": "mechanic_pytorch",
    "schedule_free_adamw@2.5e-3+warmup": "schedulefree",
}
METHODS = [
    *("lqa", "lqa_sgd", "lqa_paper+constant", "adamw", "adamw@1e-3+warmup", "adamw@1e-3+constant"),
    *("sgd@1e-2+warmup+momentum=0.9", "sgd@1e-1+decay", "lqa+tau=0.1+eta=0.2"),
    *("bb", "salsa", "gen_adamw", "greedy"),
    *PACKAGES,
]
WORDS = "red green blue house tree river dog cat".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny encoder, a tiny language model, both with their tokenizer, and texts whose first word is the class."""
    folder = tmp_path_factory.mktemp("benchmark")
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    size = {"vocab_size": len(vocabulary), "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    encoder = BertModel(BertConfig(**size, intermediate_size=16))
    language = LlamaForCausalLM(LlamaConfig(**size, intermediate_size=16, num_key_value_heads=2, pad_token_id=0))
    for model, name in ((encoder, "encoder"), (language, "language")):
        model.save_pretrained(folder / name)
        fast.save_pretrained(folder / name)
    rows = [f"{WORDS[i % 3]} {WORDS[i % 7]} {WORDS[i % 5]},{i % 3}" for i in range(32)]
    for task in ("colours", "trec6", "tinyshakespeare"):
        (folder / task).mkdir()
        for split in ("train", "validation"):
            (folder / task / f"{split}.csv").write_text("\n".join(["text,label", *rows]))
            (folder / task / f"{split}.txt").write_text(" ".join(WORDS * 20))
    return folder


def benchmark(folder, results, *argv):
    run.main(["--data_dir", str(folder), "--results", str(results), "--seeds", "0", *map(str, argv)])
    return run.read(results)


SHORT = ("--max_steps", 2, "--batch_size", 4, "--max_length", 8)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_takes_two_steps(folder, tmp_path, method):
    if method in PACKAGES:
        pytest.importorskip(PACKAGES[method])
    (row,) = benchmark(
        folder, tmp_path / "r.jsonl", *SHORT, "--tasks", "colours", "--methods", method, "--model", folder / "encoder"
    )
    assert len(row["train_loss"]) == len(row["learning_rate"]) == 2
    assert math.isfinite(row["eval_loss"]) and 0 <= row["metric"] <= 1
    assert row["trivial_metric"] == pytest.approx(11 / 32)
    assert row["forward_equivalents"] == 6 + row["probe_forwards"]
    assert (row["probe_forwards"] > 0) == method.startswith(("lqa", "salsa"))


@pytest.mark.parametrize("task", run.LANGUAGE)
def test_language_models(folder, tmp_path, task):
    argv = (*SHORT, "--tasks", task, "--methods", "adamw@1e-3", "--model", folder / "language", "--max_eval_samples", 4)
    (row,) = benchmark(folder, tmp_path / "r.jsonl", *argv)
    assert row["metric"] == -row["eval_loss"] and row["trivial_metric"] == pytest.approx(-math.log(12), abs=0.5)


@pytest.mark.parametrize("task", [t for t in held_out.TASKS if not t.startswith((*held_out.TEXTS, "vit_scratch"))])
def test_held_out_tasks(folder, tmp_path, task):
    model = folder / ("language" if task.endswith("smollm2") else "encoder")
    argv = (*SHORT, "--tasks", task, "--methods", "lqa", "--max_eval_samples", 8)
    (row,) = benchmark(folder, tmp_path / "r.jsonl", *argv, *(() if task == "gpt2_scratch" else ("--model", model)))
    assert math.isfinite(row["eval_loss"]) and row["probe_forwards"] > 0


def test_the_report_knows_all_held_out_tasks():
    # It repeats their names, to need neither torch nor the tasks' data.
    assert sorted(report.HELD_OUT) == sorted(held_out.TASKS)


def test_what_the_held_out_tasks_train(folder):
    options = run.options_of(["--data_dir", str(folder), "--model", str(folder / "encoder")])
    trained = {}
    for task in held_out.CHANGED[:2]:
        model = run.load(task, run.filled(task, options)).model()
        trained[task] = {name for name, weights in model.named_parameters() if weights.requires_grad}
    assert trained["trec6_head"] == {"classifier.weight", "classifier.bias"}
    assert all("lora_" in name or "classifier" in name for name in trained["trec6_lora"])
    assert sum("lora_" in name for name in trained["trec6_lora"]) > 2
    tokenizer = run.AutoTokenizer.from_pretrained(folder / "encoder")
    rows = held_out.masked(tokenizer, folder / "tinyshakespeare" / "train.txt", 8, 0)
    again = held_out.masked(tokenizer, folder / "tinyshakespeare" / "train.txt", 8, 0)
    # Masked once for all: epochs and methods see the same.
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(rows, again, strict=True))
    guessed = sum(int((row["labels"] != -100).sum()) for row in rows)
    assert 0.05 < guessed / (8 * 27) < 0.3 and all((row["labels"] != -100).any() for row in rows)
    images = held_out.Vit()(torch.zeros(2, 3, 32, 32))
    assert images.shape == (2, 10)


@pytest.mark.parametrize("method", ["bb", "gen_adamw", "salsa"])
def test_schedulers_leave_the_rates_of_peers_alone(folder, tmp_path, method):
    argv = ("--tasks", "linear", "--max_steps", 60, "--methods", method)
    (row,) = benchmark(folder, tmp_path / "r.jsonl", *argv)
    rates = [rate / (1 - i / 60 if method == "gen_adamw" else 1) for i, rate in enumerate(row["learning_rate"])]
    assert max(rates[40:]) != pytest.approx(rates[0], rel=0.01)
    if method == "gen_adamw":
        # Seven probes from 5e-5 lead nowhere: it is not the base's own rate, 1, that moves the weights.
        assert row["train_loss"][-1] == pytest.approx(row["train_loss"][0], rel=0.5)


def test_finished_runs_are_not_repeated(folder, tmp_path, capsys):
    results = tmp_path / "r.jsonl"
    argv = ("--tasks", "linear", "--max_steps", 2, "--methods", "sgd@1e-2")
    assert len(benchmark(folder, results, *argv)) == 1
    assert len(benchmark(folder, results, *argv, "sgd@1e-1")) == 2
    assert "seed 0" in capsys.readouterr().out
    assert len(benchmark(folder, results, *argv)) == 2
    assert not capsys.readouterr().out
    # Lines of before there was an option were made with what is its default now.
    old = [
        {k: v for k, v in row.items() if k not in ("group_by_length", "max_grad_norm", "model")}
        for row in run.read(results)
    ]
    results.write_text("".join(json.dumps(row) + "\n" for row in old))
    assert len(benchmark(folder, results, *argv)) == 2
    assert len(benchmark(folder, results, *argv, "--max_grad_norm", 0)) == 3


def test_data_by_name(folder, tmp_path):
    data = " ".join(f"--{split}_file {folder / 'colours' / split}.csv" for split in ("train", "validation"))
    argv = ("--tasks", "mine", "--methods", "adamw", "--data_arguments", data, "--model", folder / "encoder")
    (row,) = benchmark(folder, tmp_path / "r.jsonl", *SHORT, *argv)
    assert row["task"] == "mine"


def test_the_table_can_be_planned(folder):
    options = run.options_of(["--table", "--data_dir", str(folder)])
    runs = run.plan(run.STAGES, options)
    assert len({json.dumps(run.identity(t, m, s, o)) for t, m, s, o in runs}) == len(runs) > 200
    for _, method, _, _ in runs:
        run.parse_method(method)
    with pytest.raises(SystemExit, match="nonsense"):
        run.plan(["nonsense"], options)
    with pytest.raises(SystemExit, match="nonsense"):
        run.parse_method("adamw@1e-3+nonsense")


def made_up(task, method, seed, loss, **changes):
    """A line of results."""
    row = {"task": task, "method": method, "seed": seed, "max_steps": 3, "batch_size": 4, "max_length": 8}
    row |= {"schedule": "linear", "max_eval_samples": None, "eval_loss": loss, "metric": 0.9, "trivial_metric": 0.5}
    row |= {"train_loss": [3.0, 2.0, loss], "learning_rate": [1e-4, 2e-4, 1e-4], "probe_forwards": 2}
    return row | {"train_seconds": 1.0, "machine": "paper", "torch": "2"} | changes


def test_report(tmp_path):
    rows = [made_up("trec6", "lqa", seed, 0.2 + 0.01 * seed) for seed in (0, 1)]
    for rate, loss in (("1e-4", 0.5), ("3e-4", 0.25), ("1e-3", 0.8)):
        rows += [made_up("trec6", f"adamw@{rate}+warmup", seed, loss) for seed in (0, 1)]
    rows += [made_up("trec6", "prodigy", 0, 0.3), made_up("trec6", "salsa", 0, math.nan, metric=0.1)]
    rows += [made_up("trec6", "lqa+tau=0.1", 0, 0.3), made_up("trec6", "lqa_paper", 0, 1.9)]
    rows += [made_up("trec6", method, 0, 0.4, max_steps=9) for method in ("lqa", "adamw@3e-4+warmup")]
    rows += [made_up("trec6", "lqa", seed, loss) for seed, loss in ((3, 0.2), (4, 0.28))]
    rows += [made_up("trec6", "adamw@3e-4+warmup", seed, 0.25) for seed in (3, 4)]
    rows += [made_up("trec6_head", method, 0, loss) for method, loss in (("lqa", 0.6), ("adamw@1e-3+warmup", 0.4))]
    rows += [made_up("linear", method, 0, 0.4) for method in ("lqa_paper+constant", "sgd@1e-2+constant", "bb")]
    results = tmp_path / "results.jsonl"
    results.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report.main([str(results)])
    text = (tmp_path / "REPORT.md").read_text()
    assert "| trec6 | 0.2050 ± 0.0050 | 0.2500 ± 0.0000 | 3e-04 | 0.820 | 0.9000 | 0.9000 | 2 of 2 |" in text
    before, after = text.split("### On tasks that the rule was not chosen on")
    row = "| trec6_head | 0.6000 | 0.4000 | 1e-03 (at the end of the sweep) | 1.500 |"
    assert "trec6_head" not in before and row in after
    title = "trec6: 3 steps, batch 4, 8 tokens, linear schedule, paper"
    assert f"| {title} | 0.2400 ± 0.0400 | 0.2500 ± 0.0000 | 3e-04 | 0.960 | 0.9000 | 0.9000 | 1 of 2 |" in text
    assert "| `lqa` | 1.00 | 0.800 | 1 |" in text and "| `prodigy` | 2.00 | 1.200 | 2 |" in text
    assert "- `salsa`: trec6 (seed 0)" in text and "| `salsa` | diverged |" in text
    assert "| trec6 | `tau=0.1` | 0.3000 | 1.500 |" in text
    assert "trec6: 9 steps" in text and "| linear | `lqa_paper+constant` |" in text
    for name in report.FIGURES:
        assert (tmp_path / name).stat().st_size < 150_000 and f"({name})" in text


def quadratic(curvatures=(1.0, 10.0)):
    """Weights, and the loss ½ Σ c w² with its gradient left in them."""
    weights = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    scale = torch.tensor(curvatures, dtype=torch.float64)

    def loss():
        return 0.5 * (scale * weights**2).sum()

    return weights, loss


def step(optimizer, loss):
    optimizer.zero_grad()
    value = loss()
    value.backward()
    optimizer.batch_loss = value.detach()
    optimizer.batch_closure = optimizer.fresh_closure = lambda: loss().detach()
    optimizer.step()
    return value.item()


def test_salsa_keeps_its_inequality():
    weights, loss = quadratic()
    optimizer = peers.SaLSa([weights])
    for _ in range(3):
        before, decrease, squared = loss().item(), optimizer.decrease, optimizer.squared
        origin = weights.detach().clone()
        step(optimizer, loss)
        # The direction is the gradient over its root mean square.
        preconditioned = (origin - weights.detach()) / optimizer.step_size
        assert optimizer.decrease == pytest.approx(0.9 * decrease + 0.1 * (before - loss().item()))
        assert optimizer.squared == pytest.approx(0.9 * squared + 0.1 * (weights.grad * preconditioned).sum().item())
        assert optimizer.decrease >= 0.5 * optimizer.step_size * optimizer.squared
    assert optimizer.forwards >= 3


def test_gen_finds_the_minimum_of_the_parabola():
    weights, loss = quadratic((4.0, 4.0))
    optimizer = peers.GeNAdamW([weights], lr=0.01)
    for _ in range(7):
        step(optimizer, loss)
    assert optimizer.level == 0.01 and optimizer.forwards == 0
    step(optimizer, loss)
    # The minimum lies further than twice the rate, to which it is bounded.
    assert optimizer.level == pytest.approx(0.9 * 0.01 + 0.1 * 0.02) and optimizer.forwards == 3


def test_gen_bound_is_not_hit_near_the_minimum():
    weights, loss = quadratic((4.0, 4.0))
    weights.data.fill_(0.015)
    optimizer = peers.GeNAdamW([weights], lr=0.01)
    optimizer.steps = 7
    step(optimizer, loss)
    # Adam's first step is the sign: from 0.015 the minimum is at rate 0.015.
    assert optimizer.level == pytest.approx(0.9 * 0.01 + 0.1 * 0.015, rel=1e-4)


def test_barzilai_borwein_finds_the_curvature():
    weights, loss = quadratic((5.0, 5.0))
    optimizer = peers.BarzilaiBorwein([weights], first=0.01, period=1)
    step(optimizer, loss)
    assert optimizer.rate == 0.01
    step(optimizer, loss)
    # The gradients are a step older than the weights, and the weights shrink by 5 % a step.
    assert optimizer.rate == pytest.approx(0.95 / 5)


def test_synthetic_tasks_are_the_same_each_time():
    for classes in (False, True):
        one, two = paper.synthetic(classes), paper.synthetic(classes)
        assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
    train, validation, model = paper.load("logistic", None)
    batch = train.__getitems__([0, 5])
    assert batch["inputs"].shape == (2, 50) and len(validation) == 1000
    assert model()(**batch)["loss"].item() == pytest.approx(math.log(2), abs=0.5)


def test_the_cost_is_measured_in_time_in_memory_and_part_by_part(capsys, monkeypatch):
    def measured(*arguments):
        options = ["--models", "llama-16", "--steps", "4", "--length", "4", *arguments]
        monkeypatch.setattr(sys, "argv", ["cost.py", *options])
        cost.main()
        rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line[:2] == "| "]
        return {row[0]: row[1:] for row in rows}

    table = measured("--optimizers", "adamw_again", "lqa")
    assert table["adamw_again"][-1] == "0" and table["lqa"][-1] == "1"
    assert all(float(table[name][0]) > 0 for name in ("adamw_again", "lqa"))
    parts = measured("--profile")
    assert {label for _, _, label in cost.PROFILED} < set(parts)
    assert all(float(parts[label][0]) > 0 for _, _, label in cost.PROFILED)
    assert float(parts["whole"][0]) > 1
    memory = measured("--memory", "--optimizers", "lqa")["llama-16"]
    assert 0 <= float(memory[-1]) <= 1.1, "more than a copy of the weights is kept between steps"


def numbers(value):
    if isinstance(value, dict):
        return [x for v in value.values() for x in numbers(v)]
    if isinstance(value, list):
        return [x for v in value for x in numbers(v)]
    return [value] if isinstance(value, (int, float)) else []


def test_all_costs_of_an_accelerator_are_written_to_one_file(tmp_path, monkeypatch, capsys):
    file = tmp_path / "costs.json"
    monkeypatch.setattr(sys, "argv", ["cost.py", "--gpu", str(file), "--device", "cpu", "--tiny"])
    cost.main()
    found = json.loads(file.read_text())
    assert found["skipped"] == [] and found["machine"]["torch"] == torch.__version__
    assert [len(found[part]) for part in ("cells", "steps", "memory")] == [2, 1, 1]
    assert all(map(math.isfinite, numbers(found)))
    for cell in found["cells"]:
        assert {*cell["kinds"]} == {*gpu_cost.KINDS}, cell["cell"]
        assert sum(kind["count"] for kind in cell["kinds"].values()) == cell["steps"] == 36
        assert cell["base_ms"] > 0 and cell["control"] > 0 and cell["counts"]["probe_forwards"] > 2
        assert all(kind["ms"] > 0 and kind["ratio"] > 0 for kind in cell["kinds"].values())
        assert all(ratio > 0.5 for ratio in cell["projected"].values()) and cell["whole"] is None
    for traced in found["steps"]:
        assert {*traced["kinds"]} == {"base", *gpu_cost.KINDS}
        # Without a GPU there is no time of one.
        assert [{*sides} for sides in traced["shares"].values()] == [{"host"}] * 2
        for sides in traced["shares"].values():
            assert sum(sides["host"].values()) == pytest.approx(1)
            assert {"training", "probe", "measured", "base", "lqa"} <= {*sides["host"]}
        launches = {kind: sum(step["launches"].values()) for kind, step in traced["kinds"].items()}
        assert launches["base"] <= launches["ordinary"] < launches["measured"] < launches["probe"]
        # The rehearsal's steps of the base are the probe's.
        base = [traced["kinds"][kind]["launches"]["base: step"] for kind in ("ordinary", "probe")]
        assert base[0] == base[1] > 0
        ordinary = traced["kinds"]["ordinary"]["host_ms"]
        assert not any(label.startswith(("probe", "measured")) for label in ordinary), ordinary
    assert all(0 <= memory["held"] <= 2.1 for memory in found["memory"])
    assert "launches and waits" in capsys.readouterr().out


def test_what_there_is_no_time_or_no_room_for_is_named(tmp_path, monkeypatch):
    def full(cell, device, deadline):
        raise torch.OutOfMemoryError("CUDA out of memory")

    for part in ("paired", "trace"):
        monkeypatch.setattr(gpu_cost, part, full)
    monkeypatch.setattr(gpu_cost, "weigh", lambda cell, device: full(cell, device, 0.0))
    found = gpu_cost.measure_all(tmp_path / "a.json", "cpu", 0.0, tiny=True)
    assert len(found["skipped"]) == 4 and all("out of time" in line for line in found["skipped"])
    found = gpu_cost.measure_all(tmp_path / "b.json", "cpu", 1.0, tiny=True)
    assert [line.partition(": ")[0] for line in found["skipped"]] == ["cells", "steps", "memory", "cells"]
    assert all("out of memory" in line for line in found["skipped"]) and (tmp_path / "b.json").exists()


def test_steps_of_each_kind_make_up_a_run():
    for steps in (30, 200, 2000):
        kinds = gpu_cost.kinds_of(steps)
        assert sum(kinds.values()) == steps and kinds["first_probe"] == 1
        assert kinds["probe"] == 3 + (steps - 1) // 100
    assert gpu_cost.projected(dict.fromkeys(gpu_cost.KINDS, 1.5), 200) == pytest.approx(1.5)
    assert gpu_cost.projected({"probe": 2.0}, 200) is None


def test_quality_needs_local_files_and_no_data_set_library(folder, tmp_path):
    """In a process in which what a machine for measuring lacks cannot be imported."""
    file = tmp_path / "quality.json"
    given = ["--quality", file, "--data_dir", folder, "--encoder", folder / "encoder", "--decoder", folder / "language"]
    argv = ["cost.py", *map(str, given), "--tiny", "--device", "cpu"]
    code = (
        "import sys; sys.modules |= dict.fromkeys(['datasets', 'evaluate', 'trl'])\n"
        f"sys.path.insert(0, {str(Path(cost.__file__).parent)!r}); sys.argv = {argv!r}\n"
        "import cost, gpu_cost; cost.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(file.read_text())
    assert [(run["model"], run["method"]) for run in found["runs"]] == [
        (model, method) for model in ("encoder", "decoder") for method in ("lqa", "adamw@5e-05", "adamw@0.0002")
    ]
    assert all(map(math.isfinite, numbers(found))) and all(run["steps"] == 4 for run in found["runs"])
    assert found["skipped"] == [] and found["runs"][0]["counts"]["probe_forwards"] > 0


def test_a_model_that_came_in_parts_is_put_together(tmp_path):
    for i, part in enumerate((b"GG", b"UF")):
        (tmp_path / f"model.gguf.part{i}").write_bytes(part)
    assert gpu_quality.gguf_of(tmp_path) == "model.gguf" and (tmp_path / "model.gguf").read_bytes() == b"GGUF"
