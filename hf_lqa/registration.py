"""Puts LQA's names where Transformers looks optimizers up, so that ``--optim lqa`` is a choice like any other."""

from __future__ import annotations

from typing import Any

from transformers import trainer_optimizer
from transformers.training_args import OptimizerNames

from .options import NAMES


def register() -> None:
    """Add `NAMES` to `OptimizerNames` and refuse them in a stock Trainer. May be called any number of times.

    Transformers has no public registry. The enum must have real members before any argument parser is built, because
    `HfArgumentParser` takes its choices from it.
    """
    for name in NAMES:
        if name not in OptimizerNames._value2member_map_:
            _add_member(name)
        trainer_optimizer._OPTIMIZER_HANDLERS[name] = _refuse


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


def _refuse(context: Any) -> Any:
    raise ValueError(
        f"optim={str(context.args.optim.value)!r} needs a Trainer that can probe the loss, and this is a stock Trainer."
        " Use hf_lqa.LQATrainer, put hf_lqa.LQATrainerMixin before your Trainer class, or run your script with"
        " `python -m hf_lqa SCRIPT ...`"
    )
