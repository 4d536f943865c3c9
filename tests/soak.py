"""A long run of a small language model on bytes, in which every step is checked.

    python tests/soak.py --text FILE [--steps 2000] [--bf16] [--optim lqa] [--optim_args probe_interval=10]

Any text will do. It exits with an error unless

- every step, probed or not, moved the weights bit for bit as a twin of the base optimizer does at the rates that were
  reported, and a rejected fit did not change the step size;
- the counters add up to the steps and probes that were seen;
- memory is flat: the resident set's median of the last quarter is at most 4 MiB above that of the second quarter.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, TrainingArguments

from hf_lqa import LQATrainer, Verdict
from hf_lqa.quadratic import rejected

MIB = 2**20


class Inspector(TrainerCallback):
    """Steps a twin of the base optimizer beside each step of training."""

    def __init__(self, trainer: LQATrainer):
        self.trainer = trainer
        self.process = psutil.Process()
        self.memory: list[int] = []
        self.verdicts: dict[str, int] = {}
        self.steps = self.probes = self.different = self.moved = self.forwards = 0
        trainer.add_callback(self)

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        lqa = self.trainer.lqa
        assert lqa is not None
        self.held, self.last_probe, self.skipped = lqa.base_step_size, lqa.last_probe, lqa.counts["skipped"]
        self.groups = []
        for group in lqa.base.param_groups:
            twins = []
            for p in group["params"]:
                twin = p.detach().clone().requires_grad_()
                twin.grad = None if p.grad is None else p.grad.detach().clone()
                twins.append((twin, p, copy.deepcopy(lqa.base.state.get(p))))
            self.groups.append({**group, "params": twins})

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        lqa = self.trainer.lqa
        assert lqa is not None
        base = type(lqa.base)([{**group, "params": [t]} for group in self.groups for t, _, _ in group["params"]])
        rates = lqa.multipliers or [1.0] * len(base.param_groups)
        for group, rate in zip(base.param_groups, rates, strict=True):
            group["lr"] = lqa.step_size * rate
        for twin, _, state in (entry for group in self.groups for entry in group["params"]):
            if state:
                base.state[twin] = state
        if lqa.counts["skipped"] == self.skipped:
            base.step()
        pairs = [(t, p) for group in self.groups for t, p, _ in group["params"]]
        self.different += not all(torch.equal(t, p) for t, p in pairs)
        self.steps += 1
        if (probe := lqa.last_probe) is not self.last_probe and probe is not None:
            self.probes += 1
            self.forwards += 2 if probe.radius == probe.radius else 0  # NaN: there was no radius to probe at
            self.verdicts[str(probe.fit.verdict)] = self.verdicts.get(str(probe.fit.verdict), 0) + 1
            if not probe.fit.verdict.usable and lqa.rule.name == "paper" and self.held is not None:
                self.moved += lqa.base_step_size != self.held
        del self.groups
        self.memory.append(self.process.memory_info().rss)


def rows(text: bytes, length: int) -> list[dict[str, torch.Tensor]]:
    pieces = torch.tensor(list(text[: len(text) // length * length])).reshape(-1, length)
    return [{"input_ids": piece, "labels": piece} for piece in pieces]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--bf16", action="store_true", help="under bfloat16 autocast")
    parser.add_argument("--pure_bf16", action="store_true", help="with weights in bfloat16")
    parser.add_argument("--optim", default="lqa", choices=["lqa", "lqa_sgd", "lqa_paper"])
    parser.add_argument("--optim_args", default="probe_interval=10")
    options = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, num_key_value_heads=2, attention_dropout=0.1, **sizes))
    if options.pure_bf16:
        model = model.to(torch.bfloat16)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            optim=options.optim,
            optim_args=options.optim_args,
            max_steps=options.steps,
            per_device_train_batch_size=8,
            logging_steps=max(options.steps // 20, 1),
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            bf16=options.bf16,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = LQATrainer(model, args, train_dataset=rows(options.text.read_bytes(), 32))
        inspector = Inspector(trainer)
        begun = time.perf_counter()
        trainer.train()
    lqa, memory = trainer.lqa, inspector.memory
    assert lqa is not None
    quarter = len(memory) // 4
    second, last = (statistics.median(memory[i * quarter : (i + 1) * quarter]) for i in (1, 3))
    slope = statistics.linear_regression(range(len(memory) - quarter), memory[quarter:]).slope
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    counted = {v.value: lqa.counts[v.value] for v in Verdict if lqa.counts[v.value]}
    found = {
        "steps": inspector.steps,
        "probes": inspector.probes,
        "verdicts": inspector.verdicts,
        "rejected": rejected(lqa.counts),
        "steps_unlike_the_base": inspector.different,
        "step_sizes_moved_by_rejected_fits": inspector.moved,
        "memory_mib": round(last / MIB, 1),
        "growth_mib": round((last - second) / MIB, 2),
        "bytes_per_step": round(slope),
        "loss": [round(losses[0], 3), round(losses[-1], 3)],
        "minutes": round((time.perf_counter() - begun) / 60, 1),
    }
    print(json.dumps(found))
    wrong = []
    if inspector.different or inspector.moved:
        wrong.append("a step was not the base optimizer's at the held rate")
    if lqa.counts["steps"] != options.steps or inspector.steps != options.steps:
        wrong.append(f"steps: {lqa.counts}")
    if counted != inspector.verdicts or sum(counted.values()) != inspector.probes:
        wrong.append(f"verdicts: {lqa.counts}")
    if lqa.counts["probe_forwards"] != inspector.forwards or not inspector.probes:
        wrong.append(f"probe forwards: {lqa.counts}")
    if last - second > 4 * MIB:
        wrong.append(f"memory grew by {(last - second) / MIB:.1f} MiB")
    print(*wrong, sep="\n", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
