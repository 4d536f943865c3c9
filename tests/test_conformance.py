"""The conformance script, on a checkout of four tests."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent / "conformance" / "run.py"
SUITE = """
import torch
from transformers import Trainer, TrainingArguments


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))

    def forward(self, x, labels):
        return {"loss": ((x @ self.weight - labels) ** 2).mean()}


def train(tmp_path, **changes):
    rows = [{"x": torch.full((3,), i / 8), "labels": torch.tensor(0.5)} for i in range(8)]
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], max_steps=2, save_strategy="no", **changes)
    trainer = Trainer(Net(), args, train_dataset=rows)
    trainer.train()
    return trainer


def test_trains(tmp_path):
    assert train(tmp_path).state.global_step == 2


def test_get_learning_rates(tmp_path):
    assert train(tmp_path).optimizer.param_groups[0]["initial_lr"] == 5e-5


def test_fails_anyway():
    assert False
"""
SPECIAL = """

def test_is_adamw(tmp_path):
    assert type(train(tmp_path).optimizer.optimizer).__name__ == "AdamW"
"""


def conformance(checkout):
    done = subprocess.run([sys.executable, str(SCRIPT), str(checkout)], capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout + done.stderr


def test_it_prints_what_differs(tmp_path):
    folder = tmp_path / "tests" / "trainer"
    folder.mkdir(parents=True)
    (folder / "test_trainer.py").write_text(SUITE + SPECIAL)
    status, output = conformance(tmp_path)
    assert status == 1, output
    assert "stock: {'failed': 1, 'passed': 3}" in output and "lqa: {'failed': 3, 'passed': 1}" in output
    assert "expected: tests/trainer/test_trainer.py::test_get_learning_rates: asserts the learning rate" in output
    assert "DIFFERENT: tests/trainer/test_trainer.py::test_is_adamw: passed with the stock Trainer, failed" in output
    assert "test_fails_anyway: " not in output.partition("probes: ")[2]
    assert int(output.partition("probes: ")[2].split()[0]) > 0


def test_nothing_to_run_is_an_error(tmp_path):
    status, output = conformance(tmp_path)
    assert status == 2 and "has none of tests/trainer" in output
