"""Set-ups in which a probe could not be right, refused at construction, and arguments that have no effect."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor
from transformers import Trainer
from transformers.utils import is_sagemaker_dp_enabled, is_sagemaker_mp_enabled

from .options import plain
from .probe import defined_as


def refuse_unsupported(trainer: Trainer) -> None:
    """Refuse the set-ups in which a probe could not be right.

    Raises:
        ValueError: with the argument, its value and the remedy.
    """
    args, name = trainer.args, plain(trainer.args.optim)
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


def refuse_late_optimizer(trainer: Trainer) -> None:
    """Refuse another optimizer than LQA at a training step.

    Raises:
        ValueError: always.
    """
    raise ValueError(
        f"optim={plain(trainer.args.optim)!r}, but trainer.optimizer is a {type(trainer.optimizer).__name__} that came"
        " after create_optimizer (from a callback, or a method that overrides the Trainer's). Set trainer.optimizer"
        " before train() or in create_optimizer, where LQA goes around it, or use another --optim"
    )


def refuse_unrecorded(trainer: Trainer) -> Tensor:
    """The closure of a first step for which none was recorded.

    Raises:
        ValueError: always.
    """
    raise ValueError(
        f"{type(trainer).__name__} steps the optimizer without a training_step before it (in"
        f" {defined_as(trainer, '_inner_training_loop')}, or a callback): LQA probes the loss that training_step"
        " computes. Call self.training_step for each micro-batch of a step, or use another --optim"
    )


def warn_of_no_effect(args: Any, device: torch.device, by_name: bool) -> None:
    """Warn of arguments that change nothing.

    Args:
        by_name: whether LQA was chosen by `args.optim`.
    """
    default = next(f.default for f in dataclasses.fields(args) if f.name == "learning_rate")
    if by_name and args.learning_rate != default:
        warnings.warn(
            f"learning_rate={args.learning_rate!r} is not used with optim={plain(args.optim)!r}, which measures the"
            " learning rate. Leave it out, or choose another --optim",
            stacklevel=4,
        )
    if args.fp16 and device.type == "cpu":
        warnings.warn(
            "fp16=True has no effect on a CPU: Accelerate trains in float32. Leave it out, or use bf16=True",
            stacklevel=4,
        )
