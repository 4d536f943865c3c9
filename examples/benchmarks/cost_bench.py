"""Copies of one model, each trained by its own optimizer on the same random batches, to be timed side by side."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import peers
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

from hf_lqa import LQA, ReplayedLoss


def _adamw(model: nn.Module, lr: float = 1e-5) -> torch.optim.Optimizer:
    # As a Trainer makes it.
    return torch.optim.AdamW(peers.trainable(model), lr=lr, weight_decay=0.0, fused=True)


def _foreach(model: nn.Module, lr: float = 1e-5) -> torch.optim.Optimizer:
    return torch.optim.AdamW(peers.trainable(model), lr=lr, weight_decay=0.0, foreach=True)


def _schedule_free(model: nn.Module) -> torch.optim.Optimizer:
    from schedulefree import AdamWScheduleFree

    optimizer = AdamWScheduleFree(peers.trainable(model), lr=1e-4)
    optimizer.train()
    return optimizer


def _peer(name: str) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return lambda model: peers.build(name, model).optimizer


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "adamw_again": _adamw,
    "adamw_foreach": _foreach,
    "adamw_foreach_again": _foreach,
    "lqa": lambda model: LQA(_adamw(model, lr=1.0)),
    "lqa_foreach": lambda model: LQA(_foreach(model, lr=1.0)),
    "lqa_paper": lambda model: LQA(torch.optim.SGD(peers.trainable(model), lr=1.0), rule="paper"),
    "sgd": lambda model: torch.optim.SGD(peers.trainable(model), lr=1e-4),
    "schedule_free": _schedule_free,
    **{name: _peer(name) for name in ("prodigy", "salsa", "gen_adamw")},
}


#: Models of random weights: the shapes of MiniLM-L6, of SmolLM2-135M and -360M, of Llama-3.2-1B; and two for trying.
SHAPES: dict[str, dict[str, Any]] = {
    "bert-22m": {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 12},
    "bert-tiny": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{
        name: {
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": keys,
            "vocab_size": words,
            "tie_word_embeddings": True,
        }
        for name, hidden, intermediate, layers, heads, keys, words in (
            ("llama-135m", 576, 1536, 30, 9, 3, 49152),
            ("llama-360m", 960, 2560, 32, 15, 5, 49152),
            ("llama-1b", 2048, 8192, 16, 32, 8, 128256),
            ("llama-tiny", 32, 64, 2, 2, 2, 8192),
        )
    },
}
CLASSES = 8


def shaped(name: str) -> nn.Module:
    """A model of `SHAPES`, through a LoRA adapter if its name ends with ``_lora``."""
    shape, _, lora = name.partition("_")
    encoder = shape.startswith("bert")
    if encoder:
        model: Any = BertForSequenceClassification(BertConfig(**SHAPES[shape], num_labels=CLASSES))
    else:
        model = LlamaForCausalLM(LlamaConfig(**SHAPES[shape], use_cache=False))
    if not lora:
        return model
    from peft import LoraConfig, get_peft_model

    kind = "SEQ_CLS" if encoder else "CAUSAL_LM"
    return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type=kind))


def make_model(name: str) -> nn.Module:
    if name.partition("_")[0] in SHAPES:
        return shaped(name)
    # Not where only they are needed: a machine for measuring may lack what real weights take.
    import loaders
    import quickstart

    cache = quickstart.CACHE
    if name == "minilm":
        return AutoModelForSequenceClassification.from_pretrained(quickstart.minilm(cache), num_labels=CLASSES)
    if name.startswith("llama-"):
        width = int(name.removeprefix("llama-"))
        config = LlamaConfig(
            hidden_size=width, intermediate_size=4 * width, num_hidden_layers=6, num_attention_heads=4, vocab_size=8192
        )
        return LlamaForCausalLM(config)
    model = AutoModelForCausalLM.from_pretrained(loaders.smollm2(cache), dtype=torch.float32)
    if name == "smollm2":
        return model
    if name == "smollm2_lora":
        from peft import LoraConfig, get_peft_model

        return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    known = ", ".join(f"{shape}[_lora]" for shape in SHAPES)
    raise SystemExit(f"--models {name}: choose from minilm, smollm2, smollm2_lora, llama-WIDTH, {known}")


class Bench:
    """Copies of one model, each with its optimizer, trained on the same random batches."""

    def __init__(
        self,
        model: str,
        names: Iterable[str],
        batch_size: int,
        length: int,
        dtype: torch.dtype,
        device: str | None = None,
    ):
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.shape, self.dtype = (batch_size, length), dtype
        self.classes = CLASSES if model.startswith(("minilm", "bert")) else 0
        torch.manual_seed(0)
        with self.device if model.partition("_")[0] in SHAPES else contextlib.nullcontext():
            original = make_model(model)  # a CPU would take half a minute to fill the largest
        original = original.to(self.device).train()
        self.models = {name: copy.deepcopy(original) for name in names}
        self.weights = sum(p.numel() * p.element_size() for p in peers.trainable(original))
        self.parameters = sum(p.numel() for p in original.parameters())
        self.optimizers = {name: OPTIMIZERS[name](m) for name, m in self.models.items()}
        # A GPU loads a kernel at its first use, for which whoever has the first turn would pay.
        self.models["warm-up"], self.optimizers["warm-up"] = original, _adamw(original)
        for _ in range(2):
            self.step("warm-up", batch := self.batch(), batch)
        del self.models["warm-up"], self.optimizers["warm-up"]

    def batch(self) -> dict[str, torch.Tensor]:
        ids = torch.randint(1000, 8000, self.shape, device=self.device)
        labels = ids[:, 0] % self.classes if self.classes else ids
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

    def step(self, name: str, batch: dict[str, torch.Tensor], fresh: dict[str, torch.Tensor]) -> float:
        """One training step, the time it took in seconds."""
        model, optimizer = self.models[name], self.optimizers[name]

        def compute(batch: dict[str, torch.Tensor]) -> torch.Tensor:
            with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not torch.float32):
                return model(**batch).loss

        self._synchronize()
        begun = time.perf_counter()
        optimizer.zero_grad()
        probed = isinstance(optimizer, LQA) and optimizer.wants_probe
        replayed = ReplayedLoss(model) if probed or isinstance(optimizer, peers.WithBatch) else None
        loss = replayed.record(lambda: compute(batch)) if replayed is not None else compute(batch)
        loss.backward()
        loss.item()  # a Trainer looks whether it is finite, too
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if isinstance(optimizer, peers.WithBatch):
            assert replayed is not None
            optimizer.batch_loss, optimizer.batch_closure = loss, replayed
            optimizer.fresh_closure = lambda: compute(fresh)
        if isinstance(optimizer, LQA):
            optimizer.observe_clipping(norm, 1.0, whole=True)
            optimizer.step(replayed)
        else:
            optimizer.step()
        self._synchronize()
        return time.perf_counter() - begun

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def forwards(self, name: str) -> int:
        """Forward passes so far that plain training would not make."""
        optimizer = self.optimizers[name]
        return optimizer.counts["probe_forwards"] if isinstance(optimizer, LQA) else getattr(optimizer, "forwards", 0)


def probe_every(optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Have an `LQA` probe so often, to see what is rare in a run; others are left alone."""
    if isinstance(optimizer, LQA):
        optimizer.rule.config = dataclasses.replace(optimizer.rule.config, probe_interval=steps)


def peaks(
    model: str,
    name: str,
    batch_size: int,
    length: int,
    dtype: torch.dtype,
    steps: int,
    device: str | None = None,
) -> dict[str, list[float]]:
    """Bytes that tensors occupied at most in each step, beyond the model, over the trainable weights' bytes."""
    bench = Bench(model, [name], batch_size, length, dtype, device)
    probe_every(bench.optimizers[name], 3)
    found: dict[str, list[float]] = {"probe": [], "other": [], "held": []}
    on_cuda = bench.device.type == "cuda"
    live = 0
    for step in range(steps):
        batch, fresh = bench.batch(), bench.batch()
        before = bench.forwards(name)
        if on_cuda:
            torch.cuda.reset_peak_memory_stats()
            bench.step(name, batch, fresh)
            peak, live = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
        else:
            with torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
            ) as profile:
                bench.step(name, batch, fresh)
            assert profile.profiler is not None
            events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
            peak = live
            for event in sorted(events, key=lambda e: e.start_ns()):
                live += event.nbytes()
                peak = max(peak, live)
        # The state is allocated in the first steps, which have no full peak therefore.
        if step > 0:
            found["probe" if bench.forwards(name) > before else "other"].append(peak / bench.weights)
    found["held"].append(live / bench.weights)
    return found
