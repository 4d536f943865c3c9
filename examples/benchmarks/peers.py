"""The optimizers that ``run.py`` compares with: each as its authors advise, none given a rate that was tuned here.

Most come from their authors' packages (``pip install -e ".[benchmarks]"``). SaLSa, GeN and Barzilai-Borwein are short
re-implementations: the first two exist as packages, but bring their own training loop.

`build` makes one. What an optimizer needs of the step beyond gradients it finds in its own attributes, which
``run.py`` sets before every ``step()``: ``batch_loss``, the loss that was back-propagated; ``batch_closure``, the same
loss at the present weights, dropout masks repeated; ``fresh_closure``, the loss of another batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Closure = Callable[[], Tensor]


def _nothing() -> Tensor:
    raise RuntimeError("the loop has not provided a closure")


class WithBatch(torch.optim.Optimizer):
    """An optimizer that looks at losses. Unlike others it is told of each batch, see the module's docstring."""

    batch_loss: Tensor
    batch_closure: Closure = staticmethod(_nothing)
    fresh_closure: Closure = staticmethod(_nothing)
    #: Forward passes beyond the one of training.
    forwards = 0

    @property
    def rate(self) -> float:
        return float(self.param_groups[0]["lr"])

    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"] if p.grad is not None]


class SaLSa(WithBatch):
    r"""Armijo line search along Adam's preconditioned gradient, on averages over steps.

    Kenneweg et al., *No learning rates needed: Introducing SaLSa*, IJCNN 2024 (arXiv 2407.20650); package
    ``SaLSa-Optimizer``. With f the batch's loss, P the diagonal of Adam's root mean squares and s the step size:

    .. math::  \bar f \leftarrow \beta \bar f + (1-\beta)(f(w) - f(w - s P^{-1} g)), \quad
               \bar g \leftarrow \beta \bar g + (1-\beta) g^T P^{-1} g

    s shrinks by 0.8 until :math:`\bar f \ge c\, s\, \bar g`, and starts 1.1 times higher in the next search. A step
    without search moves along Adam's own direction. Searches are made in the first ten steps and then at least every
    tenth, the more often the more the fast average of s departs from the slow one.
    """

    c, shrink, grow, beta, betas = 0.5, 0.8, 1.1, 0.9, (0.9, 0.999)

    def __init__(self, params: Iterable[Any], lr: float = 1.0):
        super().__init__(params, {"lr": lr})
        self.step_size = lr
        self.steps, self.since = 0, 100
        self.decrease = self.squared = 0.0
        self.slow = self.fast = 1e-8

    @property
    def rate(self) -> float:
        return self.step_size

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.steps += 1
        self.since += 1
        params = self._params()
        direction, momentum, squared = [], [], 0.0
        for p in params:
            if not (state := self.state[p]):
                state["m"], state["v"] = torch.zeros_like(p), torch.zeros_like(p)
            state["m"].lerp_(p.grad, 1 - self.betas[0])
            state["v"].lerp_(p.grad**2, 1 - self.betas[1])
            root = (state["v"] / (1 - self.betas[1] ** (self.steps + 1))).sqrt_().add_(1e-8)
            direction.append(p.grad / root)
            momentum.append(state["m"] / (1 - self.betas[0] ** (self.steps + 1)) / root)
            squared += (p.grad * direction[-1]).sum().item()
        change = self.fast / self.slow
        wait = min(10.0, 1 / (max(change, 1 / change) - 1 + 1e-8))
        step_size = self.step_size * self.grow
        if self.steps >= 10 and self.since < wait:
            torch._foreach_add_(params, momentum, alpha=-step_size)
            return
        self.since = 0
        self.squared = self.beta * self.squared + (1 - self.beta) * squared
        origin = [p.clone() for p in params]
        loss = self.batch_loss.item()
        for _ in range(100):
            torch._foreach_copy_(params, origin)
            torch._foreach_add_(params, direction, alpha=-step_size)
            decrease = self.beta * self.decrease + (1 - self.beta) * (loss - self.batch_closure().item())
            self.forwards += 1
            if decrease >= self.c * step_size * self.squared:
                self.decrease = decrease
                break
            step_size *= self.shrink
        self.step_size = step_size
        self.slow = 0.99 * self.slow + 0.01 * step_size
        self.fast = 0.9 * self.fast + 0.1 * step_size


class GeNAdamW(WithBatch):
    r"""AdamW whose rate is the minimiser of a parabola through three losses of another batch, smoothed.

    Bu and Xu, *Gradient descent with generalized Newton's method*, ICLR 2025 (arXiv 2407.02772); package ``gen-optim``.
    With d AdamW's update at rate 1 and r the present rate, the losses at :math:`w + \{-r, 0, r\} d` are fitted by
    :math:`L_0 - a r + \frac12 b r^2`. If a and b are positive and the fit explains 99 % of the variance,

    .. math::  r \leftarrow 0.9\, r + 0.1\, \mathrm{clip}(a / b, r/2, 2r)

    every eighth step, as their paper advises. As in their package the moments advance twice in such a step. ``lr`` is
    where it begins; the schedule multiplies.
    """

    every, smooth = 8, 0.9

    def __init__(self, params: Iterable[Any], lr: float = 5e-5):
        self.base = torch.optim.AdamW(params, lr=1.0, weight_decay=0.0)
        super().__init__(self.base.param_groups, {})
        self.level, self.steps = lr, 0

    @property
    def rate(self) -> float:
        return self.level * float(self.param_groups[0]["lr"])

    def _base_step(self, rate: float) -> None:
        # Loading a state, as Accelerate does, makes new groups.
        self.base.param_groups = self.param_groups
        factors = [group["lr"] for group in self.param_groups]
        for group, factor in zip(self.param_groups, factors, strict=True):
            group["lr"] = rate * factor
        self.base.step()
        for group, factor in zip(self.param_groups, factors, strict=True):
            group["lr"] = factor

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.steps += 1
        factor = float(self.param_groups[0]["lr"])
        if self.steps % self.every == 0 and factor > 0:
            params = self._params()
            origin = [p.clone() for p in params]
            self._base_step(self.level)
            move = torch._foreach_sub(params, origin)
            losses = []
            for alpha in (-1.0, 0.0, 1.0):
                torch._foreach_copy_(params, origin)
                torch._foreach_add_(params, move, alpha=alpha)
                losses.append(self.fresh_closure().item())
                self.forwards += 1
            torch._foreach_copy_(params, origin)
            # Three points determine the parabola: it explains all of the variance.
            descent, curvature = (losses[0] - losses[2]) / 2, losses[0] - 2 * losses[1] + losses[2]
            if descent > 0 and curvature > 0:
                best = self.level * min(2.0, max(0.5, descent / curvature))
                self.level = self.smooth * self.level + (1 - self.smooth) * best
        self._base_step(self.level)


class BarzilaiBorwein(WithBatch):
    r"""SGD whose rate is the inverse of the secant curvature of the last period.

    Tan, Ma, Dai and Qian, *Barzilai-Borwein step size for stochastic gradient descent*, NeurIPS 2016 (arXiv
    1605.04131), SGD-BB: after each period of m steps, with w its last weights and :math:`\bar g` its averaged gradient,

    .. math::  r = \frac1m \frac{\|w_k - w_{k-1}\|^2}{|(w_k - w_{k-1})^T(\bar g_k - \bar g_{k-1})|}

    `first` is the rate of the first two periods; ``lr`` multiplies, for schedulers.
    """

    def __init__(self, params: Iterable[Any], first: float = 0.1, period: int = 20):
        super().__init__(params, {"lr": 1.0})
        self.level, self.period, self.steps = first, period, 0
        self.previous: list[Tensor] | None = None
        self.previous_gradient: list[Tensor] | None = None
        self.gradient: list[Tensor] | None = None

    @property
    def rate(self) -> float:
        return self.level * float(self.param_groups[0]["lr"])

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        params = self._params()
        if self.gradient is None:
            self.gradient = [torch.zeros_like(p) for p in params]
        keep = 1 - 1 / self.period
        for total, p in zip(self.gradient, params, strict=True):
            total.mul_(keep).add_(p.grad, alpha=1 - keep)
        for p in params:
            p.sub_(p.grad, alpha=self.rate)
        self.steps += 1
        if self.steps % self.period:
            return
        if self.previous is not None and self.previous_gradient is not None:
            moved = torch._foreach_sub(params, self.previous)
            turned = torch._foreach_sub(self.gradient, self.previous_gradient)
            squared = sum((x * x).sum().item() for x in moved)
            product = abs(sum((x * y).sum().item() for x, y in zip(moved, turned, strict=True)))
            if product > 0:
                self.level = squared / product / self.period
        self.previous = [p.clone() for p in params]
        self.previous_gradient, self.gradient = self.gradient, None


@dataclass
class Peer:
    """An optimizer in a loop.

    Attributes:
        optimizer: to be stepped.
        rate: the learning rate it used last, as far as there is one.
        schedule: the schedule its authors advise; `None` is the task's.
        greedy: the learning rate is moved by `transformers.optimization.GreedyLR` on each step's loss.
        after_step: called after every step.
        finish: called before evaluation.
    """

    optimizer: torch.optim.Optimizer
    rate: Callable[[], float]
    schedule: str | None = None
    greedy: bool = False
    after_step: Callable[[], None] = field(default=lambda: None)
    finish: Callable[[], None] = field(default=lambda: None)


def _prodigy(model: nn.Module, lr: float | None) -> Peer:
    from prodigyopt import Prodigy

    # Their README: lr 1, cosine annealing, and these two for fine-tuning and short runs.
    optimizer = Prodigy(trainable(model), lr=1.0, safeguard_warmup=True, use_bias_correction=True, weight_decay=0.0)
    return Peer(optimizer, lambda: optimizer.param_groups[0]["d"] * optimizer.param_groups[0]["lr"], "cosine")


def _dadapt(model: nn.Module, lr: float | None) -> Peer:
    from dadaptation import DAdaptAdam

    # Their README: lr 1 and the schedule that one would use otherwise.
    optimizer = DAdaptAdam(trainable(model), lr=1.0, decouple=True)
    return Peer(optimizer, lambda: optimizer.param_groups[0]["d"] * optimizer.param_groups[0]["lr"])


def _dog(model: nn.Module, lr: float | None, layerwise: bool = False) -> Peer:
    from dog import DoG, LDoG, PolynomialDecayAverager

    # Their README: constant rate, and the average of the iterates for evaluation; L-DoG for fine-tuning transformers.
    optimizer = (LDoG if layerwise else DoG)(trainable(model), reps_rel=1e-8 if layerwise else 1e-6)
    averager = PolynomialDecayAverager(model)

    def finish() -> None:
        model.load_state_dict(averager.av_model.state_dict())

    def rate() -> float:
        eta = optimizer.param_groups[0].get("eta", 0.0)
        return float(eta[0] if isinstance(eta, (list, tuple)) else eta)

    return Peer(optimizer, rate, "constant", after_step=averager.step, finish=finish)


def _momo(model: nn.Module, lr: float | None) -> Peer:
    from momo import MomoAdam

    class Momo(MomoAdam):
        batch_loss: Tensor

        def step(self, closure: Any = None) -> Any:
            return super().step(loss=self.batch_loss)

    # Their README: lr 1e-2, constant. It is the cap; the rate below it is not kept by the package.
    optimizer = Momo(trainable(model), lr=1e-2)
    return Peer(optimizer, lambda: float(optimizer.param_groups[0]["lr"]), "constant")


def _mechanic(model: nn.Module, lr: float | None) -> Peer:
    from mechanic_pytorch import mechanize

    optimizer = mechanize(torch.optim.AdamW)(trainable(model), lr=1.0, weight_decay=0.0)

    def rate() -> float:
        total = optimizer.state.get("_mechanic", {}).get("s", 0.0)
        return float(torch.as_tensor(total).sum()) * optimizer.param_groups[0]["lr"]

    return Peer(optimizer, rate)


def _salsa(model: nn.Module, lr: float | None) -> Peer:
    optimizer = SaLSa(trainable(model))
    return Peer(optimizer, lambda: optimizer.rate, "constant")


def _gen(model: nn.Module, lr: float | None) -> Peer:
    optimizer = GeNAdamW(trainable(model), lr=lr or 5e-5)
    return Peer(optimizer, lambda: optimizer.rate)


def _bb(model: nn.Module, lr: float | None) -> Peer:
    optimizer = BarzilaiBorwein(trainable(model), first=lr or 0.1)
    return Peer(optimizer, lambda: optimizer.rate, "constant")


def _greedy(model: nn.Module, lr: float | None) -> Peer:
    optimizer = torch.optim.AdamW(trainable(model), lr=lr or 5e-5, weight_decay=0.0)
    return Peer(optimizer, lambda: float(optimizer.param_groups[0]["lr"]), greedy=True)


PEERS: dict[str, Callable[[nn.Module, float | None], Peer]] = {
    "prodigy": _prodigy,
    "dadapt_adam": _dadapt,
    "dog": _dog,
    "ldog": lambda model, lr: _dog(model, lr, layerwise=True),
    "momo_adam": _momo,
    "mechanic_adamw": _mechanic,
    "salsa": _salsa,
    "gen_adamw": _gen,
    "greedy": _greedy,
    "bb": _bb,
}


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def build(name: str, model: nn.Module, lr: float | None = None) -> Peer:
    """The peer `name` for `model`. `lr` is used by those that must begin somewhere.

    Raises:
        ImportError: its package is missing; ``pip install -e ".[benchmarks]"`` has them all.
    """
    peer = PEERS[name](model, lr)
    if not math.isfinite(peer.rate()):
        raise ValueError(f"{name}: its learning rate is {peer.rate()} before training")
    return peer
