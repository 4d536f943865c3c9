"""The report's other tables: changed options, other settings, ranks, the paper's claim, sweeps, and all methods."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import tasks
from methods import REFERENCES, above, alias, nudged, parse_method, rate_of, swept, without_rate
from results import EARLY, Run, mean
from stages import PARTS
from sweeps import Beside, Table, geometric_mean
from yardstick import HEAD, METHODS, cell, header, ratio, row, summary_cell, together

#: The paper's references run on its own tasks only.
UNRANKED = ("bb",)
SWEEP = "AdamW, best of the sweep"


def failed(run: Run) -> bool:
    """Broken down, or no better than without a model (than the untrained one for language models)."""
    finite = math.isfinite(run["eval_loss"]) and math.isfinite(run["metric"])
    trivial = run["trivial_metric"]
    return run["error"] is not None or not finite or (trivial is not None and run["metric"] <= trivial)


def with_error(values: Sequence[float], digits: int = 4) -> str:
    if not all(math.isfinite(v) for v in values):
        return "diverged"
    text = f"{statistics.fmean(values):.{digits}f}"
    return f"{text} ± {statistics.stdev(values) / len(values) ** 0.5:.{digits}f}" if len(values) > 1 else text


def other_settings(tables: Iterable[Table]) -> str:
    rows = [found for table in tables if table.varied and (found := row(table, table.title()))]
    return "\n".join([*header(["setting"], HEAD), *rows]) if rows else ""


def chance(tables: Sequence[Table]) -> str:
    """AdamW at a few percent more than its best rate, beside that rate, and `lqa` on the same seeds."""
    rows: list[str] = []
    everything: list[tuple[Beside, Beside]] = []
    for table in (table for table in tables if not table.varied):
        best = rate_of(table.best() or "")
        for method in (m for m in table.methods if nudged(m) and above(rate_of(m), best)):
            pair = together(table, (method, "lqa"))
            if (more := pair[method]) and (own := pair["lqa"]):
                everything.append((more, own))
                rows.append(f"| {table.title()} | {rate_of(method):.3g} | {cell(more)} | {cell(own)} |")
    if not rows:
        return ""
    more, own = (summary_cell(found) for found in zip(*everything, strict=True))
    rows.append(f"| **all** | | {more} | {own} |")
    return "\n".join([*header(["setting", "rate", "AdamW at this rate", "`lqa`"], []), *rows])


def _changed(table: Table, method: str) -> tuple[list[float], list[float]] | None:
    """Ratios of loss and of the late learning rate to the default's, seed by seed."""
    own, default = table.methods.get(method, {}), table.methods.get("lqa", {})
    seeds = sorted(set(own) & set(default))
    if not seeds:
        return None
    losses = [own[seed]["eval_loss"] / default[seed]["eval_loss"] for seed in seeds]
    rates = [own[seed].get("late_rate", math.nan) / default[seed].get("late_rate", math.nan) for seed in seeds]
    return losses, [value for value in rates if math.isfinite(value) and value > 0]


def without_parts(tables: Sequence[Table]) -> str:
    """`lqa` without one of its parts over `lqa`."""
    return _variants(tables, {f"lqa+{change}": f"{part} (`{change}`)" for change, part in PARTS.items()})


def changes(tables: Sequence[Table]) -> str:
    """``lqa+OPTION=VALUE`` and `LQAAdamW` over `lqa`."""
    found = {m for table in tables for m in table.methods} - {f"lqa+{change}" for change in PARTS}
    methods = sorted(m for m in found if m == "lqa_adamw" or (m.startswith("lqa+") and "=" in m))
    return _variants(tables, {method: f"`{method.removeprefix('lqa+')}`" for method in methods})


def _variants(tables: Sequence[Table], methods: Mapping[str, str]) -> str:
    """Methods, and what they are called, over `lqa`: over all settings, then setting by setting."""
    rows = []
    for method, name in methods.items():
        pairs = {t.title(): pair for t in tables if not t.varied and (pair := _changed(t, method))}
        if not pairs:
            continue
        means = {title: geometric_mean(losses) for title, (losses, _) in pairs.items()}
        worst = max(means, key=lambda title: means[title])
        rates = [value for _, own in pairs.values() for value in own]
        each = []
        for title, (losses, _) in pairs.items():
            error = f" ± {statistics.stdev(losses) / len(losses) ** 0.5:.3f}" if len(losses) > 1 else ""
            each.append(f"{title.partition(':')[0]} {means[title]:.3f}{error} ({len(losses)})")
        rate = f"{geometric_mean(rates):.2f}" if rates else ""
        total = f"{geometric_mean(means.values()):.3f} | {ratio(means[worst])}, {worst}"
        rows.append(f"| {name} | {len(pairs)} | {total} | {rate} | {'; '.join(each)} |")
    names = ["change", "settings", "ratio", "worst setting", "learning rate", "each setting, and number of seeds"]
    return "\n".join([*header(names, []), *rows]) if rows else ""


def ranks(chosen: Sequence[Table]) -> str:
    """Mean ranks by validation loss of the methods without a rate, over the tasks that most of them ran."""
    names_of: list[str] = []
    losses: list[dict[str, float]] = []
    for table in chosen:
        own = {alias(m): m for m in table.methods if without_rate(m) and m not in UNRANKED}
        # A formula that only one kind of task has ranks nothing.
        own = {name: m for name, m in own.items() if name != "formula_m_head8"}
        seeds = set.intersection(*(set(table.methods[m]) for m in own.values())) if own else set()
        best = table.best(seeds) if seeds else None
        if best is None or "lqa" not in own:
            continue
        names_of.append(f"{table.task.name} ({len(seeds)})")
        losses.append({name: table.loss(m, seeds) for name, m in own.items()})
        losses[-1][SWEEP] = table.loss(best, seeds & set(table.methods[best]))
    if not losses:
        return ""
    most = max(map(len, losses))
    # A task that few methods ran ranks nothing.
    kept = [i for i, own_losses in enumerate(losses) if len(own_losses) > most / 2]
    names = sorted(set.intersection(*(set(losses[i]) for i in kept)))
    found: dict[str, list[int]] = defaultdict(list)
    for i in kept:
        for rank, name in enumerate(sorted(names, key=lambda n: losses[i][n]), start=1):
            found[name].append(rank)
    columns = ["method", "mean rank", "loss over that of AdamW's best rate (geometric mean)", "worst rank"]
    rows = [f"Tasks, and in brackets the number of seeds: {', '.join(names_of[i] for i in kept)}.", ""]
    rows += header(columns, [])
    for name in sorted(names, key=lambda n: statistics.fmean(found[n])):
        to_bar = geometric_mean(losses[i][name] / losses[i][SWEEP] for i in kept)
        rows.append(f"| `{name}` | {statistics.fmean(found[name]):.2f} | {to_bar:.3f} | {max(found[name])} |")
    return "\n".join(rows)


def failures(chosen: Sequence[Table]) -> str:
    """Of the methods that are given no rate, those with failed runs."""
    runs: dict[str, list[tuple[str, Run]]] = defaultdict(list)
    for table in chosen:
        for method in filter(without_rate, table.methods):
            runs[alias(method)] += [(table.task.name, run) for run in table.methods[method].values()]
    rows = []
    for method, own in sorted(runs.items()):
        if names := [name for name, run in own if failed(run)]:
            rows.append(f"- `{method}`: {len(names)} of {len(own)} ({', '.join(dict.fromkeys(names))})")
    return "\n".join(rows)


def paper_methods(table: Table) -> list[str]:
    """The paper's rule and what it compares with: the best constant rate, the best decay, Barzilai-Borwein, Adam."""

    def last(method: str) -> float:
        return mean(run.get("last_train_loss", math.inf) for run in table.methods[method].values())

    groups = [["lqa_paper+constant", "lqa_paper"]]
    groups += [[m for m in REFERENCES if m.startswith("sgd@") and m.endswith(end)] for end in ("+constant", "+decay")]
    groups += [["bb"], ["adamw@1e-3+constant"]]
    present = [[m for m in group if m in table.methods] for group in groups]
    return [min(group, key=last) for group in present if group]


def paper_table(chosen: Sequence[Table]) -> str:
    """Training loss at some steps: the paper claims the greatest reduction per step."""
    rows = []
    for table in (table for table in chosen if table.task.kind == tasks.PAPER):
        for method in paper_methods(table):
            runs = [run for run in table.methods[method].values() if "early_train_loss" in run]
            if not runs:
                continue
            values = [mean(run["early_train_loss"][i] for run in runs) for i in range(len(EARLY))]
            values.append(mean(run["last_train_loss"] for run in runs))
            cells = " | ".join(f"{value:.4f}" for value in values)
            rows.append(f"| {table.task.name} | `{method}` | {cells} | {len(runs)} |")
    steps = [f"after {step} steps" for step in EARLY]
    return "\n".join([*header(["task", "method", *steps, "at the end", "seeds"], []), *rows]) if rows else ""


def sweeps(tables: Sequence[Table]) -> str:
    """Mean validation loss of every rate of AdamW's that was run, the best in bold."""
    rates = sorted({rate_of(method) for table in tables for method in table.rates()})
    rows = []
    for table in tables:
        if len(own := table.rates()) < 2:
            continue
        most, best = max(len(table.methods[m]) for m in own), table.best()
        cells = {}
        for method in own:
            seeds = len(table.methods[method])
            value = f"{table.loss(method):.4g}" + (f" ({seeds})" if seeds < most else "")
            value += "" if parse_method(method).warmup else ", no warm-up"
            value = f"**{value}**" if method == best else value
            cells[rate_of(method)] = "; ".join(filter(None, [cells.get(rate_of(method), ""), value]))
        rows.append(f"| {table.title()} | {most} | " + " | ".join(cells.get(rate, "") for rate in rates) + " |")
    return "\n".join([*header(["setting", "seeds"], [f"{rate:.0e}" for rate in rates]), *rows]) if rows else ""


COLUMNS = ["validation loss", "metric or minus loss", "highest rate", "last train loss", "forward equivalents"]
COLUMNS += ["seeds", "failed"]


def has_peers(table: Table) -> bool:
    """Whether more ran than the yardstick has."""
    return any(without_rate(method) and alias(method) not in METHODS for method in table.methods)


def methods(table: Table) -> str:
    """All methods of one task but rates that are not the best, which the sweeps have, and changed options."""
    best = table.best()
    names = [m for m in table.methods if m == best or not (swept(m) or nudged(m) or m.startswith("lqa+"))]
    return "\n".join([*header(["method"], COLUMNS), *(_method(table, m) for m in sorted(names, key=table.loss))])


def only_lqa(tables: Iterable[Table]) -> str:
    rows = [f"| {table.title()} {_method(table, 'lqa')}" for table in tables if "lqa" in table.methods]
    return "\n".join([*header(["task", "method"], COLUMNS), *rows]) if rows else ""


def _method(table: Table, method: str) -> str:
    runs = list(table.methods[method].values())
    rates = [run["highest_rate"] for run in runs if "highest_rate" in run]
    last = [run["last_train_loss"] for run in runs if "last_train_loss" in run]
    cells = [f"`{method}`", with_error([r["eval_loss"] for r in runs]), with_error([r["metric"] for r in runs])]
    cells += [f"{max(rates, default=math.nan):.1e}", f"{mean(last):.3f}" if last else ""]
    cells += [f"{mean(run['forward_equivalents'] for run in runs):.0f}"]
    cells += [str(len(runs)), str(sum(map(failed, runs)) or "")]
    return "| " + " | ".join(cells) + " |"
