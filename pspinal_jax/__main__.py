"""The command line's entry: finds the command, and turns errors into one line and an exit status."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Any, NoReturn

from pspinal_jax import __version__
from pspinal_jax.commands import naming_flags, table
from pspinal_jax.errors import PSpinalError, UsageError
from pspinal_jax.progress import Unfailing, say

SECONDS_TO_END = 20

COMMANDS = {
    "prepare": "download a data set, or take its raw files, and make it ready to train on",
    "train": "train a recipe, or go on with an unfinished run of it",
    "evaluate": "evaluate a run or an export: scores, classes, confusions, the surest mistakes",
    "report": "write a page about one or several runs",
    "predict": "classify images, or folders of them, with a run or an export",
    "suspects": "name the labels of a run's data that look wrong",
    "export": "write a run's classifier as one file that JAX alone runs",
    "extract-features": "write a backbone's features of images as an .npz file",
    "compare": "which head for this data: equal tuning, several seeds, intervals",
    "recipes": "list the recipes",
    "benchmark": "time a training step beside its peers",
    "doctor": "tell what is installed, what computes and where files lie",
    "gradients": "measure the gradients that reach the features and each layer, by depth",
}
MODULES = {"prepare": "data", "report": "evaluate", "suspects": "evaluate"}
MODULES |= {"extract-features": "train", "recipes": "train"}
MODULES |= dict.fromkeys(("export", "doctor", "gradients"), "tools")
"""Command -> the module of `commands` that holds its function, where that has another name."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in `argv` (by default the process's arguments) and return the exit status: 0, 1, 2 or 130."""
    args = list(sys.argv[1:] if argv is None else argv)
    with _standard_streams():
        try:
            with naming_flags():
                status = _dispatch(args)
            sys.stdout.flush()
            return status
        except BrokenPipeError:
            return 1
        except (PSpinalError, OSError) as error:
            say(f"error: {error}")
            return getattr(error, "exit_status", 1)
        except KeyboardInterrupt:
            say("error: interrupted")
            return 130  # as shells report a program that SIGINT ended
        except MemoryError as error:
            say(f"error: this machine's memory is not enough: {str(error) or 'nothing is left of it'}")
            return 1


def _dispatch(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help"):
        rows = table((f"  {name}", summary) for name, summary in COMMANDS.items())
        print(f"usage: pspinal-jax COMMAND ...\n\n{rows}\n\nCOMMAND --help tells its arguments.")
        print("\nexample: pspinal-jax train digits")
        return 0 if args else UsageError.exit_status
    if args[0] == "--version":
        print(f"pspinal-jax {__version__}")
        return 0
    name, *rest = args
    if name not in COMMANDS:
        raise UsageError(f"unknown command {name!r}; there are: {', '.join(COMMANDS)}")
    module = import_module(f"pspinal_jax.commands.{MODULES.get(name, name)}")
    return getattr(module, name.replace("-", "_"))(rest)


@contextlib.contextmanager
def _standard_streams() -> Iterator[None]:
    """In a `with`, no standard stream can end a command in the middle.

    Text that standard error cannot write is dropped, and standard output then raises OSError. Letters that the terminal
    lacks are written as escapes. Streams that the process was started without lead nowhere: otherwise the next file to
    be opened, a checkpoint for example, would get the output of native code.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # gets the lowest number that is free
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if getattr(sys.stdout, "errors", None) == "strict" and hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    error_stream, sys.stderr = sys.stderr, Unfailing(sys.stderr)
    try:
        yield
    finally:
        sys.stderr = error_stream
        for stream in (sys.stdout, sys.stderr):
            _leave(stream)


def _leave(stream: Any) -> None:
    """Flush `stream`; a stream that fails is sent nowhere, as Python would end with status 120."""
    try:
        if stream is not None:
            stream.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def command_line() -> NoReturn:
    """Run `main` and exit within `SECONDS_TO_END`: threads of libraries may wait at the end for what never comes."""
    status = main()
    timer = threading.Timer(SECONDS_TO_END, os._exit, [status])
    timer.daemon = True
    timer.start()
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(2 * SECONDS_TO_END)  # for a thread of another language that does not let Python go on
    sys.exit(status)


if __name__ == "__main__":
    command_line()
