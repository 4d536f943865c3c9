"""Baselines that measure nothing: AdamW at a learning rate that is computed from the model's shapes.

``formula_n``
    ``1.5 / sqrt(n)``, ``n`` the number of trainable elements.
``formula_m``
    ``0.14 / sqrt(m)``, ``m`` the geometric mean of the trainable matrices' numbers of elements, each weighted by its
    root. It grows with neither depth nor vocabulary.
``formula_n_head8``, ``formula_m_head8``
    The same, and eight times as much for the head, which is fresh where a model becomes a classifier.

Whoever does not beat them measures nothing that shapes do not say.
"""

from __future__ import annotations

import math
import re

import torch
from torch import nn

#: Name -> the constant, whether it is over the root of ``n`` or ``m``, and the head's factor.
FORMULAS: dict[str, tuple[float, str, float]] = {
    "formula_n": (1.5, "n", 1.0),
    "formula_m": (0.14, "m", 1.0),
    "formula_n_head8": (1.5, "n", 8.0),
    "formula_m_head8": (0.14, "m", 8.0),
}
#: Modules that `from_pretrained` makes anew when an encoder or a decoder becomes a classifier or a masked LM.
_HEAD = re.compile(r"(^|\.)(classifier|score|cls\.predictions)(\.|$)")


def elements(model: nn.Module) -> int:
    """``n``: the number of trainable elements."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def typical_matrix(model: nn.Module) -> float:
    """``m``: ``exp(sum_i sqrt(n_i) log(n_i) / sum_i sqrt(n_i))`` over the trainable matrices of ``n_i`` elements."""
    sizes = [p.numel() for p in model.parameters() if p.requires_grad and p.dim() == 2] or [elements(model)]
    weights = [math.sqrt(size) for size in sizes]
    return math.exp(sum(w * math.log(n) for w, n in zip(weights, sizes, strict=True)) / sum(weights))


def rate(name: str, model: nn.Module) -> float:
    constant, root, _ = FORMULAS[name]
    return constant / math.sqrt(elements(model) if root == "n" else typical_matrix(model))


def adamw(name: str, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW at that rate, as the Trainer builds it by default: no weight decay."""
    own, factor = rate(name, model), FORMULAS[name][2]
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    head = [p for n, p in trained if _HEAD.search(n)]
    body = [p for n, p in trained if not _HEAD.search(n)]
    groups = [{"params": body, "lr": own}, {"params": head, "lr": own * factor}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=own, weight_decay=0.0, fused=True)
