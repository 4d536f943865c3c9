"""``python -m hf_lqa SCRIPT`` or ``-m MODULE``: runs any Trainer program with ``--optim lqa`` among its choices."""

from __future__ import annotations

import builtins
import functools
import gc
import inspect
import os
import runpy
import sys
import types
from collections.abc import Callable
from importlib.machinery import SourceFileLoader
from typing import Any, NoReturn

import torch.distributed
from transformers import trainer as transformers_trainer

from .optimizer import LQA
from .options import NAMES
from .trainer import LQATrainerMixin

USAGE = "usage: python -m hf_lqa SCRIPT [ARGS...]\n       python -m hf_lqa -m MODULE [ARGS...]"


class _Swapped(LQATrainerMixin):
    """The mixin for a script's own Trainer class. Unlike its parent, it makes subclasses that no hook hears of."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        pass


def patch_trainer() -> None:
    """Let every Trainer that is built with one of LQA's names become an `LQATrainerMixin` first.

    ``Trainer.__init__`` is patched in place, because replacing the class would miss `Seq2SeqTrainer`, a script's own
    subclasses, and names already imported. Trainers with another ``optim`` stay what they are.
    """
    original = transformers_trainer.Trainer.__init__
    signature = inspect.signature(original)

    @functools.wraps(original)
    def __init__(self: Any, /, *args: Any, **kwargs: Any) -> None:
        try:
            given = signature.bind(self, *args, **kwargs).arguments
        except TypeError:
            given = {}  # `original` says it in its own words
        if _is_ours(given) and not isinstance(self, LQATrainerMixin):
            own_class: Any = type(self)
            self.__class__ = _with_mixin(own_class)
        original(self, *args, **kwargs)
        if isinstance(self, _Swapped):
            self._lqa_setup()

    # What `inspect.getfullargspec` reads: it does not look for what is wrapped.
    __init__.__signature__ = signature  # type: ignore[attr-defined]
    transformers_trainer.Trainer.__init__ = __init__


def _is_ours(given: dict[str, Any]) -> bool:
    """Whether a Trainer with these arguments, of whatever types, is one for LQA."""
    optim = getattr(given.get("args"), "optim", None)
    optimizers = given.get("optimizers")
    has_lqa = isinstance(optimizers, (tuple, list)) and any(isinstance(x, LQA) for x in optimizers)
    return has_lqa or str(getattr(optim, "value", optim)) in NAMES


@functools.cache
def _with_mixin(cls: Any) -> type:
    """`cls` with the mixin before it, and in all else what it is: its name, its source, its signature."""
    kept = ("__module__", "__qualname__", "__doc__", "__firstlineno__")
    same = {name: vars(cls)[name] for name in kept if name in vars(cls)}
    return types.new_class(
        cls.__name__, (_Swapped, cls), exec_body=lambda names: names.update(same, __init__=cls.__init__)
    )


def _new_main() -> types.ModuleType:
    """A module ``__main__`` as the interpreter makes it, in place of the runner's own."""
    main = types.ModuleType("__main__")
    vars(main).update(__builtins__=builtins)
    if "__annotations__" in vars(sys.modules["__main__"]):  # before Python 3.14
        vars(main).update(__annotations__={})
    sys.modules["__main__"] = main
    return main


def run_script(path: str, argv: list[str]) -> None:
    """Run a file as ``python SCRIPT`` does: ``__main__``, ``sys.argv``, ``sys.path[0]``."""
    sys.argv = [path, *argv]
    path = os.path.join(os.getcwd(), path)  # as the interpreter does, which leaves a ".." in
    loader = SourceFileLoader("__main__", path)
    try:
        code = loader.source_to_code(loader.get_data(path), path)
    except (SyntaxError, ValueError) as error:
        raise error.with_traceback(None)  # noqa: B904 - the same error, which names the place itself
    main = _new_main()
    vars(main).update(__file__=path, __loader__=loader, __cached__=None)
    if not (sys.flags.isolated or getattr(sys.flags, "safe_path", False)):
        sys.path[0] = os.path.dirname(os.path.realpath(path))
    exec(code, vars(main))


def run_module(name: str, argv: list[str]) -> None:
    """Run a module as ``python -m MODULE`` does, by what the interpreter itself calls for it.

    `runpy.run_module` would put ``sys.argv`` and ``__main__`` back before what runs at exit, and raise where no module
    is found.
    """
    sys.argv = ["-m", *argv]
    _new_main()
    runpy._run_module_as_main(name)  # type: ignore[attr-defined]


def _as_without_runner(run: Callable[[str, list[str]], None], name: str, argv: list[str]) -> None:
    """``run(name, argv)``, with the tracebacks that the program has by itself."""
    try:
        run(name, argv)
    except BaseException as error:
        if isinstance(error, SystemExit) and error.code in (None, 0):
            error.__traceback__ = None  # its frames hold the Trainer
            return
        _leave_out_runner(error, set())
        # The program's own by now, if it has set one. It gets no frames from above the program.
        hook, own = sys.excepthook, error.__traceback__
        sys.excepthook = lambda kind, error, _: hook(kind, error.with_traceback(own), own)
        raise


def _leave_out_runner(error: BaseException, done: set[int]) -> None:
    """Take the runner's frames out of the traceback of `error`, and of all errors that led to it."""
    done.add(id(error))
    entries = []
    entry = error.__traceback__
    while entry is not None:
        if entry.tb_frame.f_code.co_filename != main.__code__.co_filename:
            entries.append(entry)
        entry = entry.tb_next
    for entry, following in zip(entries, [*entries, None][1:], strict=True):
        entry.tb_next = following
    error.__traceback__ = entries[0] if entries else None
    for other in (error.__cause__, error.__context__, *getattr(error, "exceptions", ())):
        if isinstance(other, BaseException) and id(other) not in done:
            _leave_out_runner(other, done)


def _end_process_group() -> None:
    """To be called where the program has ended well: else other processes may wait for this one, which has to end."""
    # Left to the interpreter's exit, gloo's threads abort the process or hang: they need the interpreter's lock to let
    # go of their last tensors. Destroying the group waits for them without it, but only where nothing else holds the
    # group, as the DDP model in a Trainer's reference cycle does.
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        gc.collect()
        torch.distributed.destroy_process_group()


def _usage_error(message: str) -> NoReturn:
    print(f"{USAGE}\npython -m hf_lqa: error: {message}", file=sys.stderr)
    sys.exit(2)


def main() -> None:
    first, *rest = sys.argv[1:] or [""]
    if first in ("-h", "--help"):
        print(USAGE)
        return
    run: Callable[[str, list[str]], None]
    if first.startswith("-m"):
        name, *rest = [first[2:], *rest] if first != "-m" else rest or [""]
        if not name:
            _usage_error("no MODULE given after -m")
        if (name.endswith(".py") or os.sep in name) and os.path.isfile(name):
            print(f"python -m hf_lqa: {name!r} is a file: to run it, leave out -m", file=sys.stderr)
        run = run_module
    else:
        name, run = first, run_script
        if not name or name.startswith("-"):
            _usage_error(f"no SCRIPT given{name and f' before {name!r}'}")
        if not os.path.isfile(name):
            _usage_error(f"SCRIPT={name!r} is not a file")
    patch_trainer()
    _as_without_runner(run, name, rest)
    _end_process_group()


if __name__ == "__main__":
    main()
