"""``python -m hf_lqa SCRIPT [ARGS...]``: runs any Trainer script with ``--optim lqa`` among its choices."""

from __future__ import annotations

import functools
import gc
import inspect
import io
import os
import sys
import types
from importlib.machinery import SourceFileLoader
from typing import Any

import torch.distributed
from transformers import trainer as transformers_trainer

from .optimizer import LQA
from .options import parse_options
from .trainer import LQATrainerMixin

USAGE = "usage: python -m hf_lqa SCRIPT [ARGS...]"


def patch_trainer() -> None:
    """Let every Trainer that is built with one of LQA's names become an `LQATrainerMixin` first.

    ``Trainer.__init__`` is patched in place, because replacing the class would miss `Seq2SeqTrainer`, a script's own
    subclasses, and names already imported. Trainers with another ``optim`` stay what they are.
    """
    original = transformers_trainer.Trainer.__init__
    signature = inspect.signature(original)

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        given = signature.bind(self, *args, **kwargs).arguments
        training_args, (optimizer, _) = given.get("args"), given.get("optimizers") or (None, None)
        ours = isinstance(optimizer, LQA) or (training_args is not None and parse_options(training_args) is not None)
        if not ours or isinstance(self, LQATrainerMixin):
            original(self, *args, **kwargs)
            return
        self.__class__ = _with_mixin(type(self))
        original(self, *args, **kwargs)
        self._lqa_setup()

    transformers_trainer.Trainer.__init__ = __init__


def _with_mixin(cls: type) -> type:
    named = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (LQATrainerMixin, cls), named)


def run_script(path: str, argv: list[str]) -> None:
    """Run a file as the interpreter itself would: ``__main__``, ``sys.argv``, ``sys.path[0]``, tracebacks."""
    argv = [path, *argv]
    path = os.path.abspath(path)
    with io.open_code(path) as file:
        source = file.read()
    main = types.ModuleType("__main__")
    main.__file__, main.__loader__ = path, SourceFileLoader("__main__", path)
    sys.modules["__main__"] = main
    sys.argv = argv
    sys.path[0] = os.path.dirname(os.path.realpath(path))
    hook = sys.excepthook

    def without_runner(kind: Any, error: Any, traceback: Any) -> None:
        start = traceback
        while traceback is not None and traceback.tb_frame.f_code.co_filename != path:
            traceback = traceback.tb_next
        # None: the script could not be compiled, and a SyntaxError names the place itself.
        hook(kind, error.with_traceback(traceback if traceback or isinstance(error, SyntaxError) else start), traceback)

    sys.excepthook = without_runner
    exec(compile(source, path, "exec"), main.__dict__)


def main() -> None:
    if len(sys.argv) > 1 and sys.argv[1] in ("-h", "--help"):
        print(USAGE)
        return
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        print(f"{USAGE}\npython -m hf_lqa: error: no SCRIPT given", file=sys.stderr)
        sys.exit(2)
    script = sys.argv[1]
    if not os.path.isfile(script):
        print(f"{USAGE}\npython -m hf_lqa: error: SCRIPT={script!r} is not a file", file=sys.stderr)
        sys.exit(2)
    patch_trainer()
    run_script(script, sys.argv[2:])
    # Left to the interpreter's exit, gloo's threads abort the process or hang: they need the interpreter's lock to let
    # go of their last tensors. Destroying the group waits for them without it, but only where nothing else holds the
    # group, as the DDP model in a Trainer's reference cycle does.
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        gc.collect()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
