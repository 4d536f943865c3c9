"""Tables from the runs that ``run.py`` has collected.

::

    python examples/benchmarks/report.py results.jsonl > REPORT.md

One table per task and setting: mean and standard error of the validation loss and of the metric over seeds, and the
range of learning rates; then each method's rank by validation loss, averaged over tasks.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections import defaultdict

SETTING = ("task", "max_steps", "batch_size", "max_length", "schedule", "max_eval_samples")


def mean_and_error(values: list[float]) -> tuple[float, float]:
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return statistics.fmean(values), error


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    with open(sys.argv[1], encoding="utf-8") as file:
        runs = [json.loads(line) for line in file]
    settings: dict[tuple, dict[str, list[dict]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        settings[tuple(run[key] for key in SETTING)][run["method"]].append(run)

    ranks: dict[str, list[int]] = defaultdict(list)
    for setting, methods in settings.items():
        task, steps, batch, length, schedule, _ = setting
        print(f"### {task}: {steps} steps, batch {batch}, {length} tokens, {schedule} schedule\n")
        print("| method | validation loss | accuracy (or -MSE) | learning rates | probe forwards | seeds |")
        print("|---|---|---|---|---|---|")
        losses = {m: mean_and_error([r["eval_loss"] for r in found]) for m, found in methods.items()}
        for rank, method in enumerate(sorted(methods, key=lambda m: losses[m][0]), start=1):
            found = methods[method]
            ranks[method].append(rank)
            loss, metric = losses[method], mean_and_error([r["metric"] for r in found])
            rates = [rate for r in found for rate in r["learning_rate"] if rate > 0]
            print(
                f"| `{method}` | {loss[0]:.4f} ± {loss[1]:.4f} | {metric[0]:.4f} ± {metric[1]:.4f} |"
                f" up to {max(rates):.1e} | {found[-1]['probe_forwards']} | {len(found)} |"
            )
        print()
    if len(settings) > 1:
        print("### Mean rank by validation loss\n\n| method | mean rank | settings |\n|---|---|---|")
        for method in sorted(ranks, key=lambda m: statistics.fmean(ranks[m])):
            print(f"| `{method}` | {statistics.fmean(ranks[method]):.2f} | {len(ranks[method])} |")


if __name__ == "__main__":
    main()
