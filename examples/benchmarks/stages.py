"""The plan: stages of the report's runs, each of them tasks, methods, seeds and what differs from a task's default.

Stages stand in the order in which they are worth having. A kept task is run with a new rule only once that is chosen.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import tasks
from methods import HEAD, NO_RATE, PLAIN, REFERENCES, adamw

SEEDS = [0, 1, 2]
#: On which the rule was not chosen.
FRESH_SEEDS = [3, 4, 5, 6, 7, 8, 9]
#: Of the paper's tasks, whose runs take seconds; on the first ten the rule was chosen.
SEEDS_OF_PAPER, FRESH_SEEDS_OF_PAPER = list(range(10)), list(range(10, 20))
#: Every constant of the rule at half and at twice its value; `bound`, a factor, at its root and square. `unknown` is of
#: runs of unknown length, `tries` of losses that are no scale: none is here. `tau=0.0303`, 1 % more, is too little to
#: matter, and shows what chance does.
CHANGES = ["tau=0.015", "tau=0.06", "eta=0.15", "eta=0.6", "probe_interval=50", "probe_interval=200"]
CHANGES += ["length=0.28", "length=1.12", "decay=0.15", "decay=0.6", "head=4", "head=16", "unknown=500", "unknown=2000"]
CHANGES += ["bound=1.4142", "bound=4", "gain=2", "gain=8", "window=2", "window=8", "ramp=0.015", "ramp=0.06"]
CHANGES += ["tries=3", "tries=12", "tau=0.0303"]
#: A constant at which one part of the rule does nothing, and what that part is.
PARTS = {
    "length=0.000001": "the start that shapes give; the probe's radius is left",
    "head=1": "the first multiplier of head and vectors",
    "ramp=0": "the ramp",
    "gain=0": "moves of the base step size",
    "bound=1": "moves of per-tensor multipliers",
}

TEXTS = ("trec6", "banking77", "sms_spam", "vader_tweets", "r8")
PAPER = tasks.named(tasks.PAPER)
LANGUAGE = tasks.named(tasks.LANGUAGE) + tasks.named(tasks.LANGUAGE_LORA)
DECODERS = tasks.named(tasks.DECODER, "search")
#: The length people train, as far as two cores go.
HEADLINE = {"max_steps": 500, "batch_size": 16, "max_length": 32}
PAIRS = {**HEADLINE, "max_length": 64}

Entry = tuple[Sequence[str], list[str], list[int], dict[str, Any]]
STAGES: dict[str, list[Entry]] = {
    "text": [(TEXTS, ["lqa", *adamw("3e-5", "3e-3")], SEEDS, {})],
    "paper": [
        (PAPER[:3], ["lqa", "lqa_sgd", *adamw("1e-4", "1"), *REFERENCES], SEEDS_OF_PAPER, {}),
        (PAPER[3:], ["lqa", "lqa_sgd", *adamw("1e-4", "3e-2"), *REFERENCES], SEEDS_OF_PAPER, {}),
    ],
    "peers": [(TEXTS, [*NO_RATE, "lqa_paper", "lqa_sgd"], SEEDS, {}), (PAPER, NO_RATE, SEEDS_OF_PAPER, {})],
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
        (PAPER[:3], ["lqa", *adamw("1e-2", "3e-1")], SEEDS, {"max_steps": 1000}),
    ],
    "quickstart": [
        (
            ["r8"],
            ["lqa", *adamw("1e-4", "1e-3"), *(f"adamw@{r}" for r in ("5e-5", "1e-4", "3e-4"))],
            SEEDS,
            dict(tasks.QUICKSTART),
        )
    ],
    "insensitivity": [(["trec6", "sms_spam", *PAPER], [f"lqa+{change}" for change in CHANGES], SEEDS[:2], {})],
    "parts": [
        (
            ["trec6", "sms_spam", "r8", "trec6_lora", "banking77_lora", *PAPER],
            [f"lqa+{p}" for p in PARTS],
            SEEDS[:2],
            {},
        ),
        # Where the start cannot know the rate.
        ([f"{data}_lora_alpha{alpha}" for data in ("trec6", "r8") for alpha in (2, 64)], ["lqa+gain=0"], SEEDS[:2], {}),
    ],
    "without_closure": [([*TEXTS, "trec6_lora"], ["lqa", "lqa_adamw"], SEEDS, {})],
    # AdamW at the rate that is best on the other seeds, and the next to best where it is near.
    "seeds": [
        (TEXTS, ["lqa", *adamw("1e-4", "3e-4")], FRESH_SEEDS, {}),
        (PAPER[:2], ["lqa", *adamw("1e-1", "3e-1")], FRESH_SEEDS_OF_PAPER, {}),
        (["mlp_mnist"], ["lqa", *adamw("1e-2", "3e-2")], FRESH_SEEDS_OF_PAPER, {}),
        (["lenet_cifar"], ["lqa", *adamw("3e-3", "1e-2")], FRESH_SEEDS_OF_PAPER, {}),
        (["smollm2_lora"], ["lqa", *adamw("3e-3", "3e-3")], FRESH_SEEDS, {}),
        (["trec6"], ["lqa", *adamw("1e-4", "1e-4")], FRESH_SEEDS, {"max_steps": 1000}),
        (["smollm2"], ["lqa", *adamw("1e-4", "1e-4")], FRESH_SEEDS[:3], {}),
        (["trec6_lora"], ["lqa", *adamw("1e-3", "3e-3")], FRESH_SEEDS, {}),
        (["election"], ["lqa", *adamw("1e-4", "3e-4")], FRESH_SEEDS, {}),
        (["trec6_smollm2_lora", "r8_smollm2_lora"], ["lqa", *adamw("3e-3", "3e-3")], FRESH_SEEDS[:2], {}),
    ],
    # The best rate and 3 % more: what is chance.
    "chance": [
        (["trec6", "banking77", "r8"], ["adamw@3.1e-4+warmup"], [*SEEDS, *FRESH_SEEDS[:2]], {}),
        (["vader_tweets"], ["adamw@1.03e-4+warmup"], [*SEEDS, *FRESH_SEEDS[:2]], {}),
        (["sms_spam"], ["adamw@3.1e-4+warmup"], [*SEEDS, *FRESH_SEEDS], {}),
        (["trec6_lora"], ["adamw@3.1e-3+warmup"], [*SEEDS, *FRESH_SEEDS], {}),
        (["trec6_lora_alpha2"], ["adamw@1.03e-2+warmup"], SEEDS, {}),
        (["election_lora"], ["adamw@1.03e-3+warmup"], SEEDS, {}),
        (["trec6_smollm2", "election_smollm2"], ["adamw@3.1e-4+warmup"], SEEDS, {}),
        (["trec6_smollm2_lora", "r8_smollm2_lora"], ["adamw@3.1e-3+warmup"], [*SEEDS, *FRESH_SEEDS[:2]], {}),
        (["trec6"], ["adamw@1.03e-4+warmup"], SEEDS, HEADLINE),
        (["trec6"], ["adamw@1.03e-4+warmup"], SEEDS, {"max_steps": 1000}),
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
        (PAPER[:3], [*adamw("1e-3", "3e-3"), *adamw("1", "1")], SEEDS, {"max_steps": 1000}),
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
        (LANGUAGE, [*PLAIN, *HEAD], SEEDS, {}),
    ],
    "formulas_scratch": [
        (PAPER, PLAIN, SEEDS, {}),
        (["minilm_mlm"], [*PLAIN, *HEAD], SEEDS, {}),
        (["trec6_head", "vit_scratch", "gpt2_scratch"], [*PLAIN, *HEAD], SEEDS, {}),
    ],
    "headline": [
        (TEXTS, ["lqa", *adamw("1e-4", "3e-4"), *PLAIN, *HEAD], SEEDS, HEADLINE),
        (["trec6", "sms_spam", "r8"], adamw("3e-5", "3e-5"), SEEDS, HEADLINE),
        (["banking77", "vader_tweets"], adamw("1e-3", "3e-3"), SEEDS, HEADLINE),
        (DECODERS, ["lqa", *adamw("3e-5", "3e-4"), *PLAIN, *HEAD], SEEDS, {"max_steps": 300}),
        (["clinc150"], ["lqa", *adamw("3e-4", "3e-3"), *PLAIN, *HEAD], SEEDS, HEADLINE),
        (["stsb"], ["lqa", *adamw("3e-5", "3e-4"), *PLAIN, *HEAD], SEEDS, PAIRS),
        (["clinc150_smollm2"], ["lqa", *adamw("3e-5", "3e-4"), *PLAIN, *HEAD], SEEDS, {"max_steps": 300}),
    ],
    "new": [
        (["clinc150"], ["lqa", *adamw("1e-4", "1e-3"), *PLAIN, *HEAD], SEEDS, {"max_steps": 300}),
        (["stsb"], ["lqa", *adamw("3e-5", "3e-4"), *PLAIN, *HEAD], SEEDS, {"max_steps": 300}),
    ],
    # Set-ups of which there were too few, their search tasks and their kept ones.
    "more": [
        (["stsb_lora"], ["lqa", *adamw("3e-4", "3e-2"), *PLAIN, *HEAD], SEEDS, {}),
        (["banking77_lora", "clinc150_lora", "r8_lora"], ["lqa", *adamw("3e-4", "1e-2"), *PLAIN, *HEAD], SEEDS, {}),
        (["trec6_lora_alpha2", "r8_lora_alpha2"], ["lqa", *adamw("1e-3", "3e-2"), *PLAIN, *HEAD], SEEDS, {}),
        (["trec6_lora_alpha64", "r8_lora_alpha64"], ["lqa", *adamw("3e-4", "3e-3"), *PLAIN, *HEAD], SEEDS, {}),
        (["trec6_smollm2_lora", "r8_smollm2_lora"], ["lqa", *adamw("3e-4", "1e-2"), *PLAIN, *HEAD], SEEDS, {}),
        (["trec6_smollm2_lora", "r8_smollm2_lora"], ["lqa", *adamw("3e-4", "3e-3"), *HEAD], SEEDS, {"max_steps": 300}),
    ],
    "kept": [
        (["election_lora"], ["lqa", *adamw("3e-4", "1e-2"), *PLAIN, *HEAD], SEEDS, {}),
        (["clinc150_smollm2"], ["lqa", *adamw("1e-4", "1e-3"), *PLAIN, *HEAD], SEEDS, {}),
        (["stsb_smollm2_lora"], ["lqa", *adamw("3e-4", "1e-2"), *PLAIN, *HEAD], SEEDS, {}),
        (["t5_scratch"], ["lqa", *adamw("3e-4", "1e-2"), *PLAIN, *HEAD], SEEDS, {}),
    ],
    "sgd": [(TEXTS, [f"sgd@{rate}+warmup+momentum=0.9" for rate in ("3e-3", "1e-2", "3e-2")], [0], {})],
}


def filled(name: str, options: argparse.Namespace, **changes: Any) -> argparse.Namespace:
    """The options of a task: what was given, else its default; `changes` before both."""
    given = {key: value for key, value in vars(options).items() if value is not None}
    return argparse.Namespace(**{**vars(options), **tasks.of(name).setting, **given, **changes})


def plan(stages: Iterable[str], options: argparse.Namespace) -> list[tuple[str, str, int, argparse.Namespace]]:
    """Task, method, seed and options of each run of some stages, none twice."""
    runs: dict[tuple[Any, ...], tuple[str, str, int, argparse.Namespace]] = {}
    for stage in stages:
        if stage not in STAGES:
            raise SystemExit(f"--table {stage}: choose from {', '.join(STAGES)}")
        for names, methods, seeds, changes in STAGES[stage]:
            for seed, task, method in itertools.product(seeds, names, methods):
                own = filled(task, options, **{**tasks.of(task).setting, **changes})
                runs.setdefault((task, method, seed, *map(str, vars(own).values())), (task, method, seed, own))
    return list(runs.values())
