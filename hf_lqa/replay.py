"""Losses that can be computed again: the same random numbers, and no trace left behind.

A probe compares losses at neighbouring weights. With dropout, fresh masks would change the loss far more than the
move does, so a probe replays the random numbers of the training forward, and puts everything that a forward touches
back afterwards: RNG streams, module buffers (BatchNorm's statistics) and autocast's cache of weight casts.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from .rounding import autocast_inside, rounding_error
from .search import reach
from .state import Changes, Reading
from .streams import RNGState
from .values import Values


@dataclass
class Forward:
    """One forward pass: the random numbers and the autocast context that it had, and what it changed."""

    rng: RNGState
    device_type: str
    autocast: bool
    autocast_dtype: torch.dtype
    changes: Changes = field(default_factory=Changes)

    @contextmanager
    def again(self) -> Iterator[None]:
        self.rng.apply()
        # No cache: a held outer context would keep the casts of these weights for the next forward.
        with torch.autocast(self.device_type, dtype=self.autocast_dtype, enabled=self.autocast, cache_enabled=False):
            yield


#: Of each model, the weights that forwards have been seen to write to though no probe moves them: copied from then on.
_WRITTEN: weakref.WeakKeyDictionary[nn.Module, set[str]] = weakref.WeakKeyDictionary()


#: How autograd says that a loss needs it.
_WANTS_GRAD = ("does not require grad", "does not have a grad_fn", "appears to not have been used in the graph")


class ReplayedLoss:
    """The loss of one training step, as a closure for `LQA.step` that replays it and leaves no trace.

    ::

        closure = ReplayedLoss(model)
        loss = closure.record(compute_loss, model, batch)   # runs it, remembers how
        loss.backward()
        optimizer.step(closure)                             # on probe steps, runs it again at other weights

    A replay starts from the state that the recorded forward started from, and ends with the state that it found:
    random numbers, buffers, weights that get no gradient, and what models, `compute` and its arguments keep in
    attributes, containers and variables. What that is, and is not: "State that a forward keeps" in
    docs/compatibility.md.

    With gradient accumulation, `record` once per micro-batch; the closure is ``weight`` times their sum, and `weight`
    must be such that this is what was back-propagated (``1 / n`` under ``accelerator.accumulate``, which divides in
    ``accelerator.backward``).

    Args:
        models: the modules that the loss is computed by, one or several; whatever of them is trained, all of them.
        weight: factor of the sum of the recorded losses, ``> 0``.

    Attributes:
        loss: 0-dim tensor, ``weight`` times the sum of the recorded losses, as they were during training.
        relative_noise: rounding error of the loss relative to its value, see `rounding_error`.
        with_grad: whether replays run with autograd on, for losses that differentiate. Found out by itself where
            autograd says so.
        traces: what the last `check` found that a replay did not leave as it was, by name.
        unseen: iterators that the last `check` came across and cannot look into, by name.

    Raises:
        ValueError: no model, a model that is none, `weight` out of range, or a recorded loss that is not a scalar.
    """

    def __init__(self, *models: nn.Module, weight: float = 1.0):
        if not models or not all(isinstance(model, nn.Module) for model in models):
            kinds = ", ".join(type(model).__name__ for model in models) or "nothing"
            raise ValueError(f"ReplayedLoss({kinds}): give the torch.nn.Modules that compute the loss, weight by name")
        if not weight > 0:
            raise ValueError(f"weight={weight!r}: the factor of the recorded losses must be > 0")
        self.models = models
        self.weight = weight
        self.loss: Tensor | None = None
        self.relative_noise = 0.0
        self.with_grad = False
        self.traces: list[str] = []
        self.unseen: list[str] = []
        self._devices = {p.device for model in models for p in model.parameters()}
        self._device_type = next((d.type for d in self._devices if d.type != "cpu"), "cpu")
        self._micro_batches: list[tuple[Callable[[], Tensor], Forward]] = []
        self._roots: dict[str, Any] = {}

    def record(self, compute: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Run ``compute(*args, **kwargs)`` and remember it with all that it started from."""
        with self.watching({"compute": compute, "an argument": args, "argument": kwargs}) as forward:
            loss = compute(*args, **kwargs)
        self.add(lambda: compute(*args, **kwargs), forward, loss)
        return loss

    @contextmanager
    def watching(self, roots: dict[str, Any], gradients: bool = True) -> Iterator[Forward]:
        """Take down what the body's forward starts from and what it changes.

        Args:
            roots: what it uses, by name.
            gradients: whether gradients are among what it must not change.
        """
        kind = self._device_type
        number = len(self._micro_batches)
        self._roots |= {f"{name} of micro-batch {number + 1}" if number else name: r for name, r in roots.items()}
        # What is trained is copied where a probe moves it.
        found = reach({**self._names(), **roots}, self._trained, self._written(), gradients=gradients)
        forward = Forward(
            RNGState.capture(self._devices), kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        )
        reading = Reading(found.holders)
        with _optimizer_steps() as stepped:
            yield forward
        forward.changes = reading.changes()
        forward.changes.obstacles.extend(f"{name}.step within the forward" for name in stepped)

    def add(self, compute: Callable[[], Tensor], forward: Forward, loss: Tensor) -> None:
        """Remember a loss that was computed in `forward` and can be computed again by `compute`."""
        if loss.numel() != 1:
            raise ValueError(f"a loss of shape {tuple(loss.shape)} was recorded: LQA needs a scalar, e.g. loss.mean()")
        self._micro_batches.append((compute, forward))
        value = self._weighted(loss)
        self.loss = value if self.loss is None else self.loss + value
        for model in self.models:
            autocast = forward.autocast_dtype if forward.autocast else autocast_inside(model)
            self.relative_noise = max(self.relative_noise, rounding_error(model, autocast))

    def _weighted(self, loss: Tensor) -> Tensor:
        return self.weight * loss.detach().reshape(()).to(torch.promote_types(loss.dtype, torch.float32))

    def _names(self) -> dict[str, Any]:
        kinds = [type(model).__name__ for model in self.models]
        alike = len(kinds) != len(set(kinds))
        names = [f"{kind}[{i}]" if alike else kind for i, kind in enumerate(kinds)]
        return dict(zip(names, self.models, strict=True))

    def _trained(self, weight: Tensor) -> bool:
        """Whether the optimizer may own `weight`."""
        return weight.requires_grad

    def _written(self) -> set[str]:
        return set().union(*(_WRITTEN.get(model, ()) for model in self.models))

    def __len__(self) -> int:
        return len(self._micro_batches)

    @property
    def obstacle(self) -> str | None:
        """What the forward did that no replay can do again without a trace, by name; `None` if nothing."""
        names = dict.fromkeys(name for _, forward in self._micro_batches for name in forward.changes.obstacles)
        return ", ".join(names) or None

    @property
    def complete(self) -> bool:
        """Whether all that the forward changed was copied before; what was not will be, at the next recording."""
        lost = {v.path for _, f in self._micro_batches for v in f.changes.lost if not _has_gradient(v.owner)}
        for model in self.models:
            _WRITTEN.setdefault(model, set()).update(lost)
        return not lost

    def __call__(self) -> Tensor:
        """The loss at the present weights, a 0-dim tensor; at the weights of the recording, `loss` bit for bit."""
        return self._replay(check=False)

    def check(self) -> Tensor:
        """`__call__`, with a look at whether it left a trace: see `traces`."""
        return self._replay(check=True)

    def _replay(self, check: bool) -> Tensor:
        if not self._micro_batches:
            raise ValueError("ReplayedLoss was called before anything was recorded: call record(...) first")
        if not self.with_grad:
            try:
                with torch.no_grad():
                    return self._undisturbed(check)
            except RuntimeError as error:
                if not any(said in str(error) for said in _WANTS_GRAD):
                    raise
                self.with_grad = True
        with torch.enable_grad():
            return self._undisturbed(check)

    def _undisturbed(self, check: bool) -> Tensor:
        """Replay all micro-batches, then leave everything as it was, also if one raises."""
        roots = {**self._names(), **self._roots}
        found = reach(roots, _has_gradient, self._written(), gradients=check)
        # Weights with a gradient are those that a probe moves: they are put where they should be already.
        changed = (h for _, forward in self._micro_batches for h, _ in forward.changes.backs.values())
        tensors = [h.owner for h in (*found.holders, *changed) if isinstance(h, Values)]
        moved = {id(tensor) for tensor in tensors if _has_gradient(tensor)}
        rng, present = RNGState.capture(self._devices), Reading(found.holders)
        total: Tensor | None = None
        try:
            torch.clear_autocast_cache()
            with _autograd_aside(self.models, tensors) if self.with_grad else contextlib.nullcontext():
                for (compute, forward), start in zip(self._micro_batches, self._starts(), strict=True):
                    start.undo(moved)
                    with forward.again():
                        loss = self._weighted(compute())
                    total = loss if total is None else total + loss
        finally:
            present.put_back(moved)
            torch.clear_autocast_cache()
            rng.apply()
        if check:
            self.unseen = found.unseen
            self.traces = present.changes(but=moved).names()
        assert total is not None
        return total

    def _starts(self) -> list[Changes]:
        """For each micro-batch, what brings back the state it started from."""
        starts, later = [], Changes()
        for _, forward in reversed(self._micro_batches):
            later = forward.changes.before(later)
            starts.append(later)
        return starts[::-1]


def _has_gradient(tensor: Tensor) -> bool:
    return tensor.is_leaf and tensor.grad is not None


@contextmanager
def _autograd_aside(models: Iterable[nn.Module], tensors: list[Tensor]) -> Iterator[None]:
    """Where a replay runs with autograd on: no gradient of training changes, no reducer waits for a backward."""
    gradients = [(t, t.grad) for t in tensors if t.is_leaf and t.requires_grad]
    try:
        with contextlib.ExitStack() as stack:
            for model in models:
                for module in model.modules():
                    if isinstance(module, nn.parallel.DistributedDataParallel):
                        stack.enter_context(module.no_sync())
            for tensor, _ in gradients:
                tensor.grad = None
            yield
    finally:
        for tensor, gradient in gradients:
            tensor.grad = gradient


@contextmanager
def _optimizer_steps() -> Iterator[list[str]]:
    """The names of the optimizers that step within the body."""
    stepped: list[str] = []
    handle = register_optimizer_step_post_hook(lambda optimizer, *_: stepped.append(type(optimizer).__name__))
    try:
        yield stepped
    finally:
        handle.remove()
