"""One run: a method trains a loaded task under the Trainer, and what came of it as a row of results."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import platform
import tempfile
import time
from collections.abc import Callable
from typing import Any

import formulas
import peers
import torch
import transformers
from loaders import Loaded, metrics
from methods import Method, parse_method
from torch import nn
from transformers import PrinterCallback, TrainingArguments, set_seed

from hf_lqa import LQA, LQAAdamW, LQACallback, LQATrainer
from hf_lqa.quadratic import rejected

#: The method in which a Trainer knows nothing of LQA, and no closure is given.
STOCK = "lqa_adamw"


def with_constants(config: Any, constants: dict[str, str]) -> Any:
    """A rule's record of constants with some of them changed, in the records inside it as well.

    Args:
        constants: value by name; what is found is taken out.
    """
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            changes[field.name] = with_constants(value, constants)
        elif field.name in constants:
            changes[field.name] = type(value)(float(constants.pop(field.name)))
    return dataclasses.replace(config, **changes)


class BenchmarkTrainer(LQATrainer):
    """The Trainer of all benchmark runs. Unlike `LQATrainer` it can also run a peer, which it tells of each batch."""

    def __init__(self, *args: Any, method: Method, **kwargs: Any):
        self.method = method
        super().__init__(*args, **kwargs)
        self.peer: peers.Peer | None = None
        self.fresh: Any = None
        self.remove_callback(PrinterCallback)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        if self.method.name in formulas.FORMULAS:
            self.optimizer = formulas.adamw(self.method.name, self.model)
            return self.optimizer
        if self.method.name == STOCK:
            trained = [p for p in self.model.parameters() if p.requires_grad]
            self.optimizer = LQAAdamW(trained, weight_decay=0.0)
            return self.optimizer
        if self.method.name not in peers.PEERS:
            return super().create_optimizer(*args, **kwargs)
        self.peer = peers.build(self.method.name, self.model, self.method.rate)
        self.optimizer = self.peer.optimizer
        return self.optimizer

    @property
    def lqa(self) -> LQA | None:
        return super().lqa if self.method.name != STOCK else None

    def create_scheduler(self, num_training_steps: int, *args: Any, **kwargs: Any) -> Any:
        if self.lqa is not None and self.method.constants:
            constants = dict(self.method.constants)
            self.lqa.rule.config = with_constants(self.lqa.rule.config, constants)
            self.lqa.measurer.prober.config = with_constants(self.lqa.measurer.prober.config, constants)
            if constants:
                raise SystemExit(f"--methods: the rule has no constants {', '.join(constants)}")
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
    """Tells the peer that a step is over."""

    def __init__(self, trainer: BenchmarkTrainer):
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.peer is not None:
            self.trainer.peer.after_step()


def arguments(folder: str, method: Method, seed: int, options: argparse.Namespace) -> TrainingArguments:
    given: dict[str, Any] = {}
    if method.name not in (*peers.PEERS, *formulas.FORMULAS, STOCK):
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


def measured(data: Loaded, evaluated: transformers.EvalPrediction) -> dict[str, Any]:
    scores = evaluated.predictions
    # An encoder's last states come along with an encoder-decoder's scores.
    scores = scores[0] if isinstance(scores, tuple) else scores
    return {"metric": data.metric(scores, evaluated.label_ids), "metrics": metrics(scores, evaluated.label_ids)}


def train(data: Loaded, name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """What came of the method `name` on the task, as a row of results without what tells it from others."""
    method, begun = parse_method(name), time.time()
    with tempfile.TemporaryDirectory() as folder:
        args = arguments(folder, method, seed, options)
        set_seed(seed)
        trainer = BenchmarkTrainer(
            model=data.model(),
            args=args,
            train_dataset=data.train,
            eval_dataset=data.validation,
            data_collator=data.collate,
            compute_metrics=None if data.metric is None else functools.partial(measured, data),
            method=method,
        )
        trainer.add_callback(AfterStep(trainer))
        if method.name == STOCK:
            trainer.add_callback(LQACallback())
        if data.trivial is None:
            # Evaluation draws a number; the first run of a task must not have others than those after it.
            with torch.random.fork_rng():
                data.trivial = -trainer.evaluate()["eval_loss"]
        error = None
        try:
            trainer.train()
        except (ArithmeticError, AssertionError, RuntimeError, ValueError) as raised:
            # A method that breaks down is a result: the run counts as failed.
            if not any(math.isnan(entry.get("loss", 0.0)) for entry in trainer.state.log_history):
                raise
            error = f"{type(raised).__name__}: {raised}"[:200]
        if trainer.peer is not None:
            trainer.peer.finish()
        evaluated = trainer.evaluate()
    history = trainer.state.log_history
    entries = [entry for entry in history if "loss" in entry]
    lqa = trainer.lqa
    probes = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    gpu = torch.cuda.is_available()
    return {
        "eval_loss": evaluated["eval_loss"],
        "metric": evaluated.get("eval_metric", -evaluated["eval_loss"]),
        "metrics": evaluated.get("eval_metrics", {}),
        "trivial_metric": data.trivial,
        "train_loss": [entry["loss"] for entry in entries],
        "learning_rate": [entry["learning_rate"] for entry in entries],
        "probe_forwards": lqa.counts["probe_forwards"] if lqa is not None else getattr(probes, "forwards", 0),
        "rejected": rejected(lqa.counts) if lqa is not None else 0,
        "skipped": lqa.counts["skipped"] if lqa is not None else 0,
        "train_seconds": next((entry["train_runtime"] for entry in history if "train_runtime" in entry), math.nan),
        "seconds": round(time.time() - begun, 1),
        "error": error,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": torch.cuda.get_device_name() if gpu else f"{platform.machine()}, {torch.get_num_threads()} threads",
    }
