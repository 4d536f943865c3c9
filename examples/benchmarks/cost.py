"""What LQA costs: step times of optimizers, paired step by step in one process, against plain AdamW.

::

    python examples/benchmarks/cost.py --steps 200 --batch_size 16 --length 64

Every optimizer trains its own copy of the model on the same batches, and they take turns at every step, so that
whatever else the machine does hits all alike. Reported are whole runs, the sum of all step times over AdamW's, probes
included; and the medians of the ratios of single steps, with and without a probe.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import quickstart
import torch
from transformers import AutoModelForSequenceClassification

from hf_lqa import LQA, ReplayedLoss

OPTIMIZERS = {
    "adamw": lambda params: torch.optim.AdamW(params, lr=1e-4, fused=True),
    "adamw again": lambda params: torch.optim.AdamW(params, lr=1e-4, fused=True),
    "lqa": lambda params: LQA(torch.optim.AdamW(params, lr=1.0, fused=True)),
    "lqa_paper": lambda params: LQA(torch.optim.SGD(params, lr=1.0), policy="paper"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="name on the hub or folder; MiniLM-L6 from PyPI if not given")
    parser.add_argument("--optimizers", nargs="+", default=["adamw again", "lqa", "lqa_paper"], choices=OPTIMIZERS)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of autocast")
    options = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = options.model or str(quickstart.minilm(quickstart.CACHE))
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=8).to(device).train()
    names = ["adamw", *options.optimizers]
    models = {n: copy.deepcopy(model) for n in names}
    optimizers = {n: OPTIMIZERS[n](models[n].parameters()) for n in names}
    times: dict[str, list[float]] = {n: [] for n in names}
    probed: dict[str, list[bool]] = {n: [] for n in names}
    dtype = getattr(torch, options.dtype)

    for _ in range(options.steps):
        ids = torch.randint(1000, 20000, (options.batch_size, options.length), device=device)
        labels = ids[:, 0] % 8
        for n in names:
            before = optimizers[n].counts["probe_forwards"] if isinstance(optimizers[n], LQA) else 0
            _synchronize(device)
            begun = time.perf_counter()
            _step(models[n], optimizers[n], ids, labels, device, dtype)
            _synchronize(device)
            times[n].append(time.perf_counter() - begun)
            after = optimizers[n].counts["probe_forwards"] if isinstance(optimizers[n], LQA) else 0
            probed[n].append(after > before)

    print(
        f"{name}: {options.steps} steps, batch {options.batch_size} x {options.length} tokens,"
        f" {options.dtype}, {device}"
    )
    print("| optimizer | whole run / AdamW | median step without a probe / AdamW | probe step / AdamW | probes |")
    print("|---|---|---|---|---|")
    for n in names[1:]:
        # The first step allocates everybody's memory.
        pairs = list(zip(times[n], times["adamw"], probed[n], strict=True))[1:]
        whole = sum(t for t, _, _ in pairs) / sum(b for _, b, _ in pairs)
        plain = [t / b for t, b, was in pairs if not was]
        probes = [t / b for t, b, was in pairs if was]
        cells = [f"{statistics.median(kind):.3f}" if kind else "" for kind in (plain, probes)]
        print(f"| {n} | {whole:.3f} | {cells[0]} | {cells[1]} | {len(probes)} |")
    print(f"AdamW: {statistics.median(times['adamw']) * 1e3:.1f} ms a step (median)")


def _step(model, optimizer, ids, labels, device, dtype) -> None:
    def compute() -> torch.Tensor:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not torch.float32):
            return model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss

    optimizer.zero_grad()
    closure = None
    if isinstance(optimizer, LQA) and optimizer.wants_probe:
        closure = ReplayedLoss(model)
        loss = closure.record(compute)
    else:
        loss = compute()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step(closure) if isinstance(optimizer, LQA) else optimizer.step()
    loss.item()  # as the Trainer does, to log it


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
