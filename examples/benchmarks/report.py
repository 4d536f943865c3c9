"""Tables and figures from the runs that ``run.py`` has collected.

::

    python examples/benchmarks/report.py

writes ``REPORT.md`` and the figures beside the results. It needs neither torch nor the tasks' data.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import results
import sections
from figures import FIGURES
from results import Run
from sweeps import main_tables, tables_of
from yardstick import yardstick


def report(runs: list[Run], folder: Path) -> str:
    tables = tables_of(runs)
    chosen = main_tables(tables)
    newest = next((run for run in reversed(runs) if "threads" in run["machine"]), runs[-1])
    parts = [
        "# Benchmark",
        "Made by `python examples/benchmarks/report.py` from the raw results beside it; all runs by"
        " `python examples/benchmarks/run.py --table --data_dir data`. What each task is: `tasks.py`; what was run:"
        f" `stages.py`. Where nothing else is said: fp32, {newest['machine']}; torch {newest['torch']}, transformers"
        f" {newest['transformers']}. ± is the standard error over seeds. What was tried: [NOTES.md](NOTES.md).",
        "## The yardstick",
        *yardstick(tables),
    ]
    for name, (draw, caption) in FIGURES.items():
        (folder / name).unlink(missing_ok=True)
        draw(tables, chosen, folder / name)
        if (folder / name).exists():
            parts.append(f"![{caption}]({name})\n\n{caption}.")
    about_chance = (
        "AdamW at a rate some 3 % above the best of its sweep, with the same batches and seeds, over that best rate. It"
        " would be 1 if single runs were no matter of chance, and the bar not chosen after its runs."
    )
    about_parts = (
        "Loss over that of `lqa` as it is, seed by seed: geometric mean over settings, and ± the standard error over"
        " seeds. Learning rate: over the default's when four fifths of a run were over."
    )
    about_changes = (
        "As above. Every constant of the rule is halved and doubled; `bound`, a factor, is its root and its square."
        " `unknown` is of runs of unknown length, `tries` of losses that are no scale: none is here. `tau=0.0303`, 1 %"
        " more, shows chance. `lqa_adamw` is `LQAAdamW` without a closure."
    )
    about_ranks = (
        "By mean validation loss over the seeds that all have, of the methods without a rate that ran on all tasks, and"
        " of the best of AdamW's sweep."
    )
    about_settings = "As above, of settings in which more than the length differs from a task's default."
    about_sweeps = "Mean validation loss over seeds; in brackets their number where it is smaller. Bold: the bar."
    about_methods = (
        "Each task in its default setting. Other rates of AdamW are in the sweeps, changed options in the table of"
        " options. Failed: NaN, or no better than the commonest class, the mean, or the untrained model."
    )
    titled = [
        ("Chance", about_chance, sections.chance(tables)),
        ("Without one part", about_parts, sections.without_parts(tables)),
        ("Constants changed", about_changes, sections.changes(tables)),
        ("Other settings", about_settings, sections.other_settings(tables)),
        ("Mean rank", about_ranks, sections.ranks(chosen)),
        ("Failures of methods without a rate", "In tasks' default settings.", sections.failures(chosen)),
        ("The paper's claim", "Training loss, mean of ten steps, mean over seeds.", sections.paper_table(chosen)),
        ("Sweeps", about_sweeps, sections.sweeps(tables)),
    ]
    for title, about, text in titled:
        parts += [f"## {title}", about, text] if text else []
    parts += ["## All methods", about_methods]
    for table in filter(sections.has_peers, chosen):
        parts += [f"### {table.title()}", sections.methods(table)]
    if text := sections.only_lqa(table for table in chosen if not sections.has_peers(table)):
        parts += ["### Tasks without other methods than the yardstick's", text]
    return "\n\n".join(parts) + "\n"


def main(argv: list[str] | None = None) -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="?", type=Path, default=here / "results.jsonl")
    parser.add_argument("--output", type=Path, help="REPORT.md beside the results if not given")
    options = parser.parse_args(argv)
    output = options.output or options.results.with_name("REPORT.md")
    output.write_text(report(results.read(options.results), output.parent), encoding="utf-8")


if __name__ == "__main__":
    main()
