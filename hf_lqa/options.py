"""`--optim lqa…` and `--optim_args`: what they mean, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers.training_args import OptimizerNames

from .rule import OPTIONS, build

if TYPE_CHECKING:
    from transformers import TrainingArguments

#: name -> (base optimizer, or None for the Trainer's own default; rule)
NAMES: dict[str, tuple[str | None, str]] = {
    "lqa": (None, "displacement"),
    "lqa_sgd": ("sgd", "displacement"),
    "lqa_paper": ("sgd", "paper"),
}

_ADEMAMIX = ("beta1", "beta2", "beta3", "alpha", "eps", "t_alpha", "t_beta3")
_GALORE = ("rank", "update_proj_gap", "scale", "proj_type")
_RMSPROP = ("momentum", "alpha", "eps", "weight_decay", "centered")
_TORCHAO = ("block_size", "bf16_stochastic_round")
#: What Transformers itself reads from ``optim_args`` for a base optimizer. It passes over all other keys in silence.
_BASE_OPTIONS: dict[str, tuple[str, ...]] = {
    "sgd": ("momentum", "dampening", "weight_decay", "nesterov"),
    "adagrad": ("lr_decay", "weight_decay", "eps"),
    "rmsprop": _RMSPROP,
    "rmsprop_bnb": _RMSPROP,
    "rmsprop_bnb_8bit": _RMSPROP,
    "rmsprop_bnb_32bit": _RMSPROP,
    "ademamix": _ADEMAMIX,
    "ademamix_8bit": _ADEMAMIX,
    "paged_ademamix_32bit": _ADEMAMIX,
    "paged_ademamix_8bit": _ADEMAMIX,
    "adamw_anyprecision": (
        "use_kahan_summation",
        "momentum_dtype",
        "variance_dtype",
        "compensation_buffer_dtype",
    ),
    "adamw_torch_4bit": _TORCHAO,
    "adamw_torch_8bit": _TORCHAO,
    "galore_adamw": _GALORE,
    "galore_adamw_8bit": _GALORE,
    "galore_adafactor": _GALORE,
    "apollo_adamw": (*_GALORE, "proj", "scale_type"),
    "grokadamw": ("alpha_init", "lamb", "gamma", "grokking_signal_decay_rate", "gradient_clipping"),
    "stable_adamw": ("decouple_lr", "max_lr", "kahan_sum"),
}


@dataclass(frozen=True)
class LQAOptions:
    """What ``optim`` and ``optim_args`` say.

    Attributes:
        name: ``lqa``, ``lqa_sgd`` or ``lqa_paper``.
        base: the name of the base optimizer.
        base_args: its own ``optim_args``; `None` if there are none.
        rule: the name of the rule.
        rule_options: those of its options that were given.
        probe_micro_batches: on how many of a step's micro-batches to probe; `None` for all.
    """

    name: str
    base: str
    base_args: str | None
    rule: str
    rule_options: dict[str, Any]
    probe_micro_batches: int | None


def parse_options(args: TrainingArguments) -> LQAOptions | None:
    """The options in ``args.optim`` and ``args.optim_args``; `None` where ``args.optim`` is not one of LQA's names.

    Raises:
        ValueError: a key is unknown, a value is out of range, or the base optimizer cannot work.
    """
    name = plain(args.optim)
    if name not in NAMES:
        return None
    given = dict(_pairs(args.optim_args))
    default_base, rule = NAMES[name]
    base = given.pop("base", default_base or _trainers_default())
    _check_base(base)
    micro_batches = given.pop("probe_micro_batches", None)
    kinds = OPTIONS[rule]
    rule_options: dict[str, Any] = {k: _convert(k, given.pop(k), kinds[k]) for k in list(given) if k in kinds}
    base_options = _BASE_OPTIONS.get(base, ())
    for key, value in given.items():
        if key not in base_options:
            allowed = ", ".join(["base", "probe_micro_batches", *kinds, *base_options])
            raise ValueError(
                f"optim_args: {key}={value!r} is not an option of optim={name!r} with base={base!r}; allowed: {allowed}"
            )
    try:
        build(rule, rule_options)
    except ValueError as error:
        raise ValueError(f"optim_args: {error}") from None
    return LQAOptions(
        name=name,
        base=base,
        base_args=",".join(f"{k}={v}" for k, v in given.items()) or None,
        rule=rule,
        rule_options=rule_options,
        probe_micro_batches=None if micro_batches is None else _at_least_one("probe_micro_batches", micro_batches),
    )


def for_base(args: TrainingArguments, options: LQAOptions) -> TrainingArguments:
    """A copy of `args` that names the base optimizer, at unit learning rate."""
    base_args = copy.copy(args)
    base_args.optim, base_args.optim_args, base_args.learning_rate = options.base, options.base_args, 1.0
    return base_args


def for_model_card(args: TrainingArguments, options: LQAOptions, log: list[dict[str, float]]) -> TrainingArguments:
    """A copy of `args` that says which optimizer and learning rates were used, as its `log` has them."""
    rates = [entry["learning_rate"] for entry in log if entry.get("learning_rate")]
    card: Any = copy.copy(args)
    card.learning_rate = f"measured, {min(rates):.2g} to {max(rates):.2g}" if rates else "measured"
    card.optim = f"{options.name} around {options.base}"
    return card


def plain(name: Any) -> str:
    """`name` as a string, where it may be a member of an enum."""
    return str(getattr(name, "value", name))


def _pairs(optim_args: str | None) -> Iterator[tuple[str, str]]:
    for pair in (optim_args or "").replace(" ", "").split(","):
        if pair:
            key, equals, value = pair.partition("=")
            if not (key and equals and value):
                raise ValueError(f"optim_args: {pair!r} is not of the form key=value; write key=value,key=value,...")
            yield key, value


def _convert(key: str, value: str, kind: type) -> Any:
    """`value` as a `kind`."""
    if value == "None" and key == "probe_radius":
        return None
    try:
        return kind(value)
    except ValueError:
        raise ValueError(
            f"optim_args: {key}={value!r}: must be {'an integer' if kind is int else 'a number'}"
        ) from None


def _at_least_one(key: str, value: str) -> int:
    number: int = _convert(key, value, int)
    if number < 1:
        raise ValueError(f"optim_args: {key}={value!r}: must be an integer >= 1")
    return number


def _trainers_default() -> str:
    from transformers import TrainingArguments

    return str(next(f.default for f in dataclasses.fields(TrainingArguments) if f.name == "optim"))


#: Why an optimizer cannot be a base, by its name or a part of it.
NO_BASE: dict[str, str] = {
    "lomo": "it steps inside backward, so there is nothing to probe between gradient and step",
    "_layerwise": "it steps layer by layer inside backward, so there is nothing to probe between gradient and step",
    "schedule_free": "its weights during training are not those its step moves, so its direction is no line to probe"
    " along",
    "xla": "XLA traces steps ahead, and probes need their losses at once",
}


def _check_base(base: str) -> None:
    reason = None
    if base in NAMES:
        reason = "a base optimizer gives the direction, and cannot be LQA itself"
    elif base not in {n.value for n in OptimizerNames}:
        reason = "Transformers knows no optimizer of this name"
    elif base in ("lomo", "adalomo"):
        reason = NO_BASE["lomo"]
    elif base.endswith("_layerwise"):
        reason = NO_BASE["_layerwise"]
    elif base.startswith("schedule_free"):
        reason = NO_BASE["schedule_free"]
    elif base == "adamw_torch_xla":
        reason = NO_BASE["xla"]
    if reason:
        raise ValueError(
            f"optim_args: base={base!r}: {reason}. Use e.g. base=adamw_torch, adafactor, lion_32bit or sgd"
        )
