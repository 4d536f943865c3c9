"""Fine-tune with every method on every task and seed, and append each finished run to a JSON-lines file.

::

    python examples/benchmarks/run.py --tasks r8 --methods lqa adamw@1e-4+warmup adamw@3e-4+warmup --seeds 0 1 2
    python examples/benchmarks/run.py --table --data_dir data
    python examples/benchmarks/run.py --table headline --list --data_dir data
    python examples/benchmarks/run.py --table headline --worker 1/2 --data_dir data
    python examples/benchmarks/run.py --tasks imdb --data_arguments "--dataset_name imdb --validation_split test"

Runs that the file has already are not repeated, so a benchmark can be stopped and continued. ``--table`` runs all of
the report, or the stages that are named (`stages.py`). ``--list`` says what of it is missing, and how long that takes.
``--worker 1/2`` and ``--worker 2/2`` share it between two processes. ``report.py`` makes tables and figures of it.

A **task** is one of `tasks.py`; a folder under ``--data_dir`` with ``train.csv`` and ``validation.csv``, columns
``text`` and ``label`` (classes) or ``score`` (regression); or any name, if ``--data_arguments`` says which data it is,
in the words of ``text_classification.py``. Options that are not given have the task's default.

A **method** is an ``--optim`` or a name out of ``formulas.py`` or ``peers.py``, with ``@RATE`` for its learning rate,
``+warmup`` for a warm-up over 6 % of the steps, ``+constant``, ``+cosine`` or ``+decay`` for another schedule than the
task's, and ``+KEY=VALUE`` for its ``--optim_args``; ``adamw`` is ``adamw_torch_fused``.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import loaders
import quickstart
import results
import training
import transformers
from stages import STAGES, filled, plan

Planned = tuple[str, str, int, argparse.Namespace]


def identity(task: str, method: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """What tells one run from another."""
    own = {"task": task, "method": method, "seed": seed}
    return {key: own[key] if key in own else getattr(options, key) for key in results.IDENTITY}


def missing(runs: Iterable[Planned], path: Path) -> list[Planned]:
    found = {results.key(run) for run in results.read(path)}
    return [run for run in runs if results.key(identity(*run)) not in found]


def listed(runs: list[Planned], path: Path) -> str:
    """What is to be run, task by task, and about how long it takes by the runs there are."""
    known = results.read(path)
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for planned in runs:
        run = identity(*planned)
        groups.setdefault((run["task"], *(run[key] for key in ("max_steps", "batch_size", "max_length"))), []).append(
            run
        )
    lines, total, unknown = [], 0.0, 0
    for (task, steps, batch, length), group in groups.items():
        times = [results.seconds(run, known) for run in group]
        seconds = sum(time for time in times if time is not None)
        total, unknown = total + seconds, unknown + times.count(None)
        tokens = f", {length} tokens" if length else ""
        lines.append(
            f"{task}, {steps} steps of batch {batch}{tokens}: {len(group)} runs,"
            f" {'?' if None in times else f'{seconds:.0f}'} s ({', '.join(dict.fromkeys(r['method'] for r in group))})"
        )
    end = f"{len(runs)} runs, {total:.0f} s ({total / 3600:.1f} h)"
    return "\n".join([*lines, end + (f", and {unknown} of which nothing alike was run" if unknown else "")])


def share(text: str) -> tuple[int, int]:
    """Of ``I/N``: which of how many workers, from 0."""
    first, _, number = text.partition("/")
    if not (first.isdigit() and number.isdigit() and 1 <= int(first) <= int(number)):
        raise argparse.ArgumentTypeError(f"{text}: give I/N with 1 <= I <= N, as in 1/2")
    return int(first) - 1, int(number)


def options_of(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["r8"])
    parser.add_argument("--methods", nargs="+", default=["lqa", "adamw@5e-5", "adamw@1e-4", "adamw@3e-4"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--table", nargs="*", metavar="STAGE", help="all runs of the report, or some stages of them")
    parser.add_argument("--list", action="store_true", help="only say what is missing, and how long it takes")
    parser.add_argument("--worker", type=share, default=(0, 1), metavar="I/N", help="run the I-th of N shares")
    parser.add_argument("--add", nargs="+", type=Path, help="only append the runs of other files that are not there")
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
    if options.add is not None:
        for path in options.add:
            print(f"{path}: {results.add(options.results, path)} runs added")
        return
    # One line for each of thousands of steps would say that a scheduler's warm-up starts at 0, and the like.
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if options.table is not None:
        runs = plan(options.table or STAGES, options)
    else:
        runs = [(t, m, s, filled(t, options)) for t in options.tasks for s in options.seeds for m in options.methods]
    runs = [planned for planned in runs if results.mine(identity(*planned), *options.worker)]
    if options.list:
        print(listed(missing(runs, options.results), options.results))
        return
    for task, method, seed, own in runs:
        # Read again each time: another process may be appending to it.
        if not missing([(task, method, seed, own)], options.results):
            continue
        run = {**identity(task, method, seed, own), **training.train(loaders.load(task, own), method, seed, own)}
        results.write(options.results, run)
        print(
            f"{task} {method} seed {seed}: loss {run['eval_loss']:.4f}, metric {run['metric']:.4f},"
            f" {run['train_seconds']:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
