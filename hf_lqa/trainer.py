"""The Trainer side: records each training step and provides its loss to the optimizer's probes."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import warnings
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import Seq2SeqTrainer, Trainer
from transformers.utils import is_sagemaker_dp_enabled, is_sagemaker_mp_enabled

from .logs import Announcement, LogLines
from .optimizer import LQA
from .options import parse_options
from .probe import TrainerProbe, recorded

# The mixin comes before a Trainer class; a type checker cannot know which.
_Trainer: Any = object


class LQATrainerMixin(_Trainer):
    """Differs from a Trainer in that ``optim`` may be ``lqa``, ``lqa_sgd`` or ``lqa_paper``.

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
        self._lqa_lines = LogLines()
        self._lqa_options = parse_options(self.args)
        if self._lqa_options is None and self.lqa is None:
            return
        refuse_unsupported(self)
        default = next(f.default for f in dataclasses.fields(self.args) if f.name == "learning_rate")
        if self._lqa_options is not None and self.args.learning_rate != default:
            warnings.warn(
                f"learning_rate={self.args.learning_rate!r} is not used with optim={_value(self.args.optim)!r}, which"
                " measures the learning rate. Leave it out, or choose another --optim",
                stacklevel=3,
            )
        if self.args.fp16 and self.accelerator.device.type == "cpu":
            warnings.warn(
                "fp16=True has no effect on a CPU: Accelerate trains in float32. Leave it out, or use bf16=True",
                stacklevel=3,
            )

    def train(self, *args: Any, **kwargs: Any) -> Any:
        # Only now: the list of callbacks of a Trainer that does not train is nobody's but the user's.
        announced = any(isinstance(callback, Announcement) for callback in self.callback_handler.callbacks)
        if not announced and (self._lqa_options is not None or self.lqa is not None):
            self.add_callback(Announcement(self))
        return super().train(*args, **kwargs)

    def _lqa_forget(self) -> None:
        """Let go of what an interrupted step recorded: auto_find_batch_size begins anew after one."""
        self._lqa_probe = None
        if (lqa := self.lqa) is not None:
            lqa.arm(None)

    def create_accelerator_and_postprocess(self) -> None:
        """The parent's; called again for every trial of a hyperparameter search."""
        super().create_accelerator_and_postprocess()
        clip_grad_norm = self.accelerator.clip_grad_norm_

        def observed_clip_grad_norm(parameters: Any, max_norm: float, *args: Any, **kwargs: Any) -> Any:
            norm = clip_grad_norm(parameters, max_norm, *args, **kwargs)
            if (lqa := self.lqa) is not None and norm is not None:
                lqa.observe_clipping(norm, max_norm)
            return norm

        self.accelerator.clip_grad_norm_ = observed_clip_grad_norm

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """For LQA's names, the parent's code builds the base optimizer at unit learning rate; `LQA` goes around it."""
        self._lqa_options = options = parse_options(self.args)  # again: a hyperparameter search may have changed them
        if options is None or self.optimizer is not None:
            return super().create_optimizer(*args, **kwargs)
        own_args = self.args
        self.args = copy.copy(own_args)
        self.args.optim, self.args.optim_args, self.args.learning_rate = options.base, options.base_args, 1.0
        try:
            base = super().create_optimizer(*args, **kwargs)
        finally:
            self.args = own_args
        self.optimizer = LQA(base, options.policy, **options.policy_options)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, *args: Any, **kwargs: Any) -> Any:
        scheduler = super().create_scheduler(num_training_steps, *args, **kwargs)
        if (lqa := self.lqa) is not None and num_training_steps > 0:  # 0 with num_train_epochs=0
            lqa.policy.plan(num_training_steps, final_factor(scheduler, num_training_steps))
        return scheduler

    @property
    def lqa(self) -> LQA | None:
        """The `LQA` optimizer inside whatever Accelerate has wrapped around it; `None` if another one is used."""
        optimizer = self.optimizer
        while optimizer is not None and not isinstance(optimizer, LQA):
            optimizer = getattr(optimizer, "optimizer", None)
        return optimizer

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """The parent's forward and backward; on probe steps recorded, so that the optimizer can replay them."""
        lqa = self.lqa
        if lqa is None or not lqa.wants_probe:
            return super().training_step(model, inputs, *args, **kwargs)
        total = getattr(self, "current_gradient_accumulation_steps", 1)
        wanted = total
        if self._lqa_options is not None and self._lqa_options.probe_micro_batches is not None:
            wanted = min(total, self._lqa_options.probe_micro_batches)
        if self._lqa_probe is None:
            # The micro-batches that are probed stand for all.
            self._lqa_probe = TrainerProbe(self, model, weight=total / wanted)
            lqa.arm(None)
        with recorded(self, self._lqa_probe) if len(self._lqa_probe) < wanted else contextlib.nullcontext():
            loss = super().training_step(model, inputs, *args, **kwargs)
        if self.accelerator.sync_gradients:
            lqa.arm(self._lqa_probe)
            self._lqa_probe = None
        return loss

    def _get_learning_rate(self) -> float:
        """The step size that was applied, schedule included; the scheduler's own number is only its factor."""
        if (lqa := self.lqa) is None:
            return super()._get_learning_rate()
        return lqa.step_size or 0.0

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The parent's, with what was done where it quotes arguments that were not used."""
        if (options := self._lqa_options) is None:
            super().create_model_card(*args, **kwargs)
            return
        rates = [entry["learning_rate"] for entry in self.state.log_history if entry.get("learning_rate")]
        own_args = self.args
        self.args = copy.copy(own_args)
        self.args.learning_rate = f"measured, {min(rates):.2g} to {max(rates):.2g}" if rates else "measured"
        self.args.optim = f"{options.name} around {options.base}"
        try:
            super().create_model_card(*args, **kwargs)
        finally:
            self.args = own_args

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if (lqa := self.lqa) is not None:
            self._lqa_lines.extend(logs, lqa)
        super().log(logs, *args, **kwargs)


def final_factor(scheduler: Any, total_steps: int) -> float:
    """What `scheduler` will multiply the learning rate by at the end of training, in [0, 1].

    1 where it does not say: of those in Transformers these are the ones that lower the rate when the loss stalls.
    """
    lambdas = getattr(scheduler, "lr_lambdas", None)
    return min(max((float(factor(total_steps)) for factor in lambdas), default=1.0), 1.0) if lambdas else 1.0


def refuse_unsupported(trainer: Trainer) -> None:
    """Refuse the set-ups in which a probe could not be right.

    Raises:
        ValueError: with the argument, its value and the remedy.
    """
    args, name = trainer.args, _value(trainer.args.optim)
    parallelism = getattr(args, "parallelism_config", None)
    if trainer.is_deepspeed_enabled:
        raise ValueError(
            f"deepspeed={args.deepspeed!r} with optim={name!r}: DeepSpeed steps inside backward, so there is nothing to"
            " probe between gradient and step. Use FSDP2 (configs/accelerate/fsdp2.yaml) or another --optim"
        )
    if trainer.is_fsdp_enabled and trainer.accelerator.state.fsdp_plugin.fsdp_version == 1:
        raise ValueError(
            f"fsdp_config['version']=1 with optim={name!r}: each rank of FSDP1 sees only its part of the flattened"
            " gradient, and the slope would be wrong. Set fsdp_config['version'] to 2"
        )
    for size in ("cp_size", "sp_size"):
        if (value := getattr(parallelism, size, 1) or 1) > 1:
            raise ValueError(
                f"parallelism_config.{size}={value} with optim={name!r}: inputs are split inside a context that ends"
                " before the step, and a probe could not enter it again. Use data parallelism or another --optim"
            )
    tp_size = max(getattr(parallelism, "tp_size", 1) or 1, getattr(trainer.model, "tp_size", None) or 1)
    if tp_size > 1:
        raise ValueError(
            f"tp_size={tp_size} with optim={name!r}: under tensor parallelism a gradient need not be sharded as its"
            " weight is, and the slope would be wrong. Load the model without tp_plan and use FSDP2"
            " (configs/accelerate/fsdp2.yaml), or another --optim"
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"n_gpu={args.n_gpu} with optim={name!r}: nn.DataParallel draws its dropout masks in threads, and a probe"
            " could not repeat them. Use `torchrun --nproc_per_node N` or set CUDA_VISIBLE_DEVICES to one device"
        )
    if is_sagemaker_mp_enabled():
        raise ValueError(
            f"smdistributed.modelparallel (SM_HP_MP_PARAMETERS) with optim={name!r}: it splits the forward into a"
            " pipeline of its own, and a probe could not run it again. Leave 'smdistributed' out of `distribution`, set"
            " {'torch_distributed': {'enabled': True}} there, and use FSDP2 for models that need splitting"
        )
    if is_sagemaker_dp_enabled():
        raise ValueError(
            f"sagemaker_distributed_dataparallel_enabled=True with optim={name!r}: that all ranks decide the same rests"
            " on collectives in float64, which were never tried on its back end. Set `distribution` to"
            " {'torch_distributed': {'enabled': True}}, which is DDP over NCCL"
        )
    if trainer.accelerator.distributed_type == DistributedType.XLA or trainer.is_fsdp_xla_enabled:
        raise ValueError(
            f"distributed_type={trainer.accelerator.distributed_type.value!r} with optim={name!r}: XLA traces steps"
            " ahead, and probes need their losses at once. Use another --optim"
        )


def _value(name: Any) -> str:
    return str(getattr(name, "value", name))


class LQATrainer(LQATrainerMixin, Trainer):
    """Differs from `Trainer` in that ``optim`` may be ``lqa``, ``lqa_sgd`` or ``lqa_paper``."""


class LQASeq2SeqTrainer(LQATrainerMixin, Seq2SeqTrainer):
    """Differs from `Seq2SeqTrainer` in that ``optim`` may be ``lqa``, ``lqa_sgd`` or ``lqa_paper``."""
