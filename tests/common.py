"""A tiny model, a tiny learnable data set and the arguments to train with, shared by the tests."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    TrainerCallback,
    TrainingArguments,
)

import hf_lqa
from hf_lqa.groups import rescaled


def tiny_bert(dropout: float = 0.1, num_labels: int = 3, seed: int = 0) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=60,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        num_labels=num_labels,
    )
    return BertForSequenceClassification(config)


def rows(count: int = 256, length: int = 8, num_labels: int = 3) -> list[dict[str, torch.Tensor]]:
    """The label is a function of the first token: a task that can be learned."""
    tokens = torch.randint(1, 60, (count, length), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row[0] % num_labels} for row in tokens]


def arguments(output_dir: Any, **changes: Any) -> TrainingArguments:
    defaults: dict[str, Any] = {
        "optim": "lqa",
        "max_steps": 12,
        "per_device_train_batch_size": 8,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(str(output_dir), **{**defaults, **changes})


def trained(output_dir: Any, model: Any = None, trainer_class: Any = hf_lqa.LQATrainer, **changes: Any) -> Any:
    """A Trainer after training; arguments as in `arguments`."""
    resume = changes.pop("resume_from_checkpoint", None)
    data = changes.pop("train_dataset", None) or rows()
    trainer = trainer_class(model or tiny_bert(), arguments(output_dir, **changes), train_dataset=data)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def logged(trainer: Any, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return copy.deepcopy(model.state_dict())


def assert_same_weights(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different, f"not bit-identical: {different}"


def tiny_llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    defaults: dict[str, Any] = {
        "vocab_size": 60,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 32,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return LlamaForCausalLM(LlamaConfig(**{**defaults, **changes}))


def language_rows(count: int = 128, length: int = 8) -> list[dict[str, torch.Tensor]]:
    """Every second token repeats the one before; rows differ in their number of labelled items."""
    found = []
    for i, row in enumerate(torch.randint(3, 60, (count, length), generator=torch.Generator().manual_seed(0))):
        row[1::2] = row[::2]
        labels = row.clone()
        labels[: i % 4] = -100
        found.append({"input_ids": row, "attention_mask": torch.ones_like(row), "labels": labels})
    return found


class Recorder(TrainerCallback):
    """Keeps what the optimizer decided at each step, exactly."""

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.steps: list[dict[str, Any]] = []
        trainer.add_callback(self)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        lqa, probe, measured = self.trainer.lqa, self.trainer.lqa.last_probe, self.trainer.lqa.last_measurement
        self.steps.append(
            {
                "step": state.global_step,
                "step_size": lqa.step_size,
                "multipliers": lqa.multipliers,
                "agreement": measured.agreement if measured else None,
                "slopes": list(measured.slopes) if measured else None,
                "forwards": lqa.counts["probe_forwards"],
                "probe_step": probe.step if probe else None,
                "slope": probe.fit.slope if probe else None,
                "curvature": probe.fit.curvature if probe else None,
                "radius": probe.radius if probe else None,
                "losses": [probe.loss_minus, probe.loss_center, probe.loss_plus] if probe else None,
            }
        )

    def column(self, name: str) -> list[Any]:
        return [step[name] for step in self.steps]


class Replays(TrainerCallback):
    """Before each step, computes the recorded loss again where it was recorded."""

    def __init__(self, trainer):
        self.trainer, self.pairs = trainer, []
        trainer.add_callback(self)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        closure = self.trainer.lqa.armed
        if closure is not None:
            self.pairs.append((float(closure.loss), float(closure())))


class WithoutLQA(TrainerCallback):
    """Holds a stock Trainer's optimizer at the rates that a `Recorder` kept."""

    def __init__(self, steps):
        self.steps = iter(steps)

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        step = next(self.steps)
        for group in optimizer.param_groups:
            group["lr"] = step["step_size"]
        self.rescaled = rescaled(optimizer.optimizer, 1.0, step["multipliers"])
        self.rescaled.__enter__()

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.rescaled.__exit__(None, None, None)


def launch(
    processes: int, specs: list[dict[str, Any]], folder: Path, timeout: float = 400, launcher: list[str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `specs` one after the other on so many processes, through torchrun if no other launcher is given."""
    for spec in specs:
        Path(spec["out"]).mkdir(parents=True)
    (folder / "specs.json").write_text(json.dumps(specs))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "KMP_BLOCKTIME": "0", "OMP_WAIT_POLICY": "PASSIVE"}
    command = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", "0"]
    command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    script = Path(__file__).parent / "distributed_script.py"
    return subprocess.run(
        [sys.executable, *(launcher or command), str(script), str(folder / "specs.json")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
