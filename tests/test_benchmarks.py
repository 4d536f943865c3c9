"""The benchmark: every method runs, finished runs are not repeated, the report is written, the peers do as they say."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

for module in ("datasets", "evaluate", "matplotlib", "peft", "scipy", "sklearn"):
    pytest.importorskip(module)

from peft.tuners.lora import LoraLayer  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers, processors  # noqa: E402
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "benchmarks"))

import cost  # noqa: E402
import figures  # noqa: E402
import gpu_cost  # noqa: E402
import gpu_quality  # noqa: E402
import loaders  # noqa: E402
import methods  # noqa: E402
import paper  # noqa: E402
import peers  # noqa: E402
import report  # noqa: E402
import results  # noqa: E402
import run  # noqa: E402
import scratch  # noqa: E402
import stages  # noqa: E402
import sweeps  # noqa: E402
import tasks  # noqa: E402
import texts  # noqa: E402
import training  # noqa: E402
import yardstick  # noqa: E402

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
    *("bb", "salsa", "gen_adamw", "greedy", "formula_n+warmup", "formula_m_head8+warmup"),
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
    pairs = [f"{WORDS[i % 3]} {WORDS[i % 7]},{WORDS[i % 5]},{i % 4}.5" for i in range(32)]
    for task in ("colours", "trec6", "banking77", "clinc150", "stsb", "tinyshakespeare"):
        (folder / task).mkdir()
        lines = ["sentence1,sentence2,score", *pairs] if task == "stsb" else ["text,label", *rows]
        for split in ("train", "validation"):
            (folder / task / f"{split}.csv").write_text("\n".join(lines))
            (folder / task / f"{split}.txt").write_text(" ".join(WORDS * 20))
    return folder


def benchmark(folder, file, *argv):
    run.main(["--data_dir", str(folder), "--results", str(file), "--seeds", "0", *map(str, argv)])
    return results.read(file)


SHORT = ("--max_steps", 2, "--batch_size", 4, "--max_length", 8)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_takes_two_steps(folder, tmp_path, method):
    if method in PACKAGES:
        pytest.importorskip(PACKAGES[method])
    (row,) = benchmark(
        folder, tmp_path / "r.jsonl", *SHORT, "--tasks", "colours", "--methods", method, "--model", folder / "encoder"
    )
    assert row["steps"] == 2 and math.isfinite(row["last_train_loss"]) and row["highest_rate"] > 0
    assert math.isfinite(row["eval_loss"]) and 0 <= row["metric"] <= 1
    assert row["trivial_metric"] == pytest.approx(11 / 32)
    assert row["forward_equivalents"] == 6 + row["probe_forwards"]
    assert (row["probe_forwards"] > 0) == method.startswith(("lqa", "salsa"))


#: Data of these is fetched or lies beside the tests of one who has it.
FETCHED = ("r8", "newsgroups", "election", "friends", "sms_spam", "vader_tweets", "mlp_mnist", "lenet_cifar", "vit")
HERE = [name for name, task in tasks.TASKS.items() if not (task.data or name).startswith(FETCHED)]


@pytest.mark.parametrize("name", HERE)
def test_every_registered_task_trains(folder, tmp_path, name):
    task = tasks.TASKS[name]
    argv = [*SHORT, "--tasks", name, "--methods", "lqa", "--max_eval_samples", 8]
    if task.model:
        argv += ["--model", folder / ("language" if task.model == "smollm2" else "encoder")]
    (row,) = benchmark(folder, tmp_path / "r.jsonl", *argv)
    assert math.isfinite(row["eval_loss"]) and row["probe_forwards"] > 0
    if task.kind in (tasks.LANGUAGE, tasks.LANGUAGE_LORA):
        assert row["metric"] == -row["eval_loss"] and row["trivial_metric"] == pytest.approx(-math.log(12), abs=0.5)
    if task.metric == "pearson":
        assert row["metric"] == pytest.approx(-row["eval_loss"], rel=0.01)
    assert task.metric is None or -1 <= row["metrics"][task.metric] <= 1


def test_the_registry_is_sound():
    for name, task in tasks.TASKS.items():
        assert name == task.name and task.kind in tasks.KINDS and task.split in tasks.SPLITS
        assert set(task.setting) == set(tasks.SETTING)
        module, _, function = task.loader.partition(":")
        assert callable(
            getattr({"texts": texts, "loaders": loaders, "scratch": scratch, "paper": paper}[module], function)
        )
    assert {task.kind for task in tasks.TASKS.values()} == set(tasks.KINDS)
    assert tasks.of("sms_spam").data == "sms_spam" and tasks.of("stsb_smollm2_lora").data == "stsb"
    # What is nobody's is an encoder's, and in no part of the yardstick.
    mine = tasks.of("mine")
    assert mine.kind == tasks.ENCODER and mine.split not in tasks.SPLITS and mine.setting == tasks.QUICKSTART


def test_the_report_needs_no_torch():
    folder = Path(report.__file__).parent
    code = "import report, sys; assert not {'torch', 'datasets', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=folder)


@pytest.mark.parametrize(
    "name, trained",
    [
        ("trec6_head", ("classifier",)),
        ("trec6_lora", ("lora_", "classifier")),
        ("stsb_smollm2_lora", ("lora_", "score")),
    ],
)
def test_the_part_that_is_trained(folder, name, trained):
    model = folder / ("language" if "smollm2" in name else "encoder")
    options = run.options_of(["--data_dir", str(folder), "--model", str(model)])
    weights = loaders.load(name, stages.filled(name, options)).model().named_parameters()
    found = {weight_name for weight_name, weight in weights if weight.requires_grad}
    assert found and all(any(part in weight_name for part in trained) for weight_name in found)
    assert all(any(part in weight_name for weight_name in found) for part in trained)


@pytest.mark.parametrize("name, scaling", [("trec6_lora", 2), ("trec6_lora_alpha2", 0.25), ("trec6_lora_alpha64", 8)])
def test_the_scale_of_adapters(folder, name, scaling):
    options = run.options_of(["--data_dir", str(folder), "--model", str(folder / "encoder")])
    modules = loaders.load(name, stages.filled(name, options)).model().modules()
    assert {module.scaling["default"] for module in modules if isinstance(module, LoraLayer)} == {scaling}


def test_rows_are_masked_once_for_all(folder):
    # Epochs and methods see the same.
    tokenizer = loaders.AutoTokenizer.from_pretrained(folder / "encoder")
    rows, again = (loaders.masked_rows(tokenizer, folder / "tinyshakespeare" / "train.txt", 8, 0) for _ in range(2))
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(rows, again, strict=True))
    guessed = sum(int((row["labels"] != -100).sum()) for row in rows)
    assert 0.05 < guessed / (8 * 27) < 0.3 and all((row["labels"] != -100).any() for row in rows)


def test_what_is_made_from_scratch():
    assert scratch.Vit()(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    rows, again, others = (scratch.digit_rows(20, 5, seed, noise=0) for seed in (0, 0, 1))
    for row, same in zip(rows, again, strict=True):
        assert row["labels"][:-1].tolist() == sorted(row["input_ids"][:-1].tolist())
        assert row["labels"][-1] == scratch.END and torch.equal(row["input_ids"], same["input_ids"])
    assert not all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(rows, others, strict=True))
    noisy = torch.stack([row["labels"] for row in scratch.digit_rows(400, 5, 0)])
    ordered = torch.stack([row["labels"] for row in scratch.digit_rows(400, 5, 0, noise=0)])
    assert 0.05 < (noisy != ordered)[:, :-1].float().mean() < 0.13 and (noisy[:, -1] == scratch.END).all()


def test_two_texts_of_a_decoder_are_kept_apart(folder, tmp_path):
    tokenizer = loaders.AutoTokenizer.from_pretrained(folder / "language")
    tokenizer.sep_token = None
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((folder / "language" / "config.json").read_text())
    options = run.options_of(["--data_dir", str(folder), "--model", str(tmp_path)])
    rows = loaders.load("stsb", stages.filled("stsb", options)).train
    first, second = f"{WORDS[0]} {WORDS[0]}", WORDS[0]
    assert rows[0]["input_ids"] == tokenizer(f"{first}\n{second}")["input_ids"]


def test_metrics_of_the_field():
    scores = numpy.array([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4]])
    assert loaders.metrics(scores, numpy.array([1, 0, 1, 1])) == {
        "accuracy": 0.75,
        "matthews": pytest.approx(1 / math.sqrt(3)),
    }
    assert loaders.metrics(numpy.array([[1.0], [2.0], [3.0]]), numpy.array([2.0, 4.0, 6.0])) == {
        "pearson": pytest.approx(1.0)
    }
    found = loaders.metrics(numpy.stack([scores, scores]), numpy.array([[1, 0, 1, 0], [1, 0, 1, 1]]))
    assert found == {"accuracy": 7 / 8, "exact_match": 0.5}


@pytest.mark.parametrize("method", ["bb", "gen_adamw", "salsa"])
def test_schedulers_leave_the_rates_of_peers_alone(folder, method):
    options = run.options_of(["--tasks", "linear", "--max_steps", "60"])
    own = stages.filled("linear", options)
    row = training.train(loaders.load("linear", own), method, 0, own)
    rates = [rate / (1 - i / 60 if method == "gen_adamw" else 1) for i, rate in enumerate(row["learning_rate"])]
    assert max(rates[40:]) != pytest.approx(rates[0], rel=0.01)
    if method == "gen_adamw":
        # Seven probes from 5e-5 lead nowhere: it is not the base's own rate, 1, that moves the weights.
        assert row["train_loss"][-1] == pytest.approx(row["train_loss"][0], rel=0.5)


def test_finished_runs_are_not_repeated(folder, tmp_path, capsys):
    file = tmp_path / "r.jsonl"
    argv = ("--tasks", "linear", "--max_steps", 2, "--methods", "sgd@1e-2")
    assert len(benchmark(folder, file, *argv)) == 1
    assert len(benchmark(folder, file, *argv, "sgd@1e-1")) == 2
    assert "seed 0" in capsys.readouterr().out
    assert len(benchmark(folder, file, *argv)) == 2
    assert not capsys.readouterr().out
    # Lines of before there was an option were made with what is its default now.
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert all("group_by_length" not in line and "max_grad_norm" not in line for line in lines)
    assert len(benchmark(folder, file, *argv, "--max_grad_norm", 0)) == 3


def test_the_first_run_of_a_task_is_as_any(folder, tmp_path):
    """The untrained model is evaluated once, before the first run: that moves none of the run's random numbers."""
    argv = (
        "--max_steps",
        4,
        "--batch_size",
        4,
        "--max_length",
        8,
        "--tasks",
        "minilm_mlm",
        "--model",
        folder / "encoder",
    )
    loaders._load.cache_clear()
    first, then = (benchmark(folder, tmp_path / f"{i}.jsonl", *argv, "--methods", "adamw@1e-2")[0] for i in range(2))
    assert first["eval_loss"] == then["eval_loss"] and first["trivial_metric"] == then["trivial_metric"]


def test_two_workers_share_the_runs(folder, tmp_path):
    file, argv = (
        tmp_path / "r.jsonl",
        ("--tasks", "linear", "--max_steps", 1, "--methods", "sgd@1", "adamw", "bb", "lqa"),
    )
    first = len(benchmark(folder, file, *argv, "--worker", "1/2"))
    assert 0 < first < 4 and len(benchmark(folder, file, *argv, "--worker", "1/2")) == first
    assert len({results.key(row) for row in benchmark(folder, file, *argv, "--worker", "2/2")}) == 4
    with pytest.raises(SystemExit):
        benchmark(folder, file, *argv, "--worker", "3/2")


def test_what_is_missing_is_listed_with_its_time(folder, tmp_path, capsys):
    file = tmp_path / "r.jsonl"
    rows = [
        whole_row("trec6", "lqa", 0, seconds=10.0, max_steps=100, batch_size=8, max_length=16, max_eval_samples=400)
    ]
    rows += [whole_row("r8", "lqa", 0, seconds=30.0, max_steps=100, batch_size=8, max_length=16, max_eval_samples=400)]
    for row in rows:
        results.write(file, row)
    argv = ("--methods", "lqa", "adamw@1e-3", "--list", "--tasks")
    benchmark(folder, file, *argv, "trec6")
    # That which is there is not listed; the other takes as long as what was run in its setting.
    assert "1 runs, 10 s (adamw@1e-3)" in capsys.readouterr().out
    benchmark(folder, file, *argv, "trec6", "--max_steps", 200)
    assert "2 runs, 40 s" in capsys.readouterr().out
    benchmark(folder, file, *argv, "banking77")  # by its kind, the median of 10 and 30
    assert "2 runs, 40 s" in capsys.readouterr().out
    benchmark(folder, file, *argv, "t5_scratch")
    assert "? s" in (out := capsys.readouterr().out) and "2 of which nothing alike" in out


def whole_row(task, method, seed, **changes):
    """A line as `training.train` and `run.identity` make it, with all curves."""
    row = {**results.IDENTITY, "task": task, "method": method, "seed": seed, "eval_loss": 0.123456789, "metric": 0.9}
    row |= {"metrics": {"accuracy": 0.9}, "trivial_metric": 0.5, "probe_forwards": 2, "rejected": 0, "skipped": 0}
    row |= {"seconds": 2.0, "train_seconds": 1.0, "error": None, "torch": "2.13.0+cpu", "transformers": "5.24.0"}
    row |= {"machine": "x86_64, 1 threads", **changes}
    steps = row["max_steps"]
    rising = [1e-3 * (i + 1) for i in range(steps)]
    return {"train_loss": [float(steps - i) for i in range(steps)], "learning_rate": rising, **row}


def test_rows_are_short_and_read_as_whole(tmp_path):
    default = dict(tasks.of("linear").setting)
    file = tmp_path / "r.jsonl"
    results.write(file, whole_row("linear", "lqa", 0, **default))
    (line,) = file.read_text().splitlines()
    assert len(line) < 1200 and not {"schedule", "error", "machine", "bf16", "rejected", "steps"} & set(
        json.loads(line)
    )
    (row,) = results.read(file)
    assert row["eval_loss"] == 0.123457 and row["schedule"] == "linear" and row["error"] is None
    assert row["forward_equivalents"] == 602 and row["steps"] == 200 and row["metric"] == 0.9
    assert row["last_train_loss"] == pytest.approx(5.5) and row["highest_rate"] == 0.2 and row["late_rate"] == 0.161
    for key in ("train_loss", "learning_rate"):
        assert len(row["curves"][key]) == len(results.points(200)) == results.POINTS
    assert results.points(200)[0] == 1 and results.points(200)[-1] == 200 and results.points(3) == [1, 2, 3]
    assert row["curves"]["learning_rate"][-1] == 0.2 and row["curves"]["train_loss"][0] == 200
    # Once short, always the same; and curves are of few.
    assert results.short(row) == json.loads(line)
    for other in (
        whole_row("linear", "lqa", 3, **default),
        whole_row("linear", "lqa", 0, **{**default, "max_steps": 50}),
    ):
        assert "curves" not in results.short(other)
    assert set(results.short(whole_row("linear", "sgd@1+decay", 0, **default))["curves"]) == {"train_loss"}
    # A run that broke down says after how many steps.
    broken = {**whole_row("linear", "bb", 0, **default), "train_loss": [1.0, math.nan], "learning_rate": [0.1, 0.1]}
    assert results.whole(results.short(broken))["steps"] == 2


def test_runs_of_another_file_are_added_once(tmp_path):
    ours, theirs = tmp_path / "ours.jsonl", tmp_path / "theirs.jsonl"
    rows = [whole_row("trec6", "lqa", seed, **tasks.SHORT) for seed in range(3)]
    results.write(ours, rows[0])
    theirs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run.main(["--results", str(ours), "--add", str(theirs)])
    run.main(["--results", str(ours), "--add", str(theirs)])
    assert [row["seed"] for row in results.read(ours)] == [0, 1, 2]
    assert ours.stat().st_size < theirs.stat().st_size / 2


def test_data_by_name(folder, tmp_path):
    data = " ".join(f"--{split}_file {folder / 'colours' / split}.csv" for split in ("train", "validation"))
    argv = ("--tasks", "mine", "--methods", "adamw", "--data_arguments", data, "--model", folder / "encoder")
    (row,) = benchmark(folder, tmp_path / "r.jsonl", *SHORT, *argv)
    assert row["task"] == "mine"


def test_the_table_can_be_planned(folder):
    options = run.options_of(["--table", "--data_dir", str(folder)])
    runs = stages.plan(stages.STAGES, options)
    assert len({json.dumps(run.identity(*planned)) for planned in runs}) == len(runs) > 200
    for task, method, _, own in runs:
        methods.parse_method(method)
        assert task in tasks.TASKS and own.max_steps > 0
    longest = [own for task, _, _, own in stages.plan(["headline"], options) if task == "stsb"]
    assert {(own.max_steps, own.batch_size, own.max_length) for own in longest} == {(500, 16, 64)}
    with pytest.raises(SystemExit, match="nonsense"):
        stages.plan(["nonsense"], options)
    with pytest.raises(SystemExit, match="nonsense"):
        methods.parse_method("adamw@1e-3+nonsense")


def made_up(task, method, seed, loss, **changes):
    """A row of results, with all curves."""
    changes = {"max_steps": 3, "batch_size": 4, "max_length": 8, "metric": 0.9, "metrics": {}, **changes}
    rates = {"train_loss": [3.0, 2.0, loss][: changes["max_steps"]], "learning_rate": [1e-4, 2e-4, 1e-4]}
    return whole_row(task, method, seed, **{"machine": "paper, 1 threads", "eval_loss": loss, **rates, **changes})


def test_yardstick():
    """Ratios run by run, marked where the best rate is at an end, apart for kinds, lengths and splits."""
    rows = [made_up("trec6", "lqa", seed, loss) for seed, loss in enumerate((0.2, 0.6, 0.45))]
    rows += [made_up("trec6", "formula_m+warmup", seed, 0.5, metric=0.8) for seed in (0, 1)]
    for rate, losses in (("1e-4", (0.9, 0.9, 0.9)), ("3e-4", (0.4, 0.5, 0.45)), ("1e-3", (0.8, math.nan, 0.9))):
        rows += [made_up("trec6", f"adamw@{rate}+warmup", seed, loss, metric=0.7) for seed, loss in enumerate(losses)]
    rows += [made_up("trec6", "lqa", 0, 0.3, schedule="constant"), made_up("trec6", "lqa", 0, 0.3, max_steps=500)]
    rows += [made_up("clinc150", method, 0, loss) for method, loss in (("lqa", 0.6), ("adamw@1e-3+warmup", 0.4))]
    tables = sweeps.tables_of(map(results.whole, rows))
    short = tables[0]
    assert short.best() == "adamw@3e-4+warmup" and short.bracketed() and not short.varied
    found = yardstick.beside(short, "lqa")
    assert found.ratios == pytest.approx((0.5, 1.2, 1.0)) and found.typical == pytest.approx(0.6 ** (1 / 3))
    assert found.behind == 1 and found.metric == pytest.approx(0.2)
    assert yardstick.cell(found) == "0.84 / 1.20, 1 of 3, +0.200"
    assert yardstick.cell(yardstick.beside(short, "formula_m")) == "1.12 / 1.25, 1 of 2, +0.100"
    assert yardstick.beside(short, "formula_n") is None
    diverged = sweeps.Beside((math.inf, 1.0), None)
    assert yardstick.cell(diverged) == "diverged / diverged, 1 of 2"
    assert [table.title() for table in tables if table.varied] == [
        "trec6: 3 steps, batch 4, 8 tokens, constant schedule"
    ]
    text = "\n".join(yardstick.yardstick(tables))
    search, kept = text.split("### Kept tasks")
    assert "| encoder | up to 100 | 0.84 / 1.20, 33 %, +0.200 (1) |  | 1.12 / 1.25, 50 %, +0.100 (1) |  |" in search
    # Head to head only seeds count that both have.
    assert "| encoder | up to 100 | 0.77 / 1.20, 50 %, +0.200 (1) |  | 1.12 / 1.25, 50 %, +0.100 (1) |  |" in search
    assert (
        "clinc150" not in search
        and "| encoder | clinc150 | 3 steps, batch 4, 8 tokens | 1e-03 (not bracketed) |" in kept
    )
    assert "3e-04 | 0.4500 | 0.700 |" in search and "constant" not in text


def test_lengths():
    lengths = [
        (20, "up to 100"),
        (100, "up to 100"),
        (220, "101 to 499"),
        (500, "500 and more"),
        (1000, "500 and more"),
    ]
    for steps, name in lengths:
        (table,) = sweeps.tables_of([results.whole(made_up("trec6", "lqa", 0, 1.0, max_steps=steps))])
        assert yardstick.length_of(table) == name


def test_a_rate_of_fewer_seeds_is_the_bar_only_where_it_is_better_on_those():
    rows = [made_up("trec6", "adamw@3e-4+warmup", seed, 0.5 + 0.1 * seed) for seed in (0, 1, 2)]
    for other, best in ((0.45, "adamw@1e-3+warmup"), (0.55, "adamw@3e-4+warmup")):
        more = [made_up("trec6", "adamw@1e-3+warmup", 0, other)]
        (table,) = sweeps.tables_of(map(results.whole, rows + more))
        assert table.best() == best and not table.bracketed()
    # A rate without warm-up is bracketed by rates without it.
    rows = [made_up("trec6", f"adamw@{rate}", 0, loss) for rate, loss in (("1e-4+warmup", 2.0), ("3e-4", 1.0))]
    for rate, found in (("1e-3+warmup", False), ("1e-3", False), ("1e-4", True)):
        rows.append(made_up("trec6", f"adamw@{rate}", 0, 2.0))
        (table,) = sweeps.tables_of(map(results.whole, rows))
        assert table.best() == "adamw@3e-4" and table.bracketed() == found


def test_report(tmp_path):
    default = dict(tasks.SHORT)
    rows = [made_up("trec6", "lqa", seed, 0.2 + 0.01 * seed) for seed in (0, 1)]
    for rate, loss in (("1e-4", 0.5), ("3e-4", 0.25), ("1e-3", 0.8)):
        rows += [made_up("trec6", f"adamw@{rate}+warmup", seed, loss) for seed in (0, 1)]
    # A little more than the best rate is no rate of the sweep, however well it does; more than another shows nothing.
    rows += [made_up("trec6", "adamw@3.1e-4+warmup", seed, loss) for seed, loss in ((0, 0.1), (1, 0.375))]
    rows += [made_up("trec6", "adamw@1.03e-3+warmup", 0, 0.1)]
    rows += [made_up("trec6", "prodigy", 0, 0.3), made_up("trec6", "salsa", 0, math.nan, metric=0.1)]
    rows += [made_up("trec6", "lqa+tau=0.1", seed, loss) for seed, loss in ((0, 0.3), (1, 0.21))]
    rows += [made_up("trec6", "lqa_paper", 0, 1.9)]
    rows += [made_up("trec6", method, 0, 0.4, schedule="constant") for method in ("lqa", "adamw@3e-4+warmup")]
    rows += [made_up("mine", method, 0, 0.4) for method in ("lqa", "adamw@3e-4+warmup")]
    curves = {"train_loss": [1.0] * 100, "learning_rate": [1e-4] * 100}
    for method in ("lqa", "adamw@3e-4+warmup"):
        rows.append(made_up("r8", method, 0, 0.4, **default, **curves))
    curves = {"train_loss": [1.0] * 200, "learning_rate": [1e-4] * 200}
    rows += [
        made_up("linear", method, 0, 0.4, **tasks.of("linear").setting, **curves)
        for method in ("lqa_paper+constant", "sgd@1e-2+constant", "bb")
    ]
    file = tmp_path / "results.jsonl"
    for row in rows:
        results.write(file, row)
    report.main([str(file)])
    text = (tmp_path / "REPORT.md").read_text()
    assert "Rows of `lqa` are of the present rule" in text
    row = "| trec6 | 3 steps, batch 4, 8 tokens | 3e-04 | 0.2500 | 0.900 | 0.82 / 0.84, 0 of 2, +0.000 |"
    assert f"| encoder {row}" in text
    near = "0.77 / 1.50, 1 of 2, +0.000 | 0.82 / 0.84, 0 of 2, +0.000 |"
    assert f"| trec6: 3 steps, batch 4, 8 tokens | 0.00031 | {near}" in text and "1.03e-3" not in text
    assert "| **all** | | 0.77 / 1.50, 50 %, +0.000 (1) | 0.82 / 0.84, 0 %, +0.000 (1) |" in text
    assert "| trec6: 3 steps, batch 4, 8 tokens, constant schedule | 3e-04 (not bracketed) |" in text
    assert "| `lqa` | 1.00 | 0.800 | 1 |" in text and "| `prodigy` | 3.00 | 1.200 | 3 |" in text
    assert "- `salsa`: 1 of 1 (trec6)" in text and "| `salsa` | diverged |" in text
    assert (
        "| `tau=0.1` | 1 | 1.225 | 1.22, trec6: 3 steps, batch 4, 8 tokens | 1.00 | trec6 1.225 ± 0.250 (2) |" in text
    )
    assert "| linear | `lqa_paper+constant` | 1.0000 | 1.0000 | 1.0000 | 1 |" in text
    assert "| trec6: 3 steps, batch 4, 8 tokens | 2 | 0.5 | **0.25** | 0.8 |" in text
    assert "mine" not in text.split("## All methods")[0].split("## Sweeps")[0] and "| mine: 3 steps" in text
    for name in figures.FIGURES:
        assert (tmp_path / name).stat().st_size < 150_000 and f"({name})" in text


def test_the_curve_of_a_fixed_rate():
    rates = figures.scheduled("adamw@1e-3+warmup", 100)
    at = dict(zip(results.points(100), rates, strict=True))
    assert max(rate for rate in rates if not math.isnan(rate)) == pytest.approx(1e-3, rel=0.02)
    assert math.isnan(at[1]) and at[100] == pytest.approx(1e-3 / 94)


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
    task = paper.load(tasks.of("logistic"), run.options_of([]))
    batch = task.train.__getitems__([0, 5])
    assert batch["inputs"].shape == (2, 50) and len(task.validation) == 1000
    assert task.model()(**batch)["loss"].item() == pytest.approx(math.log(2), abs=0.5)


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
        assert kinds["probe"] == (steps - 1) // 100
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
