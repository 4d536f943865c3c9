"""The Trainer side: records each training step and provides its loss to the optimizer's probes."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from transformers import Seq2SeqTrainer, Trainer

from .base import described, largest_rate, refuse_base, source_of_base, to_multipliers
from .logs import Announcement, LogLines
from .optimizer import LQA, lqa_inside
from .options import for_base, for_model_card, parse_options
from .probe import TrainerProbe, defined_as, definer, recorded, shadowed
from .refusals import refuse_late_optimizer, refuse_unrecorded, refuse_unsupported, warn_of_no_effect
from .registration import bases_served

# The mixin comes before a Trainer class; a type checker cannot know which.
_Trainer: Any = object


class _ServesBases:
    """``get_optimizer_cls_and_kwargs``, on the class or an instance: the parent's, which knows LQA's names then."""

    def __get__(self, trainer: Any, cls: type) -> Callable[..., Any]:
        parent: Any = super(LQATrainerMixin, cls if trainer is None else trainer)

        def get_optimizer_cls_and_kwargs(*args: Any, **kwargs: Any) -> Any:
            with bases_served():
                return parent.get_optimizer_cls_and_kwargs(*args, **kwargs)

        return get_optimizer_cls_and_kwargs


class LQATrainerMixin(_Trainer):
    """Gives any Trainer class the optimizers ``lqa``, ``lqa_sgd`` and ``lqa_paper``, by their names in ``optim``.

    Put it before any Trainer class: ``class MyTrainer(LQATrainerMixin, SFTTrainer): ...``. With another ``optim`` it
    changes nothing, except that an `LQA` given as ``optimizers=(lqa, None)`` gets its probes too.

    Raises:
        ValueError: the set-up is one that LQA cannot step right in; the message names the argument, its value and the
            remedy.
    """

    args: Any
    optimizer: Any

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._lqa_setup()

    def _lqa_setup(self) -> None:
        """What `__init__` adds to the parent's; apart, because the runner swaps a Trainer's class while it is built."""
        self._lqa_probe: TrainerProbe | None = None
        self._lqa_recorded = 0
        self._lqa_entered: set[str] = set()
        self._lqa_lines = LogLines()
        self._lqa_options = parse_options(self.args)
        if self._lqa_options is None and self.lqa is None:
            return
        refuse_unsupported(self)
        warn_of_no_effect(self.args, self.accelerator.device, self._lqa_options is not None)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        # Only now: the list of callbacks of a Trainer that does not train is nobody's but the user's.
        announced = any(isinstance(callback, Announcement) for callback in self.callback_handler.callbacks)
        if not announced and (self._lqa_options is not None or self.lqa is not None):
            self.add_callback(Announcement(self))
        with self._lqa_outermost():
            return super().train(*args, **kwargs)

    @contextlib.contextmanager
    def _lqa_outermost(self) -> Iterator[None]:
        """Go around the methods of subclasses, too: what they do beside calling the parent's counts as well."""
        ways: dict[str, Callable[..., Any]] = {
            "training_step": self._lqa_training_step,
            "create_optimizer": self._lqa_create_optimizer,
            "create_scheduler": self._lqa_create_scheduler,
        }
        with contextlib.ExitStack() as stack:
            for name, way in ways.items():
                stack.enter_context(shadowed(self, name, functools.partial(way, getattr(self, name))))
            yield

    @contextlib.contextmanager
    def _lqa_inside(self, name: str) -> Iterator[None]:
        self._lqa_entered.add(name)
        try:
            yield
        finally:
            self._lqa_entered.discard(name)

    def _lqa_forget(self) -> None:
        """Let go of what an interrupted step recorded: auto_find_batch_size begins anew after one."""
        self._lqa_probe = None
        if (lqa := self.lqa) is not None:
            lqa.arm(functools.partial(refuse_unrecorded, self) if lqa.base_step_size is None else None)

    def create_accelerator_and_postprocess(self) -> None:
        """The parent's; called again for every trial of a hyperparameter search."""
        super().create_accelerator_and_postprocess()
        clip_grad_norm = self.accelerator.clip_grad_norm_

        def observed_clip_grad_norm(parameters: Any, max_norm: float, *args: Any, **kwargs: Any) -> Any:
            norm = clip_grad_norm(parameters, max_norm, *args, **kwargs)
            if (lqa := self.lqa) is not None and norm is not None:
                lqa.observe_clipping(norm, max_norm, whole=True)
            return norm

        self.accelerator.clip_grad_norm_ = observed_clip_grad_norm

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """For LQA's names, the parent's code builds the base optimizer at unit learning rate; `LQA` goes around it."""
        return self._lqa_create_optimizer(super().create_optimizer, *args, **kwargs)

    def _lqa_create_optimizer(self, create: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if "create_optimizer" in self._lqa_entered:
            return create(*args, **kwargs)
        self._lqa_options = options = parse_options(self.args)  # again: a hyperparameter search may have changed them
        if options is None or self.lqa is not None:
            return create(*args, **kwargs)
        given, own_args = self.optimizer is not None, self.args
        self.args = for_base(own_args, options)
        try:
            with self._lqa_inside("create_optimizer"), bases_served():
                created = create(*args, **kwargs)
        finally:
            self.args = own_args
        if self.lqa is not None:
            return self.optimizer
        base = self.optimizer if self.optimizer is not None else created
        while isinstance(base, AcceleratedOptimizer):
            base = base.optimizer
        source = "optimizers=(...), or trainer.optimizer," if given else source_of_base(self)
        if source is not None:
            refuse_base(base, source)
            unit = to_multipliers(base, self.lr_scheduler, source)
            warnings.warn(
                f"optim={options.name!r} goes around the {type(base).__name__} that {source} gives, whatever the base"
                f" in optim_args: {described(base, unit)}",
                stacklevel=2,
            )
        self.optimizer = LQA(base, options.rule, **options.rule_options)
        self.optimizer.arm(functools.partial(refuse_unrecorded, self))
        return self.optimizer

    get_optimizer_cls_and_kwargs = _ServesBases()

    def create_scheduler(self, num_training_steps: int, *args: Any, **kwargs: Any) -> Any:
        return self._lqa_create_scheduler(super().create_scheduler, num_training_steps, *args, **kwargs)

    def _lqa_create_scheduler(
        self, create: Callable[..., Any], num_training_steps: int, *args: Any, **kwargs: Any
    ) -> Any:
        if "create_scheduler" in self._lqa_entered:
            return create(num_training_steps, *args, **kwargs)
        with self._lqa_inside("create_scheduler"):
            created = create(num_training_steps, *args, **kwargs)
        if (lqa := self.lqa) is None:
            return created
        scheduler = self.lr_scheduler if self.lr_scheduler is not None else created
        source = defined_as(self, "create_scheduler")
        own = not definer(self, "create_scheduler").__module__.startswith("transformers.")
        if own and self._lqa_options is not None and largest_rate(lqa.base, scheduler) != 1:
            unit = to_multipliers(lqa.base, scheduler, source)
            warnings.warn(
                f"optim={self._lqa_options.name!r} with a {type(scheduler).__name__} that {source} gives:"
                f" {described(lqa.base, unit)}",
                stacklevel=2,
            )
        if num_training_steps > 0:  # 0 with num_train_epochs=0
            lqa.plan(num_training_steps)
        return created

    @property
    def lqa(self) -> LQA | None:
        """The `LQA` optimizer inside whatever Accelerate has wrapped around it; `None` if another one is used."""
        return lqa_inside(self.optimizer)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """The parent's forward and backward; on probe steps recorded, so that the optimizer can replay them."""
        return self._lqa_training_step(super().training_step, model, inputs, *args, **kwargs)

    def _lqa_training_step(
        self, step: Callable[..., Tensor], model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        lqa = self.lqa
        if lqa is None and self.optimizer is not None and self._lqa_options is not None:
            refuse_late_optimizer(self)
        if lqa is None or not lqa.wants_probe:
            return step(model, inputs, *args, **kwargs)
        if "training_step" in self._lqa_entered:
            loss = step(model, inputs, *args, **kwargs)
            if self.accelerator.sync_gradients:
                lqa.arm(self._lqa_probe)
            return loss
        total = getattr(self, "current_gradient_accumulation_steps", 1)
        most = self._lqa_options.probe_micro_batches if self._lqa_options is not None else None
        wanted = min(total, most) if most is not None else total
        if self._lqa_probe is None:
            # The micro-batches that are probed stand for all.
            self._lqa_probe, self._lqa_recorded = TrainerProbe(self, model, weight=total / wanted), 0
            lqa.arm(None)
        wants = self._lqa_recorded < wanted
        with self._lqa_inside("training_step"), recorded(self, self._lqa_probe) if wants else contextlib.nullcontext():
            loss = step(model, inputs, *args, **kwargs)
        self._lqa_recorded += 1
        if self.accelerator.sync_gradients:
            lqa.arm(self._lqa_probe)
            self._lqa_probe = None
        return loss

    def _get_learning_rate(self) -> float:
        """The step size that was applied, schedule included; the scheduler's own number is only its factor."""
        if (lqa := self.lqa) is None:
            return super()._get_learning_rate()
        return lqa.step_size or 0.0

    def create_model_card(self, *args: Any, **kwargs: Any) -> Any:
        """The parent's, with what was done where it quotes arguments that were not used."""
        if (options := self._lqa_options) is None:
            return super().create_model_card(*args, **kwargs)
        own_args = self.args
        self.args = for_model_card(own_args, options, self.state.log_history)
        try:
            super().create_model_card(*args, **kwargs)
        finally:
            self.args = own_args

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if (lqa := self.lqa) is not None:
            self._lqa_lines.extend(logs, lqa)
        super().log(logs, *args, **kwargs)


class LQATrainer(LQATrainerMixin, Trainer):
    """A `Trainer` that chooses the learning rate itself, where ``optim`` is ``lqa``, ``lqa_sgd`` or ``lqa_paper``."""


class LQASeq2SeqTrainer(LQATrainerMixin, Seq2SeqTrainer):
    """A `Seq2SeqTrainer` that does the same."""
