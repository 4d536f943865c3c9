"""Losses that can be computed again: the same random numbers, and no trace left behind.

A probe compares losses at neighbouring weights. With dropout, fresh masks would change the loss far more than the
move does, so a probe replays the random numbers of the training forward, and puts everything that a forward touches
back afterwards: RNG streams, module buffers (BatchNorm's statistics) and autocast's cache of weight casts.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class RNGState:
    """The state of every random number generator that a forward pass may draw from: Python, NumPy, torch, devices."""

    python: Any
    numpy: Any
    cpu: Tensor
    devices: dict[torch.device, Tensor]

    @classmethod
    def capture(cls, devices: set[torch.device]) -> RNGState:
        """The present state; `devices` are those of the model, the CPU's is always included."""
        # NumPy is no dependency: where nobody has imported it, nobody draws from it.
        numpy = sys.modules.get("numpy")
        return cls(
            python=random.getstate(),
            numpy=numpy.random.get_state() if numpy is not None else None,
            cpu=torch.get_rng_state(),
            devices={d: getattr(torch, d.type).get_rng_state(d) for d in devices if d.type not in ("cpu", "meta")},
        )

    def apply(self) -> None:
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        for device, state in self.devices.items():
            getattr(torch, device.type).set_rng_state(state, device)


@contextmanager
def undisturbed(model: nn.Module, devices: set[torch.device]) -> Iterator[None]:
    """Leave RNG streams, module buffers and the autocast cache as they were, also when the body raises."""
    rng = RNGState.capture(devices)
    # All of them: BatchNorm's kernels update the running statistics without raising the tensors' version counters.
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    try:
        torch.clear_autocast_cache()
        yield
    finally:
        with torch.no_grad():
            for buffer, saved in buffers:
                buffer.copy_(saved)
        torch.clear_autocast_cache()
        rng.apply()


@dataclass(frozen=True)
class Surroundings:
    """What a forward pass depends on besides weights and inputs: random numbers and the autocast context."""

    rng: RNGState
    device_type: str
    autocast: bool
    autocast_dtype: torch.dtype

    @contextmanager
    def again(self) -> Iterator[None]:
        self.rng.apply()
        # No cache: a held outer context would keep the casts of these weights for the next forward.
        with torch.autocast(self.device_type, dtype=self.autocast_dtype, enabled=self.autocast, cache_enabled=False):
            yield


#: Rounding error of one loss, relative to its value, in units of the machine epsilon. Measured, see METHOD.md: products
#: of half precision are summed in float32, and those of float32 in itself.
_FULL, _HALF = 2.0, 0.25
#: The same where the moved weights themselves are of half precision: most of a small move is rounded away.
_HALF_WEIGHTS = 0.5


def rounding_error(model: nn.Module, autocast: torch.dtype | None) -> float:
    """Standard error of a loss of `model` by rounding, relative to its value; `autocast`: its type, where enabled."""

    def of(dtype: torch.dtype, half: float) -> float:
        eps = torch.finfo(dtype).eps
        return eps * (half if eps > torch.finfo(torch.float32).eps else _FULL)

    kinds = {(p.dtype, p.requires_grad) for p in model.parameters() if p.is_floating_point()}
    errors = [of(dtype, _HALF_WEIGHTS if moved else _HALF) for dtype, moved in kinds]
    return max([*errors, of(autocast, _HALF)] if autocast is not None else errors)


def autocast_inside(model: nn.Module) -> torch.dtype | None:
    """What Accelerate casts to within the forward of a model that it has prepared; no context outside shows it."""
    # No import: where nobody has imported it, nobody has prepared a model.
    state = sys.modules.get("accelerate.state")
    if state is None or not any(hasattr(module, "_original_forward") for module in model.modules()):
        return None
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(state.AcceleratorState().mixed_precision)


class ReplayedLoss:
    """The loss of one training step, as a closure for `LQA.step` that replays it without gradient.

    ::

        closure = ReplayedLoss(model)
        loss = closure.record(compute_loss, model, batch)   # runs it, remembers how
        loss.backward()
        optimizer.step(closure)                             # on probe steps, runs it again at other weights

    With gradient accumulation, `record` once per micro-batch; the closure is ``weight`` times their sum, and `weight`
    must be such that this is what was back-propagated (``1 / n`` under ``accelerator.accumulate``, which divides in
    ``accelerator.backward``).

    Args:
        model: the module whose buffers are kept and whose devices' RNGs are replayed.
        weight: factor of the sum of the recorded losses, ``> 0``.

    Attributes:
        loss: 0-dim tensor, ``weight`` times the sum of the recorded losses, as they were during training.
        relative_noise: rounding error of the loss relative to its value, see `rounding_error`.

    Raises:
        ValueError: a recorded loss is not a scalar.
    """

    def __init__(self, model: nn.Module, weight: float = 1.0):
        if not weight > 0:
            raise ValueError(f"weight={weight!r}: the factor of the recorded losses must be > 0")
        self.model = model
        self.weight = weight
        self.loss: Tensor | None = None
        self.relative_noise = 0.0
        self._devices = {p.device for p in model.parameters()}
        self._device_type = next((d.type for d in self._devices if d.type != "cpu"), "cpu")
        self._micro_batches: list[tuple[Callable[[], Tensor], Surroundings]] = []

    def record(self, compute: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Run ``compute(*args, **kwargs)`` and remember it with the RNG and autocast state it started from."""
        surroundings = self.surroundings()
        loss = compute(*args, **kwargs)
        self.add(lambda: compute(*args, **kwargs), surroundings, loss)
        return loss

    def surroundings(self) -> Surroundings:
        """To be taken right before a forward that is to be replayed."""
        kind = self._device_type
        return Surroundings(
            RNGState.capture(self._devices), kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        )

    def add(self, compute: Callable[[], Tensor], surroundings: Surroundings, loss: Tensor) -> None:
        """Remember a loss that was computed in `surroundings` and can be computed again by `compute`."""
        if loss.numel() != 1:
            raise ValueError(f"a loss of shape {tuple(loss.shape)} was recorded: LQA needs a scalar, e.g. loss.mean()")
        self._micro_batches.append((compute, surroundings))
        value = self._weighted(loss)
        self.loss = value if self.loss is None else self.loss + value
        autocast = surroundings.autocast_dtype if surroundings.autocast else autocast_inside(self.model)
        self.relative_noise = max(self.relative_noise, rounding_error(self.model, autocast))

    def _weighted(self, loss: Tensor) -> Tensor:
        return self.weight * loss.detach().reshape(()).to(torch.promote_types(loss.dtype, torch.float32))

    def __len__(self) -> int:
        return len(self._micro_batches)

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """The loss at the present weights, a 0-dim tensor; at the weights of the recording, `loss` bit for bit."""
        total: Tensor | None = None
        with undisturbed(self.model, self._devices):
            for compute, surroundings in self._micro_batches:
                with surroundings.again():
                    loss = self._weighted(compute())
                total = loss if total is None else total + loss
        if total is None:
            raise ValueError("ReplayedLoss was called before anything was recorded: call record(...) first")
        return total
