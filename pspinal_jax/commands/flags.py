"""The flags that a dataclass stands for, and the most used of them as a help that fits on a page or two."""

import dataclasses
import operator
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import docstring_parser
import tyro


@dataclasses.dataclass(frozen=True)
class Flag:
    """A flag of the command line."""

    name: str
    """Without the dashes in front: data.num-classes."""
    attribute: str
    """Where the parsed arguments hold it: recipe.data.num_classes."""
    hint: Any
    """Its type."""
    owner: type
    """The dataclass that it is a field of."""


def flags_of(arguments_class: type, prefix: str = "", attribute: str = "") -> Iterator[Flag]:
    """All flags that tyro makes of the dataclass and of those in it; positional arguments are none."""
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


def most_used(arguments_class: type, groups: Mapping[str, Sequence[str]], default: Any) -> tuple[type, Any, int]:
    """A dataclass whose help shows some flags of `arguments_class`, by groups and in their order.

    Args:
      arguments_class: the dataclass that a command parses.
      groups: heading -> names of flags, as `Flag.name` has them.
      default: an instance of `arguments_class`, whose values the help tells as defaults.

    Returns:
      The dataclass, to print the help of, an instance of it, and how many flags it leaves out.

    Raises:
      KeyError: if there is no such flag.
    """
    known = {flag.name: flag for flag in flags_of(arguments_class)}
    parts = {
        group: dataclasses.make_dataclass(group, [_field(known[name], default) for name in names], frozen=True)
        for group, names in groups.items()
    }
    view = dataclasses.make_dataclass(
        "MostUsed", [(group, part, dataclasses.field(default_factory=part)) for group, part in parts.items()]
    )
    return view, view(), len(known) - sum(map(len, groups.values()))


def _field(flag: Flag, default: Any) -> tuple[str, Any, Any]:
    shown = tyro.conf.arg(name=flag.name, prefix_name=False, help=_told(flag))
    name = re.sub(r"\W", "_", flag.name)
    return name, Annotated[flag.hint, shown], operator.attrgetter(flag.attribute)(default)


def _told(flag: Flag) -> str:
    """What the dataclass says of the field: all of it where it explains choices, else its first sentence."""
    documented = docstring_parser.parse_from_object(flag.owner).params
    field = flag.attribute.rpartition(".")[2]
    text = next((" ".join((each.description or "").split()) for each in documented if each.arg_name == field), "")
    if typing.get_origin(flag.hint) is Literal:
        return text
    return re.split(r"(?<=[\w)'])\.\s", text)[0].rstrip(".") + "."
