"""How precisely a model's loss is computed."""

from __future__ import annotations

import sys

import torch
from torch import nn

#: Rounding error of one loss, relative to its value, in units of the machine epsilon: products of half precision are
#: summed in float32, and those of float32 in itself. Measured, see docs/compatibility.md.
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
