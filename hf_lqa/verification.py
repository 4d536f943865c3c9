"""Whether losses can be computed again: found out once in a run, by one replay at the weights of the recording."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

#: Under these names the findings stand among an optimizer's `counts`, and in its checkpoints: number of replays that
#: were compared with the recorded loss; 1 where they need autograd; 1 where there will be none in this run.
CHECKED, WITH_GRAD, GIVEN_UP = COUNTS = ("replays_checked", "replays_with_grad", "replays_given_up")
#: Rounding errors by which a replay may differ: up to so many a fit takes a second difference for noise, too. A forward
#: without gradient may have other kernels (compilers, recurrent layers, half precision); all else agrees bit for bit.
_TOLERANCE = 4.0


def hindrances(closure: Any, counts: dict[str, int]) -> tuple[float, ...]:
    """(1 if the closure's forward did what cannot be replayed, 1 if it cannot be replayed this time), else 0.

    Nothing of a closure that does not look at its forward.
    """
    if not hasattr(closure, "obstacle"):
        return ()
    if counts[WITH_GRAD]:
        closure.with_grad = True
    return float(closure.obstacle is not None), float(not closure.complete)


def can_replay(
    closure: Any,
    hindered: Sequence[float],
    counts: dict[str, int],
    read: Callable[..., list[float]],
    noise: float,
    needed: bool,
) -> bool:
    """Whether `closure` gives the loss at other weights, by all that is known so far. The same on all ranks.

    Args:
        closure: as `LQA.step` gets it, at the weights of the recording.
        hindered: what `hindrances` returned, averaged over ranks.
        counts: the optimizer's; what is found out is kept there.
        read: means over ranks of 0-dim tensors and numbers.
        noise: rounding error of a loss relative to its value.
        needed: whether there is no going on without.

    Raises:
        ValueError: it does not, and it is needed.
    """
    if counts[GIVEN_UP]:
        return False
    obstructed, incomplete = hindered or (0.0, 0.0)
    if obstructed:
        reason = f"the forward did what cannot be done again without a trace: {_named(closure.obstacle)}"
    elif incomplete:
        return False
    elif counts[CHECKED] or getattr(closure, "loss", None) is None:
        return True
    elif (difference := _difference(closure, read, noise)) is None:
        counts[CHECKED], counts[WITH_GRAD] = 1, int(getattr(closure, "with_grad", False))
        return True
    else:
        reason = difference
    _give_up(reason, needed)
    counts[CHECKED] = counts[GIVEN_UP] = 1
    return False


def _difference(closure: Any, read: Callable[..., list[float]], noise: float) -> str | None:
    """What a replay at the origin does otherwise than training did; `None` if nothing."""
    replay = getattr(closure, "check", closure)
    allowed = _TOLERANCE * noise * abs(closure.loss)

    def compare() -> tuple[float, bool, bool, bool]:
        again = replay()
        flags = float(bool(_traces(closure))), float(getattr(closure, "with_grad", True) is False)
        differs, traced, off = read(~((again - closure.loss).abs() <= allowed), *flags)
        return float(again), bool(differs), bool(traced), bool(off)

    again, differs, traced, without_autograd = compare()
    if differs and without_autograd:
        # Some compute a part of the loss only where autograd is on, and do not say so.
        closure.with_grad = True
        again, differs, traced, _ = compare()
    if not (differs or traced):
        return None
    found = ", ".join(_traces(closure))
    if traced:
        return f"a replay does not leave as it was {_named(found)}"
    unseen = ", ".join(getattr(closure, "unseen", ()))
    where = f"perhaps {unseen}, or something" if unseen else "something"
    return (
        f"at the same weights a replay gave {again:.9g} instead of {float(closure.loss):.9g}; {where} outside"
        " the model and the Trainer has changed in between"
    )


def _traces(closure: Any) -> list[str]:
    return getattr(closure, "traces", [])


def _named(what: str | None) -> str:
    return what or "something on another rank"


def _give_up(reason: str, needed: bool) -> None:
    message = f"The loss cannot be replayed for probes: {reason}."
    if needed:
        raise ValueError(
            f"{message} The rule 'paper' (--optim lqa_paper) steps by replayed losses alone: use --optim lqa, which"
            " can do without them, or move that out of the forward and of compute_loss"
        )
    warnings.warn(
        f"{message} Training goes on without them: the step size then comes from gradients alone. To have probes, move"
        " that out of the forward and of compute_loss, e.g. to training_step or a callback",
        stacklevel=2,
    )
