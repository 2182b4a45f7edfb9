"""The entry point of the command line: runs a command, and turns errors into one line and an exit status."""

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
    "prepare": "download a data set, or read its raw files, and convert it for training",
    "train": "train a recipe, or resume an unfinished run",
    "evaluate": "score a run or an export: accuracy, classes, confusions, mistakes",
    "report": "write an HTML page about one or more runs",
    "predict": "classify images, or folders of images, with a run or an export",
    "suspects": "list the labels of a run's data that look wrong",
    "export": "write a run's classifier as one file that only needs JAX",
    "extract-features": "write a backbone's features of images to an .npz file",
    "compare": "compare heads and baselines on your data, tuned alike, with intervals",
    "recipes": "list the recipes",
    "benchmark": "time training steps and more, compared with PyTorch",
    "doctor": "show versions, devices, caches and missing packages",
    "gradients": "measure gradients at the features and at each layer, by depth",
}
MODULES = {"prepare": "data", "report": "evaluate", "suspects": "evaluate"}
MODULES |= {"extract-features": "train", "recipes": "train"}
MODULES |= dict.fromkeys(("export", "doctor", "gradients"), "tools")
"""Command -> module of `commands` with its function, if the module has another name."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in `argv`, by default the process's arguments, and return the exit status: 0, 1, 2 or 130."""
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
            say(f"error: out of memory: {str(error) or 'this machine has no memory left'}")
            return 1


def _dispatch(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help"):
        rows = table((f"  {name}", summary) for name, summary in COMMANDS.items())
        print(f"usage: pspinal-jax COMMAND ...\n\n{rows}\n\nFor a command's arguments: pspinal-jax COMMAND --help")
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
    """A context in which a broken standard stream cannot end a command halfway.

    Text that standard error cannot write is dropped, while standard output raises OSError. Characters that the terminal
    lacks are escaped. Missing streams are opened on the null device. Otherwise the next file to be opened, such as a
    checkpoint, would receive the output of native code.
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
    """Flush `stream`; point a stream that fails at the null device, since Python would exit with status 120."""
    try:
        if stream is not None:
            stream.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def command_line() -> NoReturn:
    """Run `main` and exit within `SECONDS_TO_END`, since threads of libraries may block the exit."""
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
