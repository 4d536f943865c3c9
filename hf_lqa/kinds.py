"""What an object is to the search for state: the user's own, a library's machinery, a Trainer, something with slots."""

from __future__ import annotations

import functools
import sys
import sysconfig
from types import CodeType
from typing import Any

#: Machinery, data and services: they keep no state of a forward, or none that could be put back piece by piece.
_NOT_FOLLOWED = (
    "accelerate asyncio bitsandbytes concurrent contextlib datasets hf_lqa huggingface_hub inspect io logging mlflow"
    " multiprocessing pandas pyarrow tensorboard threading tokenizers torch._ torch.amp torch.autograd torch.cuda"
    " torch.distributed torch.fx torch.jit torch.optim torch.storage torch.utils tqdm transformers.data"
    " transformers.integrations transformers.modelcard transformers.processing transformers.tokenization"
    " transformers.trainer transformers.training_args transformers.utils wandb weakref"
).split()
#: Quantized layers move their weights about when they are first called; only their tensors are looked at.
LAZY_MODULES = ("awq", "bitsandbytes", "gptqmodel", "hqq", "optimum", "torchao")


def short(key: Any) -> bool:
    return isinstance(key, (str, int, float)) and len(str(key)) < 50


def names_in(code: CodeType) -> set[str]:
    nested = (c for c in code.co_consts if isinstance(c, CodeType))
    return set(code.co_names).union(*map(names_in, nested))


def has_attributes(value: Any) -> bool:
    return type(value).__dictoffset__ != 0  # `hasattr` would ask a `__getattr__`


def has_slots(cls: type) -> bool:
    return any(vars(c).get("__slots__") for c in cls.__mro__)


@functools.cache
def is_machinery(module: str) -> bool:
    return any(module == name or module.startswith(name if name[-1] == "_" else name + ".") for name in _NOT_FOLLOWED)


def is_trainer(value: Any) -> bool:
    return any(cls.__module__ == "transformers.trainer" for cls in type(value).__mro__)


@functools.cache
def is_the_users(module: str | None) -> bool:
    """Whether a module is neither Python's own nor an installed package: what is global there may be state."""
    if module is None or module.partition(".")[0] in (*sys.stdlib_module_names - {"__main__"}, "hf_lqa"):
        return False
    file = getattr(sys.modules.get(module), "__file__", None) or ""
    paths = sysconfig.get_paths()
    return not any(file.startswith(paths[kind]) for kind in ("stdlib", "purelib", "platlib")) or not file
