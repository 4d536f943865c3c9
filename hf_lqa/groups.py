"""A base optimizer's param groups, as they stand while its parameters have different rates."""

from __future__ import annotations

import contextlib
import itertools
import operator
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer

from .options import NO_BASE

#: Optimizers whose update of an element depends on that element's gradient and state, and through nothing but weight
#: decay on its weight.
ELEMENTWISE = tuple(
    getattr(torch.optim, name)
    for name in ("Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "SGD")
)

_PLAIN = (bool, int, float, str, type(None))


def why_no_base(base: Any) -> str | None:
    """Why an optimizer cannot give the direction; `None` where it can."""
    if not isinstance(base, torch.optim.Optimizer):
        return "it is no torch.optim.Optimizer"
    if isinstance(base, AcceleratedOptimizer):
        return "it is prepared, so whether it steps is Accelerate's matter. Go around its .optimizer, and prepare LQA"
    if isinstance(base, torch.optim.LBFGS):
        return "it evaluates the loss itself in every step"
    if any(group.get("lr") is None for group in base.param_groups):
        return "its param groups have no 'lr', which LQA sets"
    if type(base).__name__.lower() in ("lomo", "adalomo"):
        return NO_BASE["lomo"]
    if isinstance(base, LayerWiseDummyOptimizer):
        return NO_BASE["_layerwise"]
    if callable(getattr(base, "train", None)) and callable(getattr(base, "eval", None)):
        return NO_BASE["schedule_free"]
    if any({"d", "growth_rate"} <= group.keys() for group in base.param_groups):
        return "it estimates a learning rate of its own, and its update is not proportional to 'lr'"
    return None


def check_base(base: torch.optim.Optimizer) -> None:
    """Warn if the rate of `base` looks like one.

    Raises:
        ValueError: it is none that `LQA` can step.
    """
    if reason := why_no_base(base):
        raise ValueError(f"base={type(base).__name__}: {reason}. Use e.g. AdamW, Adafactor, Lion or SGD")
    if not any(group["params"] for group in base.param_groups):
        raise ValueError("base has no parameters: every parameter of the model is frozen (requires_grad=False)")
    if max(float(group["lr"]) for group in base.param_groups) < 0.1:
        warnings.warn(
            f"The base optimizer's lr is {float(base.param_groups[0]['lr'])}. Under LQA it multiplies the step size"
            " that was measured: construct the base optimizer with lr=1.0 unless that is what you want.",
            stacklevel=3,
        )


def params_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Of all param groups, in their order: what places count."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def with_gradient(base: torch.optim.Optimizer) -> list[Tensor]:
    """The parameters that a step of `base` moves."""
    return [p for p in params_of(base) if p.grad is not None]


def largest_lr(base: torch.optim.Optimizer) -> float:
    """The largest multiplier of all param groups, schedules left out: these note what they begin or end with."""
    return max(float(group.get(key, 0.0)) for group in base.param_groups for key in ("lr", "initial_lr", "max_lr"))


def growth(base: torch.optim.Optimizer) -> float:
    """How many times its first update one of `base` becomes along gradients that agree: 10 with a momentum of 0.9.

        sum_k momentum^k = (1 - dampening) / (1 - momentum)        over 1 + momentum with Nesterov's

    Those of SGD and RMSprop, which keep a sum; a mean, as Adam keeps it, does not grow.
    """
    if not isinstance(base, (torch.optim.SGD, torch.optim.RMSprop)):
        return 1.0
    found = [
        (1 - group.get("dampening", 0.0)) / (1 - momentum) / (1 + momentum * group.get("nesterov", False))
        for group in base.param_groups
        if 0 < (momentum := group["momentum"]) < 1
    ]
    return max([1.0, *found])


@contextlib.contextmanager
def rescaled(
    base: torch.optim.Optimizer, scale: float, rates: list[float], division: Division | None = None
) -> Iterator[None]:
    """Within it the learning rate of parameter `i` of `base` is ``lr * scale * rates[i]``, or ``lr * scale``.

    A param group whose parameters have different rates stands there as several. What `base` keeps in a group (some
    count steps there) is kept.

    Args:
        division: remembers the parts from one call to the next, for who does this at every step, and asks for no order
            of the parameters: groups that differ in nothing else are divided as one.
    """
    groups = base.param_groups
    parts = divided(groups, _each(groups), rates) if division is None else division.parts(base, rates)
    found = [
        {**(group := groups[places[0]]), "params": params, "lr": group["lr"] * scale * rate}
        for places, params, rate in parts
    ]
    base.param_groups = found
    try:
        yield
    finally:
        base.param_groups = groups
        if type(base) not in ELEMENTWISE:  # which keep nothing there
            for (places, _, _), part in zip(parts, found, strict=True):
                for i in places:
                    groups[i].update((key, value) for key, value in part.items() if key not in ("params", "lr"))


#: Places of the param groups that it is a part of, its parameters, and their rate.
_Part = tuple[list[int], list[Tensor], float]


def _each(groups: list[dict[str, Any]]) -> list[list[int]]:
    return [[i] for i in range(len(groups))]


def divided(groups: list[dict[str, Any]], alike: list[list[int]], rates: list[float]) -> list[_Part]:
    """A part for each rate among the parameters of the groups that are `alike`; at 1 where there are no rates."""
    rate_of = iter(rates or itertools.repeat(1.0))
    by_rate: list[dict[float, list[Tensor]]] = [{} for _ in alike]
    of = {i: found for places, found in zip(alike, by_rate, strict=True) for i in places}
    for i, group in enumerate(groups):
        for p, rate in zip(group["params"], rate_of, strict=False):
            of[i].setdefault(rate, []).append(p)
    return [
        (places, params, rate)
        for places, found in zip(alike, by_rate, strict=True)
        for rate, params in (found or {1.0: []}).items()  # an optimizer may know its groups by position
    ]


class Division:
    """The parts that param groups have at different rates, the same as long as neither groups nor rates change.

    Groups of equal options are one to an optimizer that knows no groups. Each part takes its time in an optimizer, and
    a launch or more on an accelerator: a Trainer's two groups without weight decay would double them.
    """

    def __init__(self) -> None:
        self._alike: list[list[int]] = []
        self._rates: list[float] = []
        self._params: list[list[Tensor]] = []
        self._parts: list[_Part] = []

    def parts(self, base: torch.optim.Optimizer, rates: list[float]) -> list[_Part]:
        groups = base.param_groups
        alike = _of_equal_options(groups) if type(base) in ELEMENTWISE else _each(groups)
        params = [group["params"] for group in groups]
        if alike != self._alike or rates != self._rates or not all(map(same, params, self._params)):
            self._parts = divided(groups, alike, rates)
            # Copies: a group's list may change in place.
            self._alike, self._rates, self._params = alike, list(rates), [list(ps) for ps in params]
        return self._parts


def _of_equal_options(groups: list[dict[str, Any]]) -> list[list[int]]:
    """Places of groups that differ in nothing but their parameters; each alone where that cannot be told."""
    options = [{key: value for key, value in group.items() if key != "params"} for group in groups]
    if len(groups) == 1 or not all(_is_plain(value) for kept in options for value in kept.values()):
        return _each(groups)
    found: list[list[int]] = []
    for i, kept in enumerate(options):
        known = next((places for places in found if options[places[0]] == kept), None)
        if known is None:
            found.append([i])
        else:
            known.append(i)
    return found


def _is_plain(value: Any) -> bool:
    """Whether ``==`` says at once whether it is the same; that of tensors takes a launch and waits for it."""
    return all(map(_is_plain, value)) if isinstance(value, tuple) else isinstance(value, _PLAIN)


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    """Whether two lists hold the same objects; ``==`` would compare the tensors' elements."""
    return len(left) == len(right) and all(map(operator.is_, left, right))
