"""Parsing of flags with tyro, with aliases, a short help, and errors of one line."""

import contextlib
import dataclasses
import functools
import io
import operator
import os
import re
import shutil
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import docstring_parser
import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from pspinal_jax.commands import FLAGS
from pspinal_jax.errors import UsageError
from pspinal_jax.files import expanded
from pspinal_jax.progress import quiet_absl

HELP, HELP_ALL = ("-h", "--help"), "--help-all"
MIN_COLUMNS, MAX_COLUMNS = 40, 400

# fmt: off
ALIASES = {
    "b": "batch-size", "batch": "batch-size", "bs": "batch-size", "classes": "num-classes", "clip": "gradient-clip",
    "data": "data.path", "data-path": "data.path", "dropout": "dropout-rate", "e": "epochs", "ema": "ema-decay",
    "features": "num-features", "img-size": "image-size", "imgsz": "image-size", "j": "workers",
    "jitter": "color-jitter", "layers": "num-layers", "lr": "learning-rate", "model": "model.backbone",
    "num-workers": "workers", "o": "output", "opt": "optimizer.name", "optimizer": "optimizer.name", "out": "output",
    "output": "workdir", "output-dir": "workdir", "seeds": "num-seeds", "smoothing": "label-smoothing", "topk": "top",
    "val-split": "validation-fraction", "warmup": "warmup-epochs", "wd": "weight-decay", "width": "layer-width",
}
# fmt: on
"""Names in other trainers -> our flag, or the last part of one. They apply to commands with such a flag."""

_FRAME = re.compile(r"[╭╮╰╯│─]+|-{4,}")
_REGISTRY = ConstructorRegistry()


@_REGISTRY.primitive_rule
def _optional(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """Let a flag of type X or None take the word None too, and show X in the help, where tyro shows {None}|X."""
    options = [option for option in typing.get_args(info.type) if option is not types.NoneType]
    if len(options) == len(typing.get_args(info.type)):
        return None
    hint = functools.reduce(operator.or_, options)
    spec = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(hint, set(info.markers)))
    if not isinstance(spec, PrimitiveConstructorSpec) or spec.choices is not None:
        return None
    return dataclasses.replace(
        spec,
        metavar=re.sub(r"\{([^{},]*)\}", r"\1", spec.metavar),
        instance_from_str=lambda words: None if words == ["None"] else spec.instance_from_str(words),
        is_instance=lambda value: value is None or spec.is_instance(value),
        str_from_instance=lambda value: ["None"] if value is None else spec.str_from_instance(value),
    )


def _join_lines(arguments_class: type) -> None:
    """Give tyro the fields' docstrings without line breaks, since it keeps those before an indented line."""
    documented = {
        each.arg_name: each.description for each in docstring_parser.parse_from_object(arguments_class).params
    }
    for field in dataclasses.fields(arguments_class):
        if field.name in documented:
            text = " ".join((documented[field.name] or "").split())
            field.metadata = types.MappingProxyType({**field.metadata, "help": text})
        hint = typing.get_type_hints(arguments_class)[field.name]
        if dataclasses.is_dataclass(hint):
            _join_lines(typing.cast(type, hint))


@dataclasses.dataclass(frozen=True)
class NoArguments:
    """No arguments."""


@dataclasses.dataclass(frozen=True)
class Flag:
    """A flag of the command line."""

    name: str
    """Name without leading dashes: data.num-classes."""
    attribute: str
    """Attribute of the parsed arguments: recipe.data.num_classes."""
    hint: Any
    """Type."""
    owner: type
    """Dataclass with this field."""


def flags_of(arguments_class: type, prefix: str = "", attribute: str = "") -> Iterator[Flag]:
    """All flags that tyro makes of a dataclass and of dataclasses in it, without positional arguments."""
    for field, annotated in typing.get_type_hints(arguments_class, include_extras=True).items():
        hint, *extras = typing.get_args(annotated) if typing.get_origin(annotated) is Annotated else (annotated,)
        if tyro.conf.Suppress in extras or tyro.conf.Positional in extras:
            continue
        names = [extra.name for extra in extras if getattr(extra, "name", None) is not None]
        name = names[0] if names else field.replace("_", "-")
        if dataclasses.is_dataclass(hint):
            inner = f"{prefix}{name}." if name else prefix
            yield from flags_of(typing.cast(type, hint), inner, f"{attribute}{field}.")
        else:
            yield Flag(prefix + name, attribute + field, hint, arguments_class)


def parse(
    arguments_class: type,
    args: Sequence[str],
    command: str,
    example: str,
    *,
    description: str | None = None,
    default: Any = tyro.MISSING_NONPROP,
    groups: Mapping[str, Sequence[str]] | None = None,
) -> Any:
    """Parse `args` into an instance of the dataclass `arguments_class`; `--help` prints the flags and exits with 0.

    Args:
      arguments_class: a dataclass whose fields are the flags.
      args: the words after the command.
      command: the command.
      example: the rest of an example command line, which ends the help.
      description: what the command does; by default the docstring of the dataclass.
      default: an instance of `arguments_class`.
      groups: heading -> flags that `--help` shows under it, if only part of the flags is shown; `--help-all` shows all.

    Raises:
      UsageError: on an unknown flag (naming similar ones), a value of the wrong type or an unknown choice.
    """
    prog = f"pspinal-jax {command}"
    description = description or " ".join(str(arguments_class.__doc__).split())
    run_tyro = functools.partial(tyro.cli, prog=prog, description=description, registry=_REGISTRY)
    # On fewer than 6 columns tyro's help never ends.
    os.environ["COLUMNS"] = str(min(max(shutil.get_terminal_size().columns, MIN_COLUMNS), MAX_COLUMNS))
    if any(word in (*HELP, HELP_ALL) for word in args):
        footer = f"example: pspinal-jax {command} {example}".rstrip()
        if groups is not None and HELP_ALL not in args:
            arguments_class, others = _most_used(arguments_class, groups, default)
            default = arguments_class()
            footer = f"{others} more flags, and longer descriptions: {prog} {HELP_ALL}\n{footer}"
        _join_lines(arguments_class)
        with contextlib.ExitStack() as at_the_end:
            at_the_end.callback(print, footer)
            run_tyro(arguments_class, default=default, args=["--help"])
    flags = list(flags_of(arguments_class))
    for flag in flags:
        FLAGS[flag.name.replace("-", "_")] = FLAGS[flag.name.rpartition(".")[2].replace("-", "_")] = flag.name
    names = {flag.name for flag in flags}
    names |= {re.sub(r"([^.]+)$", r"no-\1", flag.name) for flag in flags if flag.hint is bool}
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            parsed = run_tyro(arguments_class, default=default, args=[_written_out(word, names) for word in args])
    except SystemExit:
        title, *lines = [" ".join(_FRAME.sub(" ", line).split()) for line in errors.getvalue().splitlines()]
        raise UsageError(" ".join(line for line in lines if line) or title) from None
    quiet_absl()  # the command is about to start
    return parsed


def _written_out(word: str, names: set[str]) -> str:
    """`word` with an alias, or the last part of a flag, replaced by the flag in `names`; and with ~ expanded."""
    flag, equals, value = word.partition("=") if word.startswith("-") else ("", "", word)
    value = str(expanded(value)) if value.startswith("~") else value
    name = flag.lstrip("-").replace("_", "-").lower()
    front, _, last = name.rpartition(".")
    alias = ALIASES.get(last, last)
    for meant in (alias, ALIASES.get(alias, alias), last):
        found = {each for each in names if meant in (each, each.rpartition(".")[2]) and each.startswith(front)}
        if name in names or len(found) == 1:
            return f"--{name if name in names else found.pop()}{equals}{value}"
    return f"{flag}{equals}{value}"


def _most_used(arguments_class: type, groups: Mapping[str, Sequence[str]], default: Any) -> tuple[type, int]:
    """A dataclass with the flags of `arguments_class` that are in `groups`, and the number of flags that are not."""
    known = {flag.name: flag for flag in flags_of(arguments_class)}
    view = []
    for group, names in groups.items():
        fields = [field_of(known[name], operator.attrgetter(known[name].attribute)(default)) for name in names]
        part = dataclasses.make_dataclass(group, fields, frozen=True)
        view.append((group, part, dataclasses.field(default_factory=part)))
    return dataclasses.make_dataclass("MostUsed", view), len(known) - sum(map(len, groups.values()))


def field_of(flag: Flag, default: Any) -> tuple[str, Any, Any]:
    """The flag as a field for `make_dataclass`. Its help is the first sentence, or everything if it has choices."""
    documented = docstring_parser.parse_from_object(flag.owner).params
    field = flag.attribute.rpartition(".")[2]
    text = next((" ".join((each.description or "").split()) for each in documented if each.arg_name == field), "")
    if typing.get_origin(flag.hint) is not Literal:
        text = re.split(r"(?<=[\w)'])\.\s", text)[0].rstrip(".") + "."
    shown = tyro.conf.arg(name=flag.name, prefix_name=False, help=text)
    return re.sub(r"\W", "_", flag.name), Annotated[flag.hint, shown], default
