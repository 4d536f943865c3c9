"""Closures of PyTorch's convention, which clear gradients, compute the loss, and call ``backward`` themselves."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from .replay import Forward, ReplayedLoss


def relative_noise(closure: Callable[[], Any] | None, params: list[Tensor]) -> float:
    """Rounding error of a closure's loss, relative to its value: what it says itself, else the weights' epsilon."""
    known: float | None = getattr(closure, "relative_noise", None)
    return known if known is not None else max(torch.finfo(p.dtype).eps for p in params)


class KnownLoss:
    """A closure whose loss at the origin is known: `loss`.

    Raises:
        ValueError: there is no loss.
    """

    def __init__(self, closure: Callable[[], Tensor], loss: Any):
        if loss is None:
            raise ValueError(
                f"closure={closure!r} returned None: a probe compares losses, so it must return the loss, as a closure"
                " of torch.optim does"
            )
        self._closure = closure
        self.loss = torch.as_tensor(loss).detach().reshape(())
        self.relative_noise: float | None = getattr(closure, "relative_noise", None)

    def __call__(self) -> Tensor:
        return torch.as_tensor(self._closure()).detach().reshape(())


class Caller:
    """Calls a closure for its loss and its gradients, and makes of it one that can be called for the loss alone.

    Whether it calls ``backward`` is seen by what it does to the gradients.

    Attributes:
        backpropagates: whether closures do; `None` until one was called.
    """

    def __init__(self) -> None:
        self.backpropagates: bool | None = None
        # What ran in closures so far: their buffers and gradients are kept in a probe.
        self._modules: list[nn.Module] = []
        self._warned_of_no_gradient = False

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_modules": []}

    def warn_of_no_gradient(self, given: bool) -> None:
        """Say so, once, where a closure was `given` and no parameter has a gradient."""
        if given and not self._warned_of_no_gradient:
            self._warned_of_no_gradient = True
            warnings.warn(
                "step(closure): no parameter of the optimizer has a gradient, so nothing moves. Call loss.backward()"
                " before step(), or in the closure",
                stacklevel=6,
            )

    def ask(
        self, closure: Callable[[], Any] | None, params: list[Tensor], probe: bool
    ) -> tuple[Any, Callable[[], Tensor] | None, int]:
        """The loss where it is known or `closure` is to be called for it, a closure for the probe, forwards it took.

        Args:
            closure, params, probe: as in `call`.

        Raises:
            ValueError: `closure` cannot be called, or as in `call`.
        """
        if closure is not None and not callable(closure):
            raise ValueError(
                f"step(closure={closure!r}): it must be callable and return the loss, e.g. hf_lqa.ReplayedLoss, or a"
                " function that calls backward and returns the loss"
            )
        known = getattr(closure, "loss", None)
        if closure is None or known is not None:
            return known, closure, 0
        if self.backpropagates is False:
            returned = closure() if probe else None
            return returned, KnownLoss(closure, returned) if probe else None, int(probe)
        if self.backpropagates is None and not probe and any(p.grad is not None for p in params):
            return None, None, 0
        returned, probed = self.call(closure, params, probe)
        return returned, probed, 0 if self.backpropagates or probed is None else 1

    def call(
        self, closure: Callable[[], Any], params: list[Tensor], probe: bool
    ) -> tuple[Any, Callable[[], Tensor] | None]:
        """What the closure returned, and a closure for the probe that is due; `None` if none is, or there is no loss.

        The latter computes the loss again with the same random numbers, and leaves gradients and buffers as they are.

        Args:
            closure: is called once, with gradient. If it raises, gradients are what they were.
            params: the optimizer's.
            probe: whether a probe is due.

        Raises:
            ValueError: a probe is due, and the closure returned no loss.
        """
        kept = [p.grad for p in params]
        versions = [g._version if g is not None else 0 for g in kept]
        model = nn.ModuleList([nn.ParameterList(params), *self._modules])
        replay = ReplayedLoss(model)
        try:
            with torch.enable_grad(), self._recording(replay, model, closure) if probe else nullcontext() as forward:
                returned = closure()
        except BaseException:
            for p, gradient in zip(params, kept, strict=True):
                p.grad = gradient
            raise
        if all(
            p.grad is was and (was is None or was._version == version)
            for p, was, version in zip(params, kept, versions, strict=True)
        ):
            if any(g is not None for g in kept):
                self.backpropagates = False
            return returned, KnownLoss(closure, returned) if probe else None
        self.backpropagates = True
        if forward is None:
            return returned, None
        origin = KnownLoss(closure, returned).loss
        leaves = list(dict.fromkeys([*params, *model.parameters()]))

        def again() -> Tensor:
            gradients = [p.grad for p in leaves]
            for p in leaves:
                p.grad = None
            try:
                with torch.enable_grad():
                    return torch.as_tensor(closure()).detach()
            finally:
                for p, gradient in zip(leaves, gradients, strict=True):
                    p.grad = gradient

        replay.add(again, forward, origin)
        return returned, replay

    @contextmanager
    def _recording(self, replay: ReplayedLoss, model: nn.ModuleList, closure: Callable[[], Any]) -> Iterator[Forward]:
        """What the body's forward starts from; its modules are appended to `model`."""
        with self._noted(model), replay.watching({"closure": closure}, gradients=False) as forward:
            yield forward

    @contextmanager
    def _noted(self, model: nn.ModuleList) -> Iterator[None]:
        """Append to `model` the modules that run in the body."""
        inside = set(model.modules())

        def note(module: nn.Module, _: Any) -> None:
            if module not in inside:
                inside.update(module.modules())
                model.append(module)
                self._modules.append(module)

        handle = register_module_forward_pre_hook(note)
        try:
            yield
        finally:
            handle.remove()
