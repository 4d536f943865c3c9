"""Base optimizers that a Trainer was given, or that a method of its own built: checked, and brought to unit rate."""

from __future__ import annotations

from typing import Any

import torch

from .groups import why_no_base
from .probe import defined_as, definer

#: What a scheduler keeps in its optimizer's groups, and in itself, that is a learning rate.
_GROUP_RATES = ("lr", "initial_lr", "max_lr", "min_lr")
_SCHEDULER_RATES = ("base_lrs", "max_lrs", "min_lrs", "_last_lr", "eta_min", "min_lr", "max_lr")


def source_of_base(trainer: Any) -> str | None:
    """What gives a Trainer's base optimizer, where that is not Transformers' own code alone."""
    if getattr(trainer, "optimizer_cls_and_kwargs", None) is not None:
        return "optimizer_cls_and_kwargs"
    for name in ("create_optimizer", "get_optimizer_cls_and_kwargs"):
        if not definer(trainer, name).__module__.startswith("transformers."):
            return defined_as(trainer, name)
    return None


def refuse_base(base: Any, source: str) -> None:
    """Refuse an optimizer that cannot be a base.

    Raises:
        ValueError: with `source`, where the optimizer comes from, and the remedy.
    """
    if reason := why_no_base(base):
        raise ValueError(
            f"{source} gives a {type(base).__name__} under --optim lqa: {reason}. Give e.g. AdamW, Adafactor, Lion or"
            " SGD, which LQA goes around, or leave it out, or use another --optim"
        )


def largest_rate(base: torch.optim.Optimizer, scheduler: Any = None) -> float:
    """The largest learning rate that the groups were set up with, a scheduler's peak included."""
    rates = [[float(group[key]) for key in ("initial_lr", "max_lr") if key in group] for group in base.param_groups]
    peaks = scheduler.max_lrs if isinstance(scheduler, torch.optim.lr_scheduler.CyclicLR) else []
    found = [max(rates or [float(group["lr"])]) for rates, group in zip(rates, base.param_groups, strict=True)]
    return max(*found, *map(float, peaks), -float("inf"))


def to_multipliers(base: torch.optim.Optimizer, scheduler: Any, source: str) -> float:
    """Divide all learning rates of `base`, and of a `scheduler` bound to it, by the largest; return that one.

    Ratios between groups and a schedule's shape stay what they are; the largest rate becomes 1.

    Raises:
        ValueError: no learning rate is positive, or the scheduler keeps its rates where they cannot be found.
    """
    unit = largest_rate(base, scheduler)
    if not 0 < unit < float("inf"):
        raise ValueError(f"{source} gives learning rates of at most {unit!r} under --optim lqa: they must be > 0")
    if unit == 1:
        return unit
    # Before anything is changed: these tell where their rates are.
    if scheduler is not None and not isinstance(
        scheduler, (torch.optim.lr_scheduler.LRScheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
    ):
        raise ValueError(
            f"{source} gives learning rates of up to {unit:g} with a {type(scheduler).__name__} under --optim lqa:"
            " rates are multipliers there, and this scheduler's could not be divided. Set both up with a largest rate"
            " of 1, or use --lr_scheduler_type"
        )
    for group in base.param_groups:
        for key in _GROUP_RATES:
            if group.get(key) is not None:
                group[key] = group[key] / unit
    _divide(scheduler, unit)
    return unit


def _divide(scheduler: Any, unit: float) -> None:
    for key in _SCHEDULER_RATES:
        value = vars(scheduler).get(key) if scheduler is not None else None
        if isinstance(value, (list, tuple)):
            setattr(scheduler, key, [rate / unit if rate is not None else None for rate in value])
        elif isinstance(value, (int, float)):
            setattr(scheduler, key, value / unit)
    for part in getattr(scheduler, "_schedulers", []):  # of SequentialLR, ChainedScheduler
        _divide(part, unit)


def described(base: torch.optim.Optimizer, unit: float) -> str:
    """What `to_multipliers` has made of the learning rates, in words."""
    after = sorted({float(group.get("max_lr", group.get("initial_lr", group["lr"]))) for group in base.param_groups})
    return (
        f"its learning rates ({_span([rate * unit for rate in after])}) are multipliers of the measured step size now"
        f" ({_span(after)})"
    )


def _span(rates: list[float]) -> str:
    return f"{rates[0]:.3g}" if rates[0] == rates[-1] else f"{rates[0]:.3g} to {rates[-1]:.3g}"
