"""Apply `--set key.path=value` texts, or a mapping of keys to values, to a config's data."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gradrun.config.schema import RunConfig
from gradrun.config.yaml_reader import Document, Key, SourceLocation, dotted, parse_yaml
from gradrun.core.suggest import suggest


@dataclass(frozen=True)
class OptionValue:
    """A command-line option that sets one key, such as --workers for engine.workers."""

    option: str
    key: str
    value: str | int
    typed: str
    """The value as the user wrote it."""


Overrides = Sequence[str | OptionValue] | Mapping[str, Any]


def apply_overrides(document: Document, overrides: Overrides, source_name: str) -> None:
    """Set keys in `document`, and add the problems found to it.

    Args:
        overrides: "key.path=value" texts and options, or dotted keys (or sections) and values. A
            mapping as value is merged into its section.
    """
    if isinstance(overrides, Mapping):
        for name, value in overrides.items():
            if name.partition(".")[0] not in RunConfig.model_fields:
                document.report(_unknown_argument(name, value), None)
                continue
            data = json.loads(json.dumps(value, default=str))
            location = SourceLocation("override", 1, 1, f"{name}={value!r:.100}")
            _merge(document, tuple(name.split(".")), data, location)
        return
    for override in overrides:
        if isinstance(override, OptionValue):
            line = f"{override.option} {override.typed}"
            location = SourceLocation(override.option, 1, len(override.option) + 2, line)
            _set(document, tuple(override.key.split(".")), override.value, location)
        else:
            _apply_text(document, override, source_name)


def _unknown_argument(name: str, value: Any) -> str:
    """Describe a keyword argument of a Python function that is not a section or a key below one."""
    sections = RunConfig.model_fields
    for section, field in sections.items():
        if name in getattr(field.annotation, "model_fields", {}):
            return f"{name} is a key of a section: pass {section}={{{name!r}: {value!r:.60}}}"
    return f"{name} is not an argument; {suggest(name, [*sections, 'mode', 'batch_size'])}"


def _apply_text(document: Document, text: str, source_name: str) -> None:
    name, equals, value_text = text.partition("=")
    key = tuple(name.strip().split("."))
    column = len(name) + 2
    parsed = Document(source_name)
    if not equals or not all(key):
        location = SourceLocation(source_name, 1, 1, text)
        parsed.report("expected key.path=value, such as run.mode=no_grad", location)
    elif value_text.strip() == "-":  # standard input; an empty list item in YAML
        parsed.data = "-"
    else:
        parse_yaml(" " * (column - 1) + value_text, parsed, text)
    document.problems += parsed.problems
    if not parsed.problems:
        _set(document, key, parsed.data, SourceLocation(source_name, 1, column, text))


def _merge(document: Document, key: Key, value: Any, location: SourceLocation) -> None:
    """Set a key; merge a mapping into an existing section."""
    old = document.data
    for part in key:
        old = old.get(part) if isinstance(old, dict) else None
    if isinstance(value, dict) and isinstance(old, dict):
        for name, item in value.items():
            _merge(document, (*key, name), item, location)
    else:
        _set(document, key, value, location)


def _set(document: Document, key: Key, value: Any, location: SourceLocation) -> None:
    section, locations = document.data, document.locations
    for depth, part in enumerate(key[:-1]):
        if part not in section:
            locations.keys[key[: depth + 1]] = location
        section = section.setdefault(part, {})
        if not isinstance(section, dict):
            parent = dotted(key[: depth + 1])
            text = f"{dotted(key)}: {parent} is not a section; cannot set keys below it"
            document.report(text, location)
            return
    section[key[-1]] = value
    for table in (locations.keys, locations.values):
        for stale in [known for known in table if known[: len(key)] == key]:
            del table[stale]
        table[key] = location
