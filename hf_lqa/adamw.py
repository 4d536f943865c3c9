"""AdamW without a learning rate for any loop, tool or stock `Trainer`: no closure, no Trainer of ours."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from transformers import TrainerCallback

from .optimizer import LQA, lqa_inside


class LQAAdamW(LQA):
    """`torch.optim.AdamW` whose learning rate is measured, with a ``step()`` that needs no closure.

    ::

        optimizer = LQAAdamW(model.parameters(), total_steps=1000)
        Trainer(..., optimizer_cls_and_kwargs=(LQAAdamW, {}), callbacks=[LQACallback()])

    It is `LQA` around an AdamW of its own. Without a closure nothing is probed: the start comes from the model's shapes
    alone, see `hf_lqa.rule.prior`. With one it probes as `LQA` does.

    Args:
        params: parameters or param groups.
        lr: a multiplier of the measured step size, 1.0 by default; schedulers multiply it.
        betas, eps, weight_decay: as of `torch.optim.AdamW`.
        total_steps: how many steps training has, ``>= 1``; `None` is taken for 1,000.
        options: as of `LQA`.

    Raises:
        ValueError: as `torch.optim.AdamW` and `LQA`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        total_steps: int | None = None,
        **options: Any,
    ):
        base = torch.optim.AdamW(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        super().__init__(base, total_steps=total_steps, **options)


class LQACallback(TrainerCallback):
    """Tells an `LQA` in a stock `Trainer` how long training is, and its log lines which rate was applied.

    A stock Trainer logs the scheduler's number as ``learning_rate``: under `LQA` that is a multiplier. Callbacks that
    came before this one, as those of ``report_to``, have been told that number already.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        lqa = _required(kwargs.get("optimizer"))
        if state.max_steps > 0:  # 0 with num_train_epochs=0
            lqa.plan(state.max_steps)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        rate = _required(kwargs.get("optimizer")).step_size
        for entry in (logs, *state.log_history[-1:]):
            if entry is not None and "learning_rate" in entry:
                entry["learning_rate"] = rate or 0.0


def _required(optimizer: Any) -> LQA:
    """The `LQA` inside a Trainer's optimizer.

    Raises:
        ValueError: there is none.
    """
    if (lqa := lqa_inside(optimizer)) is None:
        while hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
        raise ValueError(
            f"LQACallback: the Trainer's optimizer is {type(optimizer).__name__}, not LQA: give"
            " optimizer_cls_and_kwargs=(hf_lqa.LQAAdamW, {}), or leave the callback out"
        )
    return lqa
