"""The names of a model's classes: those that the config lists, or its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Any

from torch import nn

from gradrun.config.data import DataConfig
from gradrun.core.errors import ConfigError
from gradrun.models.loaded import LoadedModel
from gradrun.results.result import Statement

_LISTED = 4


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
            f"({_shorten(own)}); list all of them in the model's order, or remove data.classes",
            "data.classes",
        )
    if listed and sorted(listed) == sorted(own) and [*listed] != [*own]:
        raise ConfigError(
            "the model has the same classes in another order; set data.classes: "
            f"[{', '.join(own)}]",
            "data.classes",
        )
    names = tuple(listed or own)
    if not names:
        return model
    origin = "data.classes" if listed else "the model's"
    note = Statement(topic="classes", text=f"{_shorten(names)} ({len(names):,}, {origin})")
    return model.replace(classes=names, notes=(*model.notes, note))


def _shorten(names: Sequence[str]) -> str:
    return ", ".join(names[:_LISTED]) + (", ..." if len(names) > _LISTED else "")


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
