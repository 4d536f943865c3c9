"""Trajectories of a few set-ups to the last bit: a change of code that is none of the rule leaves them as they are.

::

    python tests/golden.py > before.txt      # and again after the change; then diff

Each line is a step: step size, base step size and multipliers in hexadecimal, and what was counted. The set-ups:
AdamW under a Trainer with accumulation, clipping and dropout; the same resumed; bf16; `lqa_paper`; SGD; `LQAAdamW`
without a closure; a closure that calls ``backward``; two ranks.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
import transformers
from common import Recorder, arguments, launch, rows, tiny_bert

import hf_lqa

STEPS = 14
ACCUMULATED = {"gradient_accumulation_steps": 2, "optim_args": "probe_interval=5", "max_steps": STEPS}


def line(step_size: float | None, multipliers: list[float], *rest: Any) -> str:
    numbers = [step_size or 0.0, *multipliers]
    return " ".join([*(float(number).hex() for number in numbers), *map(str, rest)])


def under_trainer(folder: Path, resume: str | None = None, **changes: Any) -> Iterator[str]:
    trainer = hf_lqa.LQATrainer(tiny_bert(), arguments(folder, **changes), train_dataset=rows())
    recorder = Recorder(trainer)
    trainer.train(resume_from_checkpoint=resume)
    for step in recorder.steps:
        yield line(step["step_size"], step["multipliers"], step["step"], step["forwards"], step["losses"])


def in_a_loop(kind: str) -> Iterator[str]:
    model, data = tiny_bert(), rows(64)
    batch = {key: torch.stack([row[key] for row in data]) for key in data[0]}
    if kind == "without a closure":
        optimizer: hf_lqa.LQA = hf_lqa.LQAAdamW(model.parameters(), total_steps=STEPS)
    else:
        optimizer = hf_lqa.LQA(torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9), total_steps=STEPS)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        return loss

    for _ in range(STEPS):
        if kind == "without a closure":
            closure()
            optimizer.step()
        else:
            optimizer.step(closure)
        counts = sorted(optimizer.counts.items())
        yield line(optimizer.step_size, optimizer.multipliers, optimizer.base_step_size, counts)


def on_two_ranks(folder: Path) -> Iterator[str]:
    spec = {"arguments": {"max_steps": 8, "optim_args": "probe_interval=3"}, "out": str(folder / "two")}
    done = launch(2, [spec], folder)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(2):
        for step in json.loads((folder / "two" / f"rank{rank}.json").read_text())["steps"]:
            yield line(step["step_size"], step["multipliers"], rank, step["forwards"], step["losses"])


def main() -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        saving = {**ACCUMULATED, "save_strategy": "steps", "save_steps": 7}
        checkpoint = str(folder / "whole" / "checkpoint-7")
        found = {
            "lqa": under_trainer(folder / "whole", **saving),
            "lqa, resumed": under_trainer(folder / "whole", checkpoint, **saving),
            "lqa, bf16, two param groups": under_trainer(folder / "bf16", bf16=True, weight_decay=0.1, max_steps=STEPS),
            "lqa_paper": under_trainer(folder / "paper", optim="lqa_paper", max_steps=STEPS),
            "lqa_sgd": under_trainer(folder / "sgd", optim="lqa_sgd", max_steps=STEPS, lr_scheduler_type="constant"),
            "without a closure": in_a_loop("without a closure"),
            "a closure that calls backward": in_a_loop("a closure that calls backward"),
            "two ranks": on_two_ranks(folder),
        }
        for title, lines in found.items():
            # The Trainer prints its log lines to the same place.
            with contextlib.redirect_stdout(sys.stderr):
                texts = list(lines)
            for number, text in enumerate(texts):
                print(f"{title}, {number}: {text}")


if __name__ == "__main__":
    main()
