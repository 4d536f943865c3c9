"""Puts LQA's names where Transformers looks optimizers up, so that ``--optim lqa`` is a choice like any other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from transformers import Trainer, trainer_optimizer
from transformers.training_args import OptimizerNames

from .options import NAMES, for_base, parse_options


def register() -> None:
    """Add `NAMES` to `OptimizerNames` and refuse them in a stock Trainer. May be called any number of times.

    Transformers has no public registry. The enum must have real members before any argument parser is built, because
    `HfArgumentParser` takes its choices from it.
    """
    for name in NAMES:
        if name not in OptimizerNames._value2member_map_:
            _add_member(name)
        trainer_optimizer._OPTIMIZER_HANDLERS[name] = _handler


def _add_member(name: str) -> None:
    member = _Member(OptimizerNames, name)
    OptimizerNames._member_names_.append(member._name_)
    OptimizerNames._member_map_[member._name_] = member
    OptimizerNames._value2member_map_[name] = member
    # Python >= 3.12 keeps the values of hashable members apart.
    hashable: list[Any] | None = getattr(OptimizerNames, "_hashable_values_", None)
    if hashable is not None:
        hashable.append(name)


def _Member(cls: type[Any], name: str) -> Any:
    member = str.__new__(cls, name)
    member._name_, member._value_ = name.upper(), name
    member.__objclass__ = cls
    member._sort_order_ = len(cls._member_names_)
    # Pickled as its plain string, so that training_args.bin loads in a process that never imports hf_lqa.
    member.__reduce_ex__ = lambda protocol: (str, (name,))
    return member


#: Whether it is a Trainer of LQA's that asks for an optimizer's class.
_serving: ContextVar[bool] = ContextVar("_serving", default=False)


@contextmanager
def bases_served() -> Iterator[None]:
    """Within it ``Trainer.get_optimizer_cls_and_kwargs`` gives LQA's names the base optimizer's class, at unit rate."""
    token = _serving.set(True)
    try:
        yield
    finally:
        _serving.reset(token)


def _handler(context: Any) -> Any:
    options = parse_options(context.args)
    assert options is not None
    if _serving.get():
        return Trainer.get_optimizer_cls_and_kwargs(for_base(context.args, options), context.model)
    raise ValueError(
        f"optim={options.name!r} needs a Trainer that can probe the loss, and this is a stock Trainer (or its"
        " get_optimizer_cls_and_kwargs, called outside create_optimizer). Use hf_lqa.LQATrainer, put"
        " hf_lqa.LQATrainerMixin before your Trainer class, or run your script with `python -m hf_lqa SCRIPT ...`"
    )
