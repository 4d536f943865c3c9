"""What ``cost.py --gpu FILE`` measures: all costs of `LQA` on one accelerator, within a few minutes, in one file.

Its parts, each a key of the file:

- ``cells``: step times and whole runs beside AdamW's, and AdamW's beside its own, by `paired`.
- ``steps``: launches, waits and where the time goes, of one step of each kind, out of the profiler, by `traced`.
- ``memory``: peaks in copies of the trainable weights, and AdamW's.

A step's **kind** is ``first_probe`` (a process loads kernels and builds plans for it), ``probe``, ``measured`` (reads
displacement slopes and the sign agreement), or ``ordinary``. A run of any length is made of them, so `projected` says
what 200 and 2,000 steps would cost.

What there was no time for stands in ``skipped`` by name.
"""

from __future__ import annotations

import contextlib
import functools
import json
import platform
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import accelerate
import torch
import transformers
from cost_bench import Bench, peaks

from hf_lqa import LQA, ReplayedLoss
from hf_lqa.direction import Direction
from hf_lqa.measurer import Measurer
from hf_lqa.prober import Prober
from hf_lqa.rule import Displacement
from hf_lqa.slopes import Snapshot

KINDS = ("first_probe", "probe", "measured", "ordinary")
RUNS = (200, 2000)
#: Right before a probe, in the cadence of a long run: what is not a whole run goes on there, to see every kind soon.
LATE = 399


@dataclass(frozen=True)
class Cell:
    """One comparison: `seconds` and `steps` at most, whichever is less, of a model of `cost_bench.SHAPES`.

    Attributes:
        implementation: of AdamW, ``fused`` or ``foreach``.
        dtype: of autocast; without loss scaling.
        early: number of steps after which it goes on as from step `LATE`, unless it is a whole run.
    """

    model: str
    dtype: str
    implementation: str
    batch_size: int
    length: int
    steps: int = 64
    seconds: float = 25.0
    early: int = 40

    @property
    def name(self) -> str:
        return f"{self.model} {self.dtype} {self.implementation}"

    @property
    def optimizers(self) -> list[str]:
        suffix = "" if self.implementation == "fused" else "_foreach"
        return [f"adamw{suffix}", f"adamw{suffix}_again", f"lqa{suffix}"]


#: In the order of what would be missed most. The first is a whole run of 200 steps, the others have the first steps of
#: one, and two dozen as they are late in a run, a probe among them.
CELLS = (
    Cell("bert-22m", "bfloat16", "fused", 16, 64, steps=200),
    Cell("llama-135m", "bfloat16", "fused", 16, 128),
    Cell("llama-1b", "bfloat16", "fused", 8, 128),
    Cell("llama-135m_lora", "bfloat16", "fused", 16, 128),
    Cell("bert-22m", "float32", "fused", 16, 64),
    Cell("bert-22m", "float16", "fused", 16, 64),
    Cell("bert-22m", "bfloat16", "foreach", 16, 64),
    Cell("llama-360m", "bfloat16", "fused", 16, 128),
    Cell("llama-135m", "bfloat16", "foreach", 16, 128),
    Cell("llama-1b_lora", "bfloat16", "fused", 8, 128),
    Cell("llama-135m", "float32", "fused", 16, 128),
    Cell("llama-1b", "bfloat16", "foreach", 8, 128),
    Cell("llama-135m", "float16", "fused", 16, 128),
    Cell("bert-22m_lora", "bfloat16", "fused", 16, 64),
    Cell("llama-360m_lora", "bfloat16", "fused", 16, 128),
)
TINY = (
    Cell("bert-tiny", "bfloat16", "fused", 2, 4, steps=36, early=27),
    Cell("llama-tiny_lora", "float32", "foreach", 2, 4, steps=36, early=27),
)
#: Of how many, from the first, steps are traced and memory is measured.
DEEP = 4
STEPS_WEIGHED = 7


def out_of_time(deadline: float) -> bool:
    return time.monotonic() > deadline


class Watched:
    """The kind of each step of an `LQA` in a bench."""

    def __init__(self, bench: Bench, name: str):
        self.bench, self.name = bench, name
        optimizer = bench.optimizers[name]
        assert isinstance(optimizer, LQA)
        self.lqa = optimizer

    def skip(self, cell: Cell, step: int) -> None:
        if cell.steps < RUNS[0] and step == cell.early:
            self.lqa.counts["steps"] = LATE

    def kind(self) -> str:
        """Of the step that is to be made."""
        return kind_of(self.lqa.rule, self.lqa.counts["steps"])


def kind_of(rule: Displacement, step: int) -> str:
    if rule.wants_probe(step):
        return "probe" if step else "first_probe"
    return "measured" if rule.wants_measurement(step) else "ordinary"


def kinds_of(steps: int) -> Counter[str]:
    """How many steps of each kind a run of so many has."""
    rule = Displacement()
    rule.start(1.0)
    return Counter(kind_of(rule, step) for step in range(steps))


def projected(ratios: dict[str, float], steps: int) -> float | None:
    """A run of so many steps over the base's, from the ratio of each kind; `None` where one was never seen."""
    kinds = kinds_of(steps)
    if kinds.keys() - ratios.keys():
        return None
    return sum(count * ratios[kind] for kind, count in kinds.items()) / steps


def paired(cell: Cell, device: str, deadline: float) -> dict[str, Any]:
    """Steps of AdamW, of AdamW again and of LQA in turn, on the same batches."""
    bench = Bench(cell.model, cell.optimizers, cell.batch_size, cell.length, getattr(torch, cell.dtype), device)
    base, control, own = cell.optimizers
    watched = Watched(bench, own)
    watched.lqa.plan(RUNS[0])
    times: dict[str, list[float]] = defaultdict(list)
    kinds: list[str] = []
    end = min(deadline, time.monotonic() + cell.seconds)
    for step in range(cell.steps):
        if out_of_time(end):
            break
        watched.skip(cell, step)
        batch = bench.batch()
        shift = step % 3
        kinds.append(watched.kind())
        for name in cell.optimizers[shift:] + cell.optimizers[:shift]:
            times[name].append(1e3 * bench.step(name, batch, batch))
    typical = statistics.median(times[base][1:] or times[base])
    milliseconds: dict[str, float] = {}
    ratios: dict[str, float] = {}
    for kind in {*kinds}:
        pairs = [(t, b) for t, b, k in zip(times[own], times[base], kinds, strict=True) if k == kind]
        milliseconds[kind] = statistics.median(t for t, _ in pairs)
        ratios[kind] = statistics.median(t / b for t, b in pairs)
    # Beside it the base has a first step, too, for which everybody's memory is allocated.
    ratios["first_probe"] = milliseconds["first_probe"] / typical
    return {
        **asdict(cell),
        "cell": cell.name,
        "weights": bench.parameters,
        "trained_bytes": bench.weights,
        "steps": len(kinds),
        "base_ms": typical,
        "control": statistics.median(b / a for a, b in zip(times[base], times[control], strict=True)),
        "kinds": {k: {"count": kinds.count(k), "ms": milliseconds[k], "ratio": ratios[k]} for k in milliseconds},
        # What a process pays once: kernels that are loaded, plans that are built for a forward without gradient.
        "warm_up_ms": milliseconds["first_probe"] - milliseconds["probe"] if "probe" in milliseconds else None,
        "whole": sum(times[own]) / sum(times[base]) if len(kinds) == RUNS[0] else None,
        "projected": {str(steps): projected(ratios, steps) for steps in RUNS},
        "rates": len({*watched.lqa.multipliers}),
        "step_size": watched.lqa.step_size,
        "counts": dict(watched.lqa.counts),
    }


#: What LQA does beside the base optimizer's step, by the method that does it.
LABELLED: list[tuple[Any, str, str]] = [
    (LQA, "step", "lqa: rest of the step"),
    (Prober, "probe", "probe: rest"),
    (ReplayedLoss, "__call__", "probe: forward passes"),
    (Direction, "__init__", "probe: rehearsal, copy of the origin"),
    (Direction, "move_to", "probe: moves"),
    (Direction, "restore", "probe: moves"),
    (Snapshot, "compare", "measured: slopes and sign agreement"),
    (Measurer, "read", "lqa: reading numbers"),
    (Displacement, "observe", "measured: rule"),
    (torch.optim.AdamW, "step", "base: step"),
]
REST, WHOLE = "training: forward, backward, clipping", "whole step"


@contextlib.contextmanager
def labelled() -> Iterator[None]:
    """Within it the profiler knows the parts of `LABELLED` by their names."""
    kept = [(owner, method, owner.__dict__[method]) for owner, method, _ in LABELLED]

    def wrapped(own: Any, label: str) -> Any:
        @functools.wraps(own)  # with its marks, by which a rehearsal's step of the base is told from a real one
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            with torch.profiler.record_function(label):
                return own(*args, **kwargs)

        return wrapper

    for owner, method, label in LABELLED:
        setattr(owner, method, wrapped(owner.__dict__[method], label))
    try:
        yield
    finally:
        for owner, method, own in kept:
            setattr(owner, method, own)


#: Calls of the runtime in which the host waits for the device.
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


def traced(bench: Bench, name: str) -> dict[str, Any]:
    """One step in the profiler: launches, waits, and milliseconds of each part, of the host and of the device.

    The bench itself waits twice in a step, and for its loss: what the base's step has, too.
    """
    on_cuda = bench.device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU]
    if on_cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    batch = bench.batch()
    with labelled(), torch.profiler.profile(activities=activities) as profile:
        with torch.profiler.record_function(WHOLE):
            bench.step(name, batch, batch)
    events = profile.events() or []
    labels = {WHOLE, *(label for _, _, label in LABELLED)}
    host: dict[str, float] = defaultdict(float)
    device: dict[str, float] = defaultdict(float)
    launches: Counter[str] = Counter()
    waits = 0
    for event in events:
        if event.device_type != torch.autograd.DeviceType.CPU:
            continue
        waits += event.name in WAITS
        own, above = (event.name if event.name in labels else None), event.cpu_parent
        while own is None and above is not None:
            own, above = (above.name if above.name in labels else None), above.cpu_parent
        # Backward passes run in a thread of their own, whose events have no parent: they are the training's.
        own = REST if own in (None, WHOLE) else own
        if event.name in labels:
            host[REST if event.name == WHOLE else event.name] += event.cpu_time_total
            outer = event.cpu_parent
            while outer is not None and outer.name not in labels:
                outer = outer.cpu_parent
            if outer is not None:
                host[REST if outer.name == WHOLE else outer.name] -= event.cpu_time_total
        elif event.kernels:
            device[own] += sum(kernel.duration for kernel in event.kernels)
            launches[own] += len(event.kernels)
        elif not on_cuda and event.name.startswith("aten::") and not event.cpu_children:
            launches[own] += 1
    return {
        # Without an accelerator: innermost operations, which stand for launches.
        "launches": dict(launches),
        "waits": waits,
        "host_ms": {label: value / 1e3 for label, value in host.items()},
        "device_ms": {label: value / 1e3 for label, value in device.items()},
    }


def trace(cell: Cell, device: str, deadline: float) -> dict[str, Any]:
    """One step of each kind in the profiler, and one of AdamW's."""
    base, _, own = cell.optimizers
    bench = Bench(cell.model, [base, own], cell.batch_size, cell.length, getattr(torch, cell.dtype), device)
    watched = Watched(bench, own)
    watched.lqa.plan(RUNS[0])
    for _ in range(2):
        bench.step(base, batch := bench.batch(), batch)
        traced(bench, base)  # the first use of the profiler takes seconds
    found = {"base": traced(bench, base)}
    seen: Counter[str] = Counter()
    for step in range(cell.steps):
        if out_of_time(deadline) or len(found) == len(KINDS) + 1:
            break
        watched.skip(cell, step)
        kind = watched.kind()
        seen[kind] += 1
        # Not the first of its kind, which may load kernels, but of those of which there may be one.
        if kind not in found and (seen[kind] > 1 or kind in ("first_probe", "probe")):
            found[kind] = traced(bench, own)
        else:
            bench.step(own, batch := bench.batch(), batch)
    return {"cell": cell.name, "kinds": found, "shares": {str(n): shares(found, n) for n in RUNS}}


def shares(found: dict[str, Any], steps: int) -> dict[str, dict[str, float]] | None:
    """Shares of a run of so many steps, of the host's time and the device's: they add up to 1."""
    kinds = kinds_of(steps)
    kinds["probe"] += kinds.pop("first_probe")  # whose warm-up is told apart elsewhere
    if kinds.keys() - found.keys():
        return None
    result = {}
    for side in ("host_ms", "device_ms"):
        spent: dict[str, float] = defaultdict(float)
        for kind, count in kinds.items():
            for label, value in found[kind][side].items():
                spent[label.partition(":")[0]] += count * value
        total = sum(spent.values())
        if total:
            result[side.removesuffix("_ms")] = {part: value / total for part, value in spent.items()}
    return result


def weigh(cell: Cell, device: str) -> dict[str, Any]:
    """Peaks of a probe step and of another, and what is held between steps, above the base's, in copies of weights."""
    base, _, own = cell.optimizers
    shape = cell.batch_size, cell.length, getattr(torch, cell.dtype), STEPS_WEIGHED, device
    theirs, ours = peaks(cell.model, base, *shape), peaks(cell.model, own, *shape)
    top = max(theirs["other"])
    return {
        "cell": cell.name,
        "base": top,
        "probe": max(ours["probe"]) - top,
        "other": max(ours["other"]) - top,
        "held": ours["held"][0] - theirs["held"][0],
    }


def machine(device: str) -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
        "command": " ".join(sys.argv),
    }


def measure_all(out: Path, device: str, minutes: float, tiny: bool) -> dict[str, Any]:
    """All parts, written to `out` after each piece, so that what is there survives whatever ends the process."""
    begun = time.monotonic()
    deadline = begun + 60 * minutes
    cells = TINY if tiny else CELLS
    result: dict[str, Any] = {"machine": machine(device), "cells": [], "steps": [], "memory": [], "skipped": []}
    pieces: list[tuple[str, Cell]] = []
    # Traces and memory after the cells that matter most, before the others.
    deep = 1 if tiny else DEEP
    pieces += [(part, cell) for part in ("cells", "steps", "memory") for cell in cells[:deep]]
    pieces += [("cells", cell) for cell in cells[deep:]]
    for part, cell in pieces:
        if out_of_time(deadline):
            result["skipped"].append(f"{part}: {cell.name}: out of time")
            continue
        started = time.monotonic()
        try:
            if part == "cells":
                found = paired(cell, device, deadline)
            else:
                found = trace(cell, device, deadline) if part == "steps" else weigh(cell, device)
        except (RuntimeError, ImportError) as error:  # out of memory, no peft: the other pieces are worth having
            result["skipped"].append(f"{part}: {cell.name}: {type(error).__name__}: {str(error)[:300]}")
            continue
        finally:
            if device == "cuda":
                torch.cuda.empty_cache()
        found["seconds_taken"] = time.monotonic() - started
        result[part].append(found)
        print(f"{time.monotonic() - begun:6.1f} s  {part:6} {_line(part, found)}", flush=True)
        result["seconds"] = time.monotonic() - begun
        out.write_text(json.dumps(result, indent=1))
    out.write_text(json.dumps(result, indent=1))
    for line in result["skipped"]:
        print(f"skipped  {line}")
    return result


def _line(part: str, found: dict[str, Any]) -> str:
    if part == "cells":
        runs = ", ".join(f"{n}: {r:.3f}" if r else f"{n}: not all kinds seen" for n, r in found["projected"].items())
        kinds = ", ".join(f"{k} {v['ratio']:.2f}" for k, v in sorted(found["kinds"].items()))
        return f"{found['cell']}: {found['base_ms']:.1f} ms, control {found['control']:.3f}; {kinds}; runs of {runs}"
    if part == "memory":
        return f"{found['cell']}: probe +{found['probe']:.2f}, other +{found['other']:.2f}, held +{found['held']:.2f}"
    counts = {k: (sum(v["launches"].values()), v["waits"]) for k, v in found["kinds"].items()}
    return f"{found['cell']}: launches and waits {counts}"
