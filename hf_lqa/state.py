"""State taken down before a forward pass, compared after it, and put back."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from typing import Any

from .holders import ALIKE, Holder
from .slopes import local_part
from .values import Values, differing


@dataclass(frozen=True)
class Changes:
    """What a forward changed.

    Attributes:
        backs: by `Holder.key`: the holder, and what to write to undo the change.
        lost: tensors that were not copied, and so cannot be put back.
        obstacles: what never can be, in words.
    """

    backs: dict[Any, tuple[Holder, Any]] = field(default_factory=dict)
    lost: list[Values] = field(default_factory=list)
    obstacles: list[str] = field(default_factory=list)

    def before(self, later: Changes) -> Changes:
        """What undoes these changes and the ones after them."""
        backs = dict(later.backs)
        for key, (holder, back) in self.backs.items():
            backs[key] = holder, (holder.earlier(back, backs[key][1]) if key in backs else back)
        return Changes(backs)

    def undo(self, but: Container[int]) -> None:
        """Write what was there before, but not to the objects with the ids `but`."""
        for holder, back in self.backs.values():
            if id(holder.owner) not in but:
                holder.write(back)

    def names(self) -> list[str]:
        found = [name for holder, back in self.backs.values() for name in holder.names(back)]
        return [*dict.fromkeys([*found, *(v.path for v in self.lost), *self.obstacles])]


class Reading:
    """What `holders` held at one moment."""

    def __init__(self, holders: Sequence[Holder]):
        self._read = [(holder, holder.read()) for holder in holders]

    def changes(self, but: Container[int] = ()) -> Changes:
        """What has changed since, but for the objects with the ids `but`."""
        changes, pairs, unsure = Changes(), [], []
        for holder, before in self._read:
            if id(holder.owner) in but:
                continue
            if isinstance(holder, Values):
                unsure.append((holder, before))
                pairs.append((before, local_part(holder.owner).detach()))
                continue
            back = holder.back(before, holder.read())
            if back is not ALIKE and holder.restorable:
                changes.backs[holder.key] = holder, back
            elif back is not ALIKE:
                changes.obstacles.append(holder.path)
        different = differing(pairs)
        for (holder, before), (_, now), differs in zip(unsure, pairs, different, strict=True):
            if differs or before.memory.data_ptr() != now.data_ptr():
                if holder.restorable:
                    changes.backs[holder.key] = holder, before
                else:
                    changes.lost.append(holder)
        return changes

    def put_back(self, but: Container[int]) -> None:
        """Make it so again, but for the objects with the ids `but`."""
        for holder, before in self._read:
            if not holder.restorable or id(holder.owner) in but:
                continue
            if isinstance(holder, Values):
                if not holder.untouched(before):
                    holder.write(before)
            elif (back := holder.back(before, holder.read())) is not ALIKE:
                holder.write(back)
