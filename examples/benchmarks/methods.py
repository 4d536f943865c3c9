"""Names of methods: what ``NAME@RATE+warmup+SCHEDULE+KEY=VALUE`` says, and which of them are what.

A key is an option in ``optim_args`` or, where that has none of the name, a constant of the rule.

Needs no torch, so that the report can read the names.
"""

from __future__ import annotations

from dataclasses import dataclass

SCHEDULES = ("constant", "cosine", "linear", "decay")
HALF_DECADES = ["1e-5", "3e-5", "1e-4", "3e-4", "1e-3", "3e-3", "1e-2", "3e-2", "1e-1", "3e-1", "1"]
#: AdamW at a rate that shapes give (`formulas.py`), with the sweep's warm-up.
PLAIN, HEAD = ["formula_n+warmup", "formula_m+warmup"], ["formula_m_head8+warmup"]
#: Methods with a rate in their names that is nobody's choice here: their authors' default.
OWN_RATE = ("schedule_free_adamw@2.5e-3+warmup",)
#: Methods that are given no rate, or their authors' own.
NO_RATE = ["prodigy", "dadapt_adam", *OWN_RATE, "ldog", "dog", "momo_adam"]
NO_RATE += ["mechanic_adamw", "salsa", "gen_adamw", "greedy", "adamw"]
#: The paper's reference methods.
REFERENCES = [
    *(f"sgd@{rate}" for rate in ("1e-2", "1e-1", "1")),
    *(f"sgd@{rate}+constant" for rate in ("1e-2", "1e-1", "3e-1", "1")),
    *("sgd@1e-1+decay", "sgd@1+decay", "bb", "adamw@1e-3+constant", "lqa_paper", "lqa_paper+constant"),
]


@dataclass(frozen=True)
class Method:
    """The parts of a method's name."""

    name: str
    rate: float | None
    warmup: bool
    schedule: str | None
    options: tuple[str, ...]
    constants: tuple[tuple[str, str], ...] = ()


#: Keys that ``optim_args`` knows for every rule.
OPTIONS = ("tau", "eta", "probe_interval", "probe_radius")


def parse_method(method: str) -> Method:
    # A plus may be part of a number's exponent, but nothing here needs one.
    head, *extras = method.split("+")
    name, _, rate = head.partition("@")
    schedules = [extra for extra in extras if extra in SCHEDULES]
    given = [extra for extra in extras if "=" in extra]
    if unknown := set(extras) - {"warmup", *schedules, *given}:
        raise SystemExit(f"--methods {method}: {', '.join(sorted(unknown))} means nothing")
    found = float(rate) if rate else None
    constant = [extra for extra in given if name == "lqa" and extra.partition("=")[0] not in OPTIONS]
    options = tuple(extra for extra in given if extra not in constant)
    pairs = tuple((key, value) for key, _, value in (extra.partition("=") for extra in constant))
    return Method(name, found, "warmup" in extras, schedules[-1] if schedules else None, options, pairs)


def adamw(first: str, last: str) -> list[str]:
    """AdamW at rates half a decade apart, with 6 % warm-up."""
    rates = HALF_DECADES[HALF_DECADES.index(first) : HALF_DECADES.index(last) + 1]
    return [f"adamw@{rate}+warmup" for rate in rates]


def swept(method: str) -> bool:
    """One of the rates of AdamW's sweep."""
    return method.startswith("adamw@") and "constant" not in method and not nudged(method)


def nudged(method: str) -> bool:
    """AdamW at a few percent more than a rate of the sweep: too little to matter, so the difference is chance."""
    return method.startswith("adamw@") and any(above(rate_of(method), float(rate)) for rate in HALF_DECADES)


def above(rate: float, other: float) -> bool:
    """Whether a rate is up to 5 % more than another."""
    return 1.0 < rate / other < 1.05


def rate_of(method: str) -> float:
    return float(method.partition("@")[2].partition("+")[0] or "nan")


def without_rate(method: str) -> bool:
    return ("@" not in method and "=" not in method) or method in OWN_RATE


def alias(method: str) -> str:
    """One name for a method in whatever schedule it runs: the paper's own rule has none on its tasks."""
    return method.removesuffix("+constant").removesuffix("+warmup") if "@" not in method else method
