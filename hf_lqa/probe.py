"""One training step of a Trainer, recorded so that its loss can be computed again at other weights.

The probe's objective is the sum over the step's micro-batches of exactly the scalars that `training_step`
back-propagated. They are recorded where they pass: inputs at ``compute_loss``, the scalar at ``accelerator.backward``.
"""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn

from .groups import params_of
from .replay import Forward, ReplayedLoss
from .slopes import is_sharded
from .watch import Watch

#: Containers larger than this are data, not counters, and are not searched for side effects.
_MAX_CONTAINER = 4096


def copy_containers(value: Any) -> Any:
    """`value` with its dicts, lists and mappings copied and everything else, tensors above all, shared.

    ``compute_loss`` may pop from its inputs or write to them.
    """
    if isinstance(value, dict):
        copied = value.copy()
        for k, v in value.items():
            copied[k] = copy_containers(v)
        return copied
    if type(value) in (list, set):
        return type(value)(copy_containers(v) for v in value) if len(value) <= _MAX_CONTAINER else value
    if isinstance(value, UserDict):  # BatchEncoding, BatchFeature
        batch = value.copy()
        batch.data = copy_containers(value.data)
        return batch
    return value


def _reshard(model: nn.Module) -> None:
    """Free the unsharded weights of FSDP2 modules, or the next forward would use the weights from before a move.

    The root group keeps its weights gathered after a forward without gradient.
    """
    for module in model.modules():
        reshard: Callable[[], None] | None = getattr(module, "reshard", None)
        if reshard is not None and hasattr(module, "unshard"):
            reshard()


class TrainerProbe(ReplayedLoss):
    """The loss of one step of a Trainer, replayed. Beyond `ReplayedLoss` it leaves untouched the Trainer, its log, and
    FSDP2's shards.

    Args:
        trainer: the Trainer; its ``compute_loss`` is what is replayed.
        model: the model as ``training_step`` gets it, wrapped for several processes.
        weight: as in `ReplayedLoss`.
    """

    def __init__(self, trainer: Any, model: nn.Module, weight: float = 1.0):
        super().__init__(model, weight=weight)
        self._trainer = trainer
        self._owned = set(map(id, params_of(trainer.optimizer)))

    def _names(self) -> dict[str, Any]:
        return {**super()._names(), type(self._trainer).__name__: self._trainer}

    def _trained(self, weight: Tensor) -> bool:
        # FSDP2's parameters are other objects than the optimizer's.
        return weight.requires_grad and (is_sharded(weight) or id(weight) in self._owned)

    def _replay(self, check: bool) -> Tensor:
        (model,) = self.models
        _reshard(model)
        try:
            # What a `compute_loss` logs was logged in training.
            with shadowed(self._trainer, "log", lambda *args, **kwargs: None):
                return super()._replay(check)
        finally:
            _reshard(model)


@contextmanager
def recorded(trainer: Any, probe: TrainerProbe) -> Iterator[None]:
    """Record the losses that the body's ``training_step`` computes and back-propagates into `probe`.

    They may be several, as long as all are computed at the same weights.

    Raises:
        ValueError: the step's gradient is not that of the losses that were recorded.
    """
    lqa, method = trainer.lqa, defined_as(trainer, "training_step")
    watch = Watch(params_of(lqa), thorough=lqa.base_step_size is None)
    calls: list[tuple[Callable[[], Tensor], Forward, Tensor]] = []
    scalars = 0
    in_turn = True
    compute_loss, backward = trainer.compute_loss, trainer.accelerator.backward

    def recording_compute_loss(model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal in_turn
        in_turn = in_turn and len(calls) == scalars
        watch.before_loss()
        kept = copy_containers(inputs)
        with probe.watching({"inputs": kept, "compute_loss": compute_loss}) as forward:
            result = compute_loss(model, inputs, *args, **kwargs)

        def compute() -> Tensor:
            again = compute_loss(model, copy_containers(kept), *args, **kwargs)
            return again[0] if isinstance(again, tuple) else again

        calls.append((compute, forward, (result[0] if isinstance(result, tuple) else result).detach()))
        watch.after_loss()
        return result

    def recording_backward(loss: Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal scalars, in_turn
        watch.before_backward()
        scalars += 1
        in_turn = in_turn and len(calls) == scalars
        if in_turn:
            compute, forward, computed = calls[-1]
            steps = getattr(trainer, "current_gradient_accumulation_steps", 1)
            scaling, divisor = _scaling(computed, loss.detach(), steps), _divisor(trainer.accelerator)
            probe.add(lambda: scaling(compute()) / divisor, forward, loss.detach() / divisor)
        done = backward(loss, *args, **kwargs)
        watch.after_backward()
        return done

    with shadowed(trainer, "compute_loss", recording_compute_loss):
        with shadowed(trainer.accelerator, "backward", recording_backward):
            yield
    watch.end()
    if watch.weights_changed:
        raise ValueError(
            f"{method} changes the weights between a loss and the step, as FGM, PGD, AWP and SAM do: LQA replays the"
            " losses of a step at one place, and the gradient would be another's. Perturb the inputs or embeddings"
            " inside compute_loss instead, or use another --optim with this Trainer"
        )
    if not calls or len(calls) != scalars or not in_turn:
        raise ValueError(
            f"{method} called compute_loss {len(calls)} times and accelerator.backward {scalars} times: LQA can replay"
            " a loss only if each that self.compute_loss gives goes to self.accelerator.backward, in turn, as in"
            " super().training_step. Put all that is computed into compute_loss, or use another --optim with this"
            " Trainer"
        )
    if watch.gradients_changed:
        raise ValueError(
            f"{method} changes the gradients beside accelerator.backward (a backward() of its own, noise, masks,"
            " surgery): LQA would probe a loss whose gradient they are not. Add a loss in compute_loss, change"
            " gradients in a hook of the parameter (Tensor.register_hook), or use another --optim with this Trainer"
        )


def definer(trainer: Any, method: str) -> type:
    """The class whose `method` a Trainer has, hf_lqa's own left out."""
    package = __name__.partition(".")[0]
    classes = [cls for cls in type(trainer).__mro__ if method in vars(cls)]
    return next((cls for cls in classes if cls.__module__.partition(".")[0] != package), classes[0])


def defined_as(trainer: Any, method: str) -> str:
    """The name of `method` with that of the class that it comes from."""
    return f"{definer(trainer, method).__name__}.{method}"


def _divisor(accelerator: Any) -> int:
    """What ``accelerator.backward`` divides a loss by: 1, but the accumulation steps with Transformers before 5.5.4."""
    deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    return 1 if deepspeed else accelerator.gradient_accumulation_steps


def _scaling(computed: Tensor, scalar: Tensor, steps: int) -> Callable[[Tensor], Tensor]:
    """What ``training_step`` did to the loss it computed before it back-propagated it."""
    # Recomputed with the same operation, so that a replay at the origin gives the training loss bit for bit.
    if computed.numel() == 1:
        if torch.equal(computed.reshape(()), scalar.reshape(())):
            return lambda loss: loss
        if torch.equal((computed / steps).reshape(()), scalar.reshape(())):
            return lambda loss: loss / steps
    if torch.equal(computed.mean(), scalar.reshape(())):
        return lambda loss: loss.mean()
    if torch.equal(computed.mean() / steps, scalar.reshape(())):
        return lambda loss: loss.mean() / steps
    # Some other factor. NaN, and so a non-finite probe, if the loss was 0 or not finite.
    factor = float(scalar) / float(computed.mean()) if float(computed.mean()) else float("nan")
    return lambda loss: loss.mean() * factor


@contextmanager
def shadowed(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set an instance attribute over a method, for the duration."""
    missing = object()
    before = vars(owner).get(name, missing)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is missing:
            delattr(owner, name)
        else:
            setattr(owner, name, before)
