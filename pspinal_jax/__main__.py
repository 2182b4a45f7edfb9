"""The command line's entry: finds the command, and turns errors into one line and an exit status."""

import difflib
import sys
from collections.abc import Sequence
from importlib import import_module

from pspinal_jax import __version__
from pspinal_jax.errors import PSpinalError, UsageError

COMMANDS = {
    "prepare": "download a data set, or take its raw files, and make it ready to train on",
    "train": "train a recipe, or go on with an unfinished run of it",
    "evaluate": "evaluate a run: accuracy, accuracy by class, confusion matrix",
    "predict": "classify images with a run or an export",
    "export": "write a run's classifier as one file that JAX alone runs",
    "extract-features": "write a backbone's features of images as an .npz file",
    "recipes": "list the recipes",
    "benchmark": "time a training step beside its peers",
    "gradients": "measure the gradients that reach the features and each layer, by depth",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in `argv` (by default the process's arguments) and return the exit status: 0, 1, 2 or 130."""
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(args)
    except PSpinalError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    except BrokenPipeError:
        return 1
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130  # as shells report a program that SIGINT ended
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _dispatch(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help"):
        print(_usage())
        return 0 if args else UsageError.exit_status
    if args[0] == "--version":
        print(f"pspinal-jax {__version__}")
        return 0
    name, *rest = args
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.4)
        hint = f"did you mean {close[0]}? " if close else ""
        raise UsageError(f"unknown command {name!r}; {hint}There are: {', '.join(COMMANDS)}")
    return import_module(f"pspinal_jax.commands.{name.replace('-', '_')}").main(rest)


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name.ljust(width)}  {summary}" for name, summary in COMMANDS.items()]
    return "usage: pspinal-jax COMMAND ...\n\n" + "\n".join(lines) + "\n\nCOMMAND --help tells its arguments."


if __name__ == "__main__":
    sys.exit(main())
