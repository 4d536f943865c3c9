"""What a forward pass may keep its state in, found by following references.

The search begins at the model and whatever else the loss is computed by (a Trainer, a function, the inputs), and
follows attributes, containers, enclosing and global variables. What it does not know it does not touch; and nothing is
lost by that in silence, since the first replay must give the training loss again.
"""

from __future__ import annotations

import array
import functools
import sys
from collections import deque
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from .holders import (
    ClassAttributes,
    Elements,
    Globals,
    Gradient,
    Holder,
    Items,
    Names,
    Slots,
    Variable,
)
from .kinds import LAZY_MODULES, has_attributes, has_slots, is_machinery, is_the_users, is_trainer, names_in, short
from .slopes import is_sharded
from .streams import Array, Position, Stream, is_stream, position
from .values import Values

#: Elements of longer containers are data: the container is put back, they are not searched.
_MAX_CONTAINER = 4096
#: Objects that are followed at most.
_MAX_OBJECTS = 500_000
#: Tensors of up to so many bytes are always copied; larger ones together up to the size of the weights that are
#: trained, and this much more.
SMALL, ALLOWANCE = 2**20, 2**26
#: Of a Trainer, what its `compute_loss` has no business with, or what is looked at once only as `_SHALLOW`.
_TRAINERS_OWN = frozenset(
    "accelerator args callback_handler data_collator eval_dataset lr_scheduler model_init optimizer processing_class"
    " tokenizer train_dataset".split()
)
_SHALLOW = ("state", "control")
_LEAVES = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    range,
    slice,
    Enum,
    ModuleType,
    BuiltinFunctionType,
    CodeType,
    property,
    torch.dtype,
    torch.device,
)


@dataclass
class Found:
    """The holders that were reached, and the iterators that do not show how far they have come."""

    holders: list[Holder] = field(default_factory=list)
    unseen: list[str] = field(default_factory=list)


def reach(
    roots: Mapping[str, Any], moved: Callable[[Tensor], bool], written: Container[str] = (), gradients: bool = False
) -> Found:
    """What can be reached from `roots`, name by name.

    Args:
        moved: whether training moves a weight (a parameter, or a leaf that requires grad): those are not copied.
        written: paths of tensors that are copied all the same, however large.
        gradients: whether gradients are to be watched.
    """
    search = _Search()
    for name, root in roots.items():
        search.follow(name, root)
    found = Found(search.holders, search.unseen)
    allowed = ALLOWANCE + sum(_bytes(w) for _, w in search.weights if w.requires_grad)
    still = [(path, w) for path, w in search.weights if not moved(w)]
    for tensors, candidates in ((search.weights, still), (search.others, search.others)):
        fits = sum(_bytes(t) for _, t in candidates if _bytes(t) > SMALL) <= allowed
        copied = {id(t) for _, t in candidates if fits or _bytes(t) <= SMALL}
        for path, tensor in tensors:
            uncounted = tensors is search.weights or id(tensor) in search.buffers
            found.holders.append(Values(path, tensor, id(tensor) in copied or path in written, uncounted))
    if gradients:
        found.holders += [Gradient(f"the gradient of {path}", w) for path, w in search.weights if w.requires_grad]
    return found


class _Search:
    def __init__(self) -> None:
        self.holders: list[Holder] = []
        self.unseen: list[str] = []
        self.weights: list[tuple[str, Tensor]] = []
        self.others: list[tuple[str, Tensor]] = []
        self.buffers: set[int] = set()
        self._seen: dict[int, Any] = {}
        self._sharded = False

    def follow(self, name: str, root: Any) -> None:
        if isinstance(root, nn.Module):
            self._sharded |= any(hasattr(m, "reshard") and hasattr(m, "unshard") for m in root.modules())
        ahead = [(name, root)]
        if is_trainer(root):
            self._seen[id(root)] = root
            ahead = list(self._of_trainer(name, root))
        while ahead and len(self._seen) < _MAX_OBJECTS:
            path, value = ahead.pop()
            if isinstance(value, _LEAVES) or id(value) in self._seen:
                continue
            self._seen[id(value)] = value
            ahead += self._take(path, value)

    def _of_trainer(self, path: str, trainer: Any) -> Iterator[tuple[str, Any]]:
        self.holders.append(Names(path, trainer))
        yield from ((f"{path}.{k}", v) for k, v in vars(trainer).items() if k not in (*_TRAINERS_OWN, *_SHALLOW))
        yield from _class_of(path, trainer)
        for name in _SHALLOW:
            if (owner := vars(trainer).get(name)) is not None:
                self.holders.append(Names(f"{path}.{name}", owner))
                for key, value in vars(owner).items():
                    if isinstance(value, (dict, list)):
                        kind = Items if isinstance(value, dict) else Elements
                        self.holders.append(kind(f"{path}.{name}.{key}", value))

    def _take(self, path: str, value: Any) -> Iterator[tuple[str, Any]]:
        """Note the state of `value` itself and return what is behind it."""
        if isinstance(value, Tensor):
            return self._tensor(path, value)
        if isinstance(value, nn.Module):
            return self._module(path, value)
        if is_stream(value):
            self.holders.append(Stream(path, value))
            return iter(())
        if isinstance(value, (tuple, frozenset)):
            return _enumerated(path, value)
        if isinstance(value, dict):
            self.holders.append(Items(path, value))
            return self._items(path, value)
        if isinstance(value, (list, deque, set, bytearray, array.array)):
            self.holders.append(Elements(path, value))
            return _enumerated(path, value) if not isinstance(value, (bytearray, array.array)) else iter(())
        if isinstance(value, (FunctionType, MethodType, functools.partial)):
            return self._callable(path, value)
        if isinstance(value, type):
            return self._class(path, value)
        if (numpy := sys.modules.get("numpy")) is not None and isinstance(value, numpy.ndarray):
            if value.flags.writeable and value.nbytes <= ALLOWANCE:
                self.holders.append(Array(path, value))
            return iter(())
        if hasattr(type(value), "__next__") and (not has_attributes(value) or hasattr(value, "_num_yielded")):
            if position(value) is None:
                self.unseen.append(path)
            else:
                self.holders.append(Position(path, value))
            return iter(())
        return self._object(path, value)

    def _tensor(self, path: str, tensor: Tensor) -> Iterator[tuple[str, Any]]:
        if nn.parameter.is_lazy(tensor) or tensor.is_meta or tensor.layout is not torch.strided or _overlaps(tensor):
            return
        weight = isinstance(tensor, nn.Parameter) or (tensor.is_leaf and tensor.requires_grad)
        (self.weights if weight else self.others).append((path, tensor))
        yield from ()

    def _module(self, path: str, module: nn.Module) -> Iterator[tuple[str, Any]]:
        if isinstance(module, torch.jit.ScriptModule):  # its attributes are not Python's
            buffers = dict(module.named_buffers())
            self.buffers |= set(map(id, buffers.values()))
            yield from ((f"{path}.{name}", t) for name, t in (*module.named_parameters(), *buffers.items()))
            return
        space = vars(module)
        for name, p in space["_parameters"].items():
            # FSDP2 gathers weights and frees them again; the weights themselves are the shards.
            if p is not None and (not self._sharded or is_sharded(p)):
                yield f"{path}.{name}", p
        self.holders.append(Items(path, space["_buffers"]))
        self._seen[id(space["_buffers"])] = space["_buffers"]
        self.buffers |= {id(b) for b in space["_buffers"].values()}
        for kind in ("_buffers", "_modules"):
            yield from ((f"{path}.{name}", value) for name, value in space[kind].items() if value is not None)
        for kind in ("_forward_hooks", "_forward_pre_hooks"):
            yield from ((f"a hook of {path}", hook) for hook in space[kind].values())
        root = type(module).__module__.partition(".")[0]
        if root in LAZY_MODULES:
            return
        self.holders.append(Names(path, module))
        yield from ((f"{path}.{name}", v) for name, v in space.items() if name not in _MODULES_OWN)
        yield from _class_of(path, module)

    def _items(self, path: str, mapping: dict[Any, Any]) -> Iterator[tuple[str, Any]]:
        if len(mapping) <= _MAX_CONTAINER:
            yield from ((f"{path}[{key!r}]" if short(key) else path, value) for key, value in mapping.items())

    def _callable(self, path: str, value: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(value, MethodType):
            yield path, value.__func__
            yield path, value.__self__
        elif isinstance(value, functools.partial):
            yield from ((path, part) for part in (value.func, value.args, value.keywords))
        elif not is_machinery(value.__module__ or ""):
            if vars(value):
                self.holders.append(Names(value.__name__, value))
                yield from ((f"{value.__name__}.{name}", v) for name, v in vars(value).items())
            yield from ((f"a default of {value.__name__}", v) for v in (value.__defaults__, value.__kwdefaults__))
            for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
                self.holders.append(holder := Variable(f"{name} in {value.__name__}", cell))
                yield from ((name, v) for v in holder.read().values())
            if is_the_users(value.__module__):
                yield from self._globals(value)

    def _globals(self, function: FunctionType) -> Iterator[tuple[str, Any]]:
        mentioned = names_in(function.__code__)
        spaces = {function.__module__: function.__globals__}
        for value in [function.__globals__.get(name) for name in mentioned]:
            if isinstance(value, ModuleType) and is_the_users(value.__name__):
                spaces[value.__name__] = vars(value)
        for module, space in spaces.items():
            named = {name: space[name] for name in mentioned if name in space}
            values = {k for k, v in named.items() if not isinstance(v, (FunctionType, type, ModuleType))}
            if values:
                self.holders.append(Globals(module, space, frozenset(values)))
            for name, value in named.items():
                if name in values or is_the_users(getattr(value, "__module__", None)):
                    yield name, value

    def _class(self, path: str, cls: type) -> Iterator[tuple[str, Any]]:
        if not is_the_users(cls.__module__):
            return
        space = dict(vars(cls))
        plain = {k: v for k, v in space.items() if not k.startswith("__") and not hasattr(v, "__get__")}
        if plain:
            self.holders.append(ClassAttributes(cls.__name__, cls, frozenset(plain)))
            yield from ((f"{cls.__name__}.{name}", value) for name, value in plain.items())
        for value in space.values():
            function = getattr(value, "__func__", value)
            if isinstance(function, FunctionType):
                yield f"{cls.__name__}.{function.__name__}", function

    def _object(self, path: str, value: Any) -> Iterator[tuple[str, Any]]:
        tokenizer = hasattr(type(value), "convert_tokens_to_ids")
        if tokenizer or any(is_machinery(cls.__module__) for cls in type(value).__mro__):
            return
        for kind, has in ((Names, has_attributes(value)), (Slots, has_slots(type(value)))):
            if has:
                holder = kind(path, value)
                self.holders.append(holder)
                yield from ((f"{path}.{name}", v) for name, v in holder.read().items())
        yield from _class_of(path, value)


#: What every module has.
_MODULES_OWN = frozenset(vars(nn.Module()))


def _class_of(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    yield from ((path, cls) for cls in type(value).__mro__ if is_the_users(cls.__module__))


def _enumerated(path: str, values: Any) -> Iterator[tuple[str, Any]]:
    if len(values) <= _MAX_CONTAINER:
        yield from ((f"{path}[{i}]", value) for i, value in enumerate(values))


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _overlaps(tensor: Tensor) -> bool:
    """Whether elements share memory, as after `expand`: nothing can be written there."""
    return any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
