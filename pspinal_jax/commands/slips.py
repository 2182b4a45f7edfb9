"""What was meant by a flag that does not exist, or a word that belongs to none. It is said, and never done."""

import difflib
import itertools
import shlex
from collections.abc import Sequence

from pspinal_jax.commands.flags import flags_of

SHORT_FORMS = {
    "aug": "augment",
    "arch": "backbone",
    "b": "batch-size",
    "batch": "batch-size",
    "bs": "batch-size",
    "classes": "num-classes",
    "clip": "gradient-clip",
    "clip-grad": "gradient-clip",
    "data": "data.path",
    "data-path": "data.path",
    "depth": "num-layers",
    "dropout": "dropout-rate",
    "e": "epochs",
    "early-stopping": "patience",
    "ema": "ema-decay",
    "freeze-backbone": "freeze",
    "img-size": "image-size",
    "imgsz": "image-size",
    "j": "workers",
    "jitter": "color-jitter",
    "layers": "num-layers",
    "lr": "learning-rate",
    "model": "model.backbone",
    "num-workers": "workers",
    "o": "output",
    "opt": "optimizer.name",
    "optim": "optimizer.name",
    "optimizer": "optimizer.name",
    "out": "output",
    "output": "workdir",
    "output-dir": "workdir",
    "precision": "dtype",
    "pretrained": "model.weights",
    "resume": "workdir",
    "save-dir": "workdir",
    "sched": "schedule",
    "scheduler": "schedule",
    "seeds": "num-seeds",
    "size": "image-size",
    "smoothing": "label-smoothing",
    "topk": "top",
    "val-split": "validation-fraction",
    "warmup": "warmup-epochs",
    "wd": "weight-decay",
    "width": "layer-width",
}
"""What other trainers call it -> a flag, or the last part of one; where a command has no such flag it means nothing."""


def what_was_meant(arguments_class: type, unknown: Sequence[str], args: Sequence[str]) -> str:
    """One sentence about the first of the words in `args` that are `unknown` to the dataclass `arguments_class`.

    Returns:
      What is wrong, and the flag that was meant, with its value, where there is one; without a full stop.
    """
    flags = list(flags_of(arguments_class))
    switches = {flag.name for flag in flags if flag.hint is bool}
    opposites = {_off(name) for name in switches}
    names = {flag.name for flag in flags} | opposites
    word = unknown[0]
    if not _is_flag(word) and "=" not in word:
        return _stray(word, args, names, switches | opposites)
    flag, equals, value = word.partition("=")
    if not equals and len(unknown) > 1 and not _is_flag(unknown[1]) and (flag, unknown[1]) in itertools.pairwise(args):
        value, equals = unknown[1], " "
    meant = _meant(flag.lstrip("-").replace("_", "-").lower(), names)
    said = f"there is no flag {flag}" if _is_flag(word) else f"{word} belongs to no flag"
    if not meant:
        return said
    ending = f" {shlex.quote(value)}" if equals and len(meant) == 1 and meant[0] not in switches | opposites else ""
    return f"{said}; did you mean {' or '.join(f'--{name}' for name in meant)}{ending}?"


def _meant(word: str, names: set[str]) -> list[str]:
    """The flags in `names` that may be meant by `word`: it itself, by short form, by last part, by likeness."""
    if word in names:
        return [word]
    last = word.rpartition(".")[2]
    aliases = [SHORT_FORMS[part] for part in dict.fromkeys((word, last)) if part in SHORT_FORMS]
    aliases += [SHORT_FORMS[alias] for alias in aliases if alias in SHORT_FORMS]
    for tried in dict.fromkeys((*aliases, last)):
        found = [tried] if tried in names else sorted(name for name in names if tried == name.rpartition(".")[2])
        if found:
            return found
    if len(word) < 3:
        return []
    return difflib.get_close_matches(word, names, n=1, cutoff=0.65) or _like_last_part(last, names)


def _like_last_part(last: str, names: set[str]) -> list[str]:
    parts = {name.rpartition(".")[2] for name in names}
    close = difflib.get_close_matches(last, parts, n=1, cutoff=0.65)
    return sorted(name for name in names if name.rpartition(".")[2] in close)


def _stray(word: str, args: Sequence[str], names: set[str], switches: set[str]) -> str:
    """About a word that stands where no value is expected."""
    before = args[args.index(word) - 1].removeprefix("--").replace("_", "-") if args.index(word) else ""
    if before in switches:
        return f"--{before} takes no value, got {word}; leave it out, or write --{_off(before)}"
    given = any(arg.partition("=")[0] == "--data.path" for arg in args)
    if "data.path" in names and not given and not _is_number(word):
        return f"{shlex.quote(word)} belongs to no flag; did you mean --data.path {shlex.quote(word)}?"
    return f"{shlex.quote(word)} belongs to no flag; a value with spaces in it stands in quotes"


def _off(switch: str) -> str:
    """The flag that switches off what `switch` switches on, and the other way round."""
    front, dot, last = switch.rpartition(".")
    return front + dot + (last.removeprefix("no-") if last.startswith("no-") else f"no-{last}")


def _is_flag(word: str) -> bool:
    return len(word) > 1 and word.startswith("-") and not _is_number(word)


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
