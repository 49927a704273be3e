"""The names of a model's classes: those that the config lists, or its own."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence, Set
from typing import Any

from torch import nn

from gradrun.config.data import DataConfig
from gradrun.core.errors import ConfigError
from gradrun.core.units import list_names
from gradrun.models.loaded import LoadedModel
from gradrun.results.result import Statement

_LISTED = 4
"""Names in a message."""

_SEPARATOR = re.compile(r"[\s_-]+")


def with_class_names(model: LoadedModel, data: DataConfig | None) -> LoadedModel:
    """Return the model with the class names of a config, and a note about their source.

    Raises:
        ConfigError: data.classes contradicts the names that the model provides.
    """
    listed: Sequence[str] = getattr(data, "classes", None) or ()
    own = model.classes
    if listed and own and len(listed) != len(own):
        raise ConfigError(
            f"{len(listed)} classes are listed, but the model has {len(own)} "
            f"({shorten(own)}); list all of them in the model's order, or remove data.classes",
            "data.classes",
        )
    check_order(listed, own)
    names = tuple(listed or own)
    if not names:
        return model
    origin = "data.classes" if listed else "the model's"
    if listed and own and not same_names(listed, own):
        origin += f", instead of {shorten(own)} in the model"
    note = Statement(topic="classes", text=f"{list_names(names)} ({len(names):,}, {origin})")
    return model.replace(classes=names, notes=(*model.notes, note))


def check_order(names: Sequence[str], own: Sequence[str]) -> None:
    """Reject names that the model has too, but for classes with other numbers.

    Case, spaces, hyphens and underscores are ignored. Lists of different lengths are not compared.

    Args:
        names: of the labels, or of data.classes.
        own: the names of the model, in order.

    Raises:
        ConfigError: a name is that of another class of the model.
    """
    if len(names) != len(own):
        return
    given, known = _comparable(names, own)
    moved = [i for i, name in enumerate(given) if name in known and known[i] != name]
    if not moved:
        return
    if sorted(given) == sorted(known):
        ordered = ", ".join(names[given.index(name)] for name in known)
        text = f"the model has the same classes in another order; set data.classes: [{ordered}]"
        raise ConfigError(text, "data.classes")
    i = moved[0]
    raise ConfigError(
        f"{names[i]!r:.60} is class {known.index(given[i])} of the model ({shorten(own)}), but "
        f"class {i} of the labels ({shorten(names)}); set data.classes to the names of the "
        "labels, in the order of the model's classes",
        "data.classes",
    )


def same_names(names: Sequence[str], own: Sequence[str]) -> bool:
    """Whether two lists name the same classes, except for case, spaces, hyphens and underscores."""
    given, known = _comparable(names, own)
    return given == known


def _comparable(*lists: Sequence[str]) -> list[list[str]]:
    """The names as they are compared: exactly, if they would not be distinct otherwise."""
    plain = [[" ".join(_SEPARATOR.split(name.casefold().strip())) for name in n] for n in lists]
    distinct = all(len({*names}) == len(names) for names in plain)
    return plain if distinct else [[*names] for names in lists]


def shorten(names: Sequence[str]) -> str:
    """Return the first names as text, for a message."""
    return list_names(names, _LISTED)


def names_of(module: nn.Module) -> tuple[str, ...]:
    """Return the names in a module's attribute class_names, in the order of the classes.

    It may be a sequence of names, or a mapping {index: name} or {name: index} with the indices
    from 0 on. Anything else gives ().
    """
    try:
        value: Any = getattr(module, "class_names", None)
        if isinstance(value, Mapping):
            inverted = all(isinstance(index, int) for index in value.values())
            pairs = [(b, a) if inverted else (a, b) for a, b in value.items()]
            numbered = {int(index): name for index, name in pairs}
            names = [numbered[number] for number in range(len(value))]
        elif isinstance(value, str | Set):
            return ()
        else:
            names = list(value)
    except Exception:  # a property of the user's module may raise anything
        return ()
    return tuple(map(str, names)) if all(isinstance(name, str) for name in names) else ()
