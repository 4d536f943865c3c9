"""The places in which a forward pass can keep state: how each is read, compared, and written back.

A holder's reading is a copy. `Holder.back` compares two of them and says what must be written to undo the difference.
"""

from __future__ import annotations

import array
import operator
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from types import CellType
from typing import Any

from torch import Tensor

#: What `Holder.back` returns where two readings are alike.
ALIKE = object()
_MISSING = object()
_PRIMITIVES = (bool, int, float, complex, str, bytes)


def same(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and isinstance(a, _PRIMITIVES) and a == b)


def _without_graph(value: Any) -> Any:
    """`value`, or the same memory without the activations behind it, which must not live on until the step."""
    return value.detach() if isinstance(value, Tensor) and value.grad_fn is not None else value


class Holder:
    """Something that keeps state.

    Attributes:
        path: its name for the user.
        owner: the object itself, kept alive.
        restorable: whether a reading can be written back; else it is only compared.
    """

    restorable = True

    def __init__(self, path: str, owner: Any):
        self.path, self.owner = path, owner

    @property
    def key(self) -> tuple[type, int]:
        """The same for two holders of the same thing."""
        return type(self), id(self.owner)

    def read(self) -> Any:
        raise NotImplementedError

    def back(self, before: Any, after: Any) -> Any:
        """What to `write` to get from the reading `after` to `before`; `ALIKE` if nothing."""
        raise NotImplementedError

    def write(self, back: Any) -> None:
        raise NotImplementedError

    def earlier(self, first: Any, then: Any) -> Any:
        """What to `write` to undo two changes at once, the later one of which `then` undoes."""
        return first

    def names(self, back: Any) -> list[str]:
        """What `back` changes, for the user."""
        return [self.path]


@dataclass(frozen=True)
class _Entries:
    """Values of some names; `whole`: there are no others, and this is their order."""

    values: dict[Any, Any]
    whole: bool = False


class Names(Holder):
    """Bindings of names to values: an object's attributes. Only those that changed are written back."""

    label = "{}.{}"

    def _space(self) -> dict[Any, Any]:
        return vars(self.owner)

    def read(self) -> dict[Any, Any]:
        return dict(self._space())

    def back(self, before: dict[Any, Any], after: dict[Any, Any]) -> Any:
        changed = {k: _without_graph(v) for k, v in before.items() if not same(v, after.get(k, _MISSING))}
        added = {k: _MISSING for k in after if k not in before}
        return _Entries(changed | added) if changed or added else ALIKE

    def write(self, back: _Entries) -> None:
        for name, value in back.values.items():
            if value is _MISSING:
                self._delete(name)
            else:
                self._set(name, value)

    def _set(self, name: Any, value: Any) -> None:
        self._space()[name] = value

    def _delete(self, name: Any) -> None:
        self._space().pop(name, None)

    def earlier(self, first: _Entries, then: _Entries) -> _Entries:
        return first if first.whole else _Entries(then.values | first.values, then.whole)

    def names(self, back: _Entries) -> list[str]:
        return [self.label.format(self.path, name) for name in back.values]


class Items(Names):
    """A dict, with its order where keys came or went."""

    label = "{}[{!r}]"

    def _space(self) -> dict[Any, Any]:
        return self.owner

    def back(self, before: dict[Any, Any], after: dict[Any, Any]) -> Any:
        back = super().back(before, after)
        if list(before) == list(after):
            return back
        return _Entries({k: _without_graph(v) for k, v in before.items()}, whole=True)

    def write(self, back: _Entries) -> None:
        kind: Any = OrderedDict if isinstance(self.owner, OrderedDict) else dict  # whatever a subclass does with items
        if back.whole:
            kind.clear(self.owner)
        for name, value in back.values.items():
            if value is not _MISSING:
                kind.__setitem__(self.owner, name, value)

    def names(self, back: _Entries) -> list[str]:
        return [self.path] if back.whole else super().names(back)


class Slots(Names):
    def _space(self) -> dict[Any, Any]:
        slots = {s for c in type(self.owner).__mro__ for s in _strings(vars(c).get("__slots__", ()))}
        found = {s: getattr(self.owner, s, _MISSING) for s in slots if s not in ("__dict__", "__weakref__")}
        return {k: v for k, v in found.items() if v is not _MISSING}

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self.owner, name, value)

    def _delete(self, name: str) -> None:
        object.__delattr__(self.owner, name)


def _strings(names: str | Sequence[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


class Variable(Names):
    """A variable of an enclosing function."""

    label = "{}"

    def _space(self) -> dict[Any, Any]:
        cell: CellType = self.owner
        try:
            return {"value": cell.cell_contents}
        except ValueError:  # not assigned yet
            return {}

    def _set(self, name: str, value: Any) -> None:
        self.owner.cell_contents = value

    def _delete(self, name: str) -> None:
        del self.owner.cell_contents


class Globals(Names):
    """The variables of a module that a function names."""

    def __init__(self, path: str, owner: Any, names: frozenset[str]):
        super().__init__(path, owner)
        self._names = names

    @property
    def key(self) -> tuple[type, int]:
        return type(self), hash((id(self.owner), self._names))

    def read(self) -> dict[Any, Any]:
        return {name: self.owner[name] for name in self._names if name in self.owner}

    def _space(self) -> dict[Any, Any]:
        return self.owner


class ClassAttributes(Globals):
    """A class's own values, which its instances may count in."""

    def read(self) -> dict[Any, Any]:
        space = vars(self.owner)
        return {name: space[name] for name in self._names if name in space}

    def _set(self, name: str, value: Any) -> None:
        setattr(self.owner, name, value)

    def _delete(self, name: str) -> None:
        delattr(self.owner, name)


class Elements(Holder):
    """A list, deque, set, bytearray or array."""

    def read(self) -> list[Any]:
        return list(self.owner)

    def back(self, before: list[Any], after: list[Any]) -> Any:
        if len(before) == len(after) and not any(map(operator.is_not, before, after)):
            return ALIKE
        return [_without_graph(value) for value in before]

    def write(self, back: list[Any]) -> None:
        if isinstance(self.owner, list):
            list.__setitem__(self.owner, slice(None), back)
        elif isinstance(self.owner, set):
            set.clear(self.owner)
            set.update(self.owner, back)
        elif isinstance(self.owner, deque):
            deque.clear(self.owner)
            deque.extend(self.owner, back)
        elif isinstance(self.owner, bytearray):
            self.owner[:] = bytes(back)
        else:
            self.owner[:] = array.array(self.owner.typecode, back)


class Gradient(Holder):
    """A parameter's gradient, which a forward has no business with."""

    restorable = False

    def read(self) -> tuple[Any, int]:
        grad = self.owner.grad
        return grad, 0 if grad is None else grad._version

    def back(self, before: tuple[Any, int], after: tuple[Any, int]) -> Any:
        return ALIKE if before[0] is after[0] and before[1] == after[1] else before
