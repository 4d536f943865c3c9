"""What LQA adds to the base optimizer's `state_dict`, and how it is found there again.

Numbers stand in the first param group as one string: checkpoints of sharded optimizers take dicts apart and load only
keys that a fresh optimizer has. Weights travel with the state of the parameters.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .quadratic import Fit, Verdict
from .slopes import Snapshot, is_sharded

#: Keys under which LQA's state travels in the base optimizer's `state_dict`.
GROUP_KEY, BEGINNING_KEY = "lqa", "lqa_beginning"

#: Of what LQA keeps in a checkpoint: raised whenever that changes.
VERSION = 6


@dataclass(frozen=True)
class ProbeRecord:
    """What one probe measured. Losses are NaN where they were not taken.

    Attributes:
        step: the optimizer step at which it was taken, counted from 0.
        radius: the probe radius in units of the direction.
        loss_minus, loss_center, loss_plus: losses at ``-radius``, 0 and ``radius`` along the direction.
        fit: the parabola through them.
        by_loss: whether the radius is what the loss's value says; else a first probe had to look for another.
    """

    step: int
    radius: float
    loss_minus: float
    loss_center: float
    loss_plus: float
    fit: Fit
    by_loss: bool = True

    def to_plain(self) -> dict[str, Any]:
        plain = asdict(self)
        plain["fit"]["verdict"] = self.fit.verdict.value
        return plain

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> ProbeRecord:
        return cls(**{**plain, "fit": Fit(**{**plain["fit"], "verdict": Verdict(plain["fit"]["verdict"])})})


def packed(
    state_dict: dict[str, Any], own: dict[str, Any], params: list[Tensor], beginning: Snapshot | None
) -> dict[str, Any]:
    """The base optimizer's `state_dict` with LQA's `own` numbers in it, and the weights that training began with."""
    groups = [dict(group) for group in state_dict["param_groups"]]
    groups[0][GROUP_KEY] = json.dumps({"version": VERSION, **own})
    state = {k: dict(v) if isinstance(v, dict) else v for k, v in state_dict["state"].items()}
    kept = dict(zip(beginning.places, beginning.values, strict=True)) if beginning is not None else {}
    for i, p in enumerate(params):
        if i in kept:
            state.setdefault(i, {})[BEGINNING_KEY] = kept[i]
        elif is_sharded(p) and p.requires_grad:
            # A fresh optimizer must have the key: sharded parameters have it always.
            state.setdefault(i, {})[BEGINNING_KEY] = torch.zeros_like(p, requires_grad=False)
    return {**state_dict, "state": state, "param_groups": groups}


def unpacked(state_dict: dict[str, Any], rule: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The base optimizer's `state_dict`, still with the kept weights in it, and LQA's own numbers.

    Args:
        rule: the name of the rule that is to go on from there.

    Raises:
        ValueError: it was saved by an optimizer other than LQA, by another version of it, or with another rule.
    """
    groups = [dict(group) for group in state_dict["param_groups"]]
    own = groups[0].pop(GROUP_KEY, None) if groups else None
    if own is None:
        raise ValueError(
            f"state_dict['param_groups'][0] has no {GROUP_KEY!r}: it was saved by another optimizer than LQA."
            " Start without the optimizer's checkpoint, or load it into the base optimizer"
        )
    found = json.loads(own)
    if (version := found.get("version", 1)) != VERSION:
        raise ValueError(
            f"state_dict['param_groups'][0][{GROUP_KEY!r}] is of version {version}, this hf_lqa reads version"
            f" {VERSION}: go on with the hf_lqa that saved it, or start without the optimizer's checkpoint"
        )
    if found["rule"]["name"] != rule:
        raise ValueError(
            f"state_dict was saved with the rule {found['rule']['name']!r}, not {rule!r}: go on with that one, or"
            " start without the optimizer's checkpoint"
        )
    return {**state_dict, "param_groups": groups}, found


def take_snapshot(state: dict[Tensor, Any], params: list[Tensor], places: list[int]) -> Snapshot | None:
    """The weights that training began with, of the parameters at `places`, taken out of the base's `state`."""
    # Cast and placed by the base's load_state_dict like its own state.
    values = {p: s.pop(BEGINNING_KEY) for p, s in state.items() if BEGINNING_KEY in s}
    return Snapshot(params, places, [values[params[i]] for i in places]) if places else None
