"""Fine-tune with every method on every task and seed, and append each finished run to a JSON-lines file.

::

    python examples/benchmarks/run.py --tasks r8 --methods lqa adamw@5e-5 adamw@1e-4 adamw@3e-4 --seeds 0 1 2

A method is an ``--optim``, with ``@RATE`` for its learning rate, ``+warmup`` for a warm-up over 6 % of the steps and
``+KEY=VALUE`` for its ``--optim_args``; ``adamw`` is ``adamw_torch_fused``. A task is ``r8`` (fetched from PyPI,
as in the quickstart) or a folder under ``--data_dir`` with ``train.csv`` and ``validation.csv``, columns ``text`` and
``label`` (classes) or ``score`` (regression). Runs that the file has already are not repeated, so a benchmark can be
stopped and continued. ``report.py`` makes tables of it.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import quickstart
import text_classification
import torch


def method_arguments(method: str) -> list[str]:
    name, *extras = method.split("+")
    optim, _, rate = name.partition("@")
    argv = ["--optim", {"adamw": "adamw_torch_fused"}.get(optim, optim)]
    if rate:
        argv += ["--learning_rate", rate]
    options = [extra for extra in extras if "=" in extra]
    if "warmup" in extras:
        argv += ["--warmup_steps", "0.06"]
    if options:
        argv += ["--optim_args", ",".join(options)]
    return argv


def task_arguments(task: str, data_dir: Path | None, cache_dir: Path) -> list[str]:
    if task == "r8":
        train, validation = quickstart.reuters(cache_dir)
    else:
        if data_dir is None:
            raise SystemExit(f"--tasks {task}: give the folder that holds {task}/train.csv as --data_dir")
        train, validation = (data_dir / task / f"{split}.csv" for split in ("train", "validation"))
    with open(train, newline="", encoding="utf-8") as file:
        columns = next(csv.reader(file))
    target = ["--label_column", "label"] if "label" in columns else ["--label_column", "score", "--regression"]
    return ["--train_file", str(train), "--validation_file", str(validation), *target]


def run(task: str, method: str, seed: int, options: argparse.Namespace) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as folder:
        argv = [
            *(
                "--output_dir",
                folder,
                "--model_name_or_path",
                options.model or str(quickstart.minilm(options.cache_dir)),
            ),
            *("--max_steps", str(options.max_steps), "--per_device_train_batch_size", str(options.batch_size)),
            *("--max_length", str(options.max_length), "--seed", str(seed), "--logging_steps", "1"),
            *("--per_device_eval_batch_size", "64", "--save_strategy", "no", "--report_to", "none"),
            *("--dataloader_pin_memory", "False", "--disable_tqdm", "True", "--lr_scheduler_type", options.schedule),
            *task_arguments(task, options.data_dir, options.cache_dir),
            *method_arguments(method),
        ]
        if options.max_eval_samples:
            argv += ["--max_eval_samples", str(options.max_eval_samples)]
        begun = time.time()
        with contextlib.redirect_stdout(open(os.devnull, "w")):
            results = text_classification.main(argv)
        history = json.loads((Path(folder) / "trainer_state.json").read_text())["log_history"]
    steps = [entry for entry in history if "loss" in entry]
    (total,) = (entry["train_runtime"] for entry in history if "train_runtime" in entry)
    return {
        **identity(task, method, seed, options),
        "eval_loss": results["eval_loss"],
        "metric": results.get("eval_accuracy", -results.get("eval_mse", 0.0)),
        "train_loss": [round(entry["loss"], 5) for entry in steps],
        "learning_rate": [float(f"{entry['learning_rate']:.4g}") for entry in steps],
        "probe_forwards": steps[-1].get("lqa_probe_forwards", 0),
        "rejected": steps[-1].get("lqa_rejected", 0),
        "skipped": steps[-1].get("lqa_skipped", 0),
        "train_seconds": total,
        "seconds": round(time.time() - begun, 1),
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }


def identity(task: str, method: str, seed: int, options: argparse.Namespace) -> dict[str, object]:
    """What tells one run from another."""
    return {
        "task": task,
        "method": method,
        "seed": seed,
        "max_steps": options.max_steps,
        "batch_size": options.batch_size,
        "max_length": options.max_length,
        "schedule": options.schedule,
        "max_eval_samples": options.max_eval_samples,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["r8"])
    parser.add_argument("--methods", nargs="+", default=["lqa", "adamw@5e-5", "adamw@1e-4", "adamw@3e-4"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("results.jsonl"))
    parser.add_argument("--data_dir", type=Path, help="folder of the tasks other than r8")
    parser.add_argument("--cache_dir", type=Path, default=quickstart.CACHE)
    parser.add_argument("--model", help="name on the hub or folder; MiniLM-L6 from PyPI if not given")
    parser.add_argument("--max_steps", type=int, default=220)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--max_length", type=int, default=64)
    parser.add_argument("--schedule", default="linear")
    parser.add_argument("--max_eval_samples", type=int)
    options = parser.parse_args()

    known = ["task", "method", "seed", "max_steps", "batch_size", "max_length", "schedule", "max_eval_samples"]
    done = []
    if options.results.exists():
        done = [{key: json.loads(line)[key] for key in known} for line in options.results.read_text().splitlines()]
    for task in options.tasks:
        for seed in options.seeds:
            for method in options.methods:
                if identity(task, method, seed, options) in done:
                    continue
                result = run(task, method, seed, options)
                with options.results.open("a") as file:
                    file.write(json.dumps(result) + "\n")
                print(
                    f"{task} {method} seed {seed}: loss {result['eval_loss']:.4f}, metric {result['metric']:.4f},"
                    f" {result['train_seconds']:.0f} s",
                    flush=True,
                )


if __name__ == "__main__":
    main()
