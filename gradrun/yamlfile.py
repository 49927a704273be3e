"""YAML text to RunConfig, where every error has its file:line:col, all of them at once.

A config is data: tags, aliases that explode and files that are no text are errors, and nothing in
it can run code. Knows no torch; what the keys mean stands in config.py.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from gradrun.complaints import complaint
from gradrun.config import RunConfig
from gradrun.errors import ConfigError

Key = tuple[str | int, ...]

MAX_BYTES = 1024 * 1024
MAX_NODES = 20_000

_INT = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_WORDS: dict[str, Any] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys((".inf", ".Inf", "+.inf"), math.inf),
    **dict.fromkeys(("-.inf", "-.Inf"), -math.inf),
    **dict.fromkeys((".nan", ".NaN"), math.nan),
}


@dataclass(frozen=True)
class Place:
    """Where a key or a value was written; lines and columns count from 1."""

    file: str
    line: int
    column: int
    text: str
    """The line itself."""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}"


class Origin:
    """What was written and where: the plain data of a config and the place of each of its keys."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.data: Any = {}
        self.keys: dict[Key, Place] = {}
        self.values: dict[Key, Place] = {}
        self.problems: list[tuple[tuple[int, int], str]] = []

    def report(self, text: str, place: Place | None) -> None:
        """Note a problem, with the line and a caret under it where the place is known."""
        if place is None:
            self.problems.append(((0, 0), f"{self.name}  {text}"))
            return
        caret = f"    {place.text}\n    {' ' * (place.column - 1)}^"
        self.problems.append(((place.line, place.column), f"{place}  {text}\n{caret}"))

    def place(self, key: Key, *, of_key: bool = False) -> Place | None:
        """Where `key` was written, or the nearest section around it that was."""
        for length in range(len(key), -1, -1):
            part = key[:length]
            tables = (self.keys, self.values) if of_key else (self.values, self.keys)
            for table in tables:
                if part in table:
                    return table[part]
        return None

    def raise_problems(self) -> None:
        if self.problems:
            raise ConfigError("\n".join(text for _, text in sorted(self.problems)))


def load_config(
    source: str | Path | Mapping[str, Any],
    overrides: Sequence[str] | Mapping[str, Any] = (),
    *,
    output_base: Path | None = None,
) -> RunConfig:
    """Read, check and resolve a config.

    Args:
        source: a YAML file, or the same as a mapping.
        overrides: "key.path=value" texts, or a mapping of dotted keys (or sections) to values;
            checked like the file.
        output_base: the folder that a relative output.path starts from; default: the config's.

    Raises:
        ConfigError: with every problem found, each with its place.
    """
    if isinstance(source, Mapping):
        origin, base = Origin("config"), Path.cwd()
        origin.data = json.loads(json.dumps(source, default=str))
    else:
        origin, base = _read(Path(source)), Path(source).absolute().parent
    _override(origin, overrides)
    origin.raise_problems()
    try:
        config = RunConfig.model_validate_json(
            json.dumps(origin.data), context=_Paths(base, output_base or base)
        )
    except ValidationError as error:
        complaints = (complaint(problem, origin.data) for problem in error.errors())
        for found in dict.fromkeys(complaints):
            origin.report(
                f"{dotted(found.key)}: {found.text}" if found.key else found.text,
                origin.place(found.key, of_key=found.about_key),
            )
        origin.raise_problems()
    config._origin = origin
    return config


@contextmanager
def located(config: RunConfig) -> Iterator[None]:
    """Give a ConfigError from inside the block the place of the key that it names."""
    try:
        yield
    except ConfigError as error:
        if error.key and config._origin:
            key: Key = tuple(int(k) if k.isdigit() else k for k in error.key.split("."))
            config._origin.problems.clear()
            config._origin.report(f"{error.key}: {error}", config._origin.place(key))
            config._origin.raise_problems()
        raise


def dotted(key: Key) -> str:
    return ".".join(map(str, key))


class _Paths:
    """config.Paths: relative paths start at the config's folder, and input files exist."""

    def __init__(self, base: Path, output_base: Path) -> None:
        self.base, self.output_base = base, output_base

    def input_file(self, path: Path) -> Path:
        resolved = self.base / path.expanduser()
        if not resolved.exists():
            raise ValueError(f"there is no file {resolved}")
        if not resolved.is_file():
            raise ValueError(f"{resolved} is no file")
        return resolved

    def output_folder(self, path: Path) -> Path:
        if ".." in path.parts:
            raise ValueError(
                f"{str(path)!r} climbs out by '..'; a config writes below its own folder or to an "
                "absolute path, and --output FOLDER on the command line goes anywhere"
            )
        return self.output_base / path.expanduser()


# --- text -> data and places -------------------------------------------------------------------


def _read(path: Path) -> Origin:
    origin = Origin(str(path))
    try:
        if path.is_dir():
            raise ConfigError(f"{path}: a folder, where a YAML file is wanted")
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from error
    if len(raw) > MAX_BYTES:
        raise ConfigError(f"{path}: over 1 MiB, which is no config; data files go under data.path")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start} is not UTF-8 text") from error
    _parse(text, origin)
    if not origin.problems and not isinstance(origin.data, dict):
        origin.report(
            "a config is a mapping with the sections model, data, run and output"
            if text.strip()
            else "the file is empty; `gradrun init` writes a starter",
            origin.values.get(()),
        )
    origin.raise_problems()
    return origin


def _parse(text: str, origin: Origin) -> None:
    """Fill `origin` from YAML text; problems are noted there."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        reason = error.problem or error.context or "cannot be read"
        if "'\\t'" in reason:
            reason = "a tab; YAML is indented with spaces"
        origin.report(f"not YAML: {reason}", mark and _place(mark, text, origin.name))
    except yaml.YAMLError as error:
        origin.report(f"not YAML: {str(error).splitlines()[0]}", None)
    except RecursionError:
        origin.report("not a config: nested too deeply", None)
    else:
        if node is not None:
            _Walk(text, origin).start(node)


def _place(mark: yaml.Mark, text: str, name: str) -> Place:
    lines = text.splitlines() or [""]
    line = min(mark.line, len(lines) - 1)
    return Place(name, line + 1, mark.column + 1, lines[line].expandtabs(1))


class _Walk:
    """One walk over a YAML document, from nodes to plain data and the places of its keys."""

    def __init__(self, text: str, origin: Origin) -> None:
        self.text, self.origin = text, origin
        self.nodes = 0

    def start(self, node: yaml.Node) -> None:
        try:
            self.origin.data = self.value(node, (), ())
        except RecursionError:
            self.origin.report("not a config: nested too deeply", None)
        except OverflowError:
            self.origin.report("not a config: its aliases (*name) expand without end", None)

    def value(self, node: yaml.Node, key: Key, above: tuple[int, ...]) -> Any:
        self.nodes += 1
        # Sections within sections of aliases grow as a power: the bomb is cut, not expanded.
        if self.nodes > MAX_NODES or id(node) in above:
            raise OverflowError
        place = _place(node.start_mark, self.text, self.origin.name)
        self.origin.values[key] = place
        if not node.tag.startswith("tag:yaml.org,2002:") or "python/" in node.tag:
            self.origin.report(
                f"the tag {node.tag}: a config is data and takes no tags; write plain values", place
            )
            return None
        above = (*above, id(node))
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, key, above)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, (*key, i), above) for i, item in enumerate(node.value)]
        return self.scalar(node, key, place)

    def mapping(self, node: yaml.MappingNode, key: Key, above: tuple[int, ...]) -> dict[str, Any]:
        data: dict[str, Any] = {}
        for name_node, value_node in node.value:
            place = _place(name_node.start_mark, self.text, self.origin.name)
            name = name_node.value
            if not isinstance(name_node, yaml.ScalarNode):
                self.origin.report("a key is one word", place)
            elif name in data:
                first = self.origin.keys[(*key, name)].line
                self.origin.report(
                    f"{dotted((*key, name))}: written twice (first in line {first}); keep one",
                    place,
                )
            else:
                self.origin.keys[(*key, name)] = place
                data[name] = self.value(value_node, (*key, name), above)
        return data

    def scalar(self, node: yaml.Node, key: Key, place: Place) -> Any:
        """A plain scalar by YAML 1.2's rules: 1e-5 is a number, and yes, no, on, off are words."""
        text: str = node.value
        if node.style is not None:
            return text
        if text in _WORDS:
            return _WORDS[text]
        if _INT.fullmatch(text) and len(text) < 400:
            return int(text)
        if _FLOAT.fullmatch(text):
            return float(text)
        return text


# --- overrides ---------------------------------------------------------------------------------


def _override(origin: Origin, overrides: Sequence[str] | Mapping[str, Any]) -> None:
    if isinstance(overrides, Mapping):
        for name, value in overrides.items():
            _put(origin, tuple(name.split(".")), json.loads(json.dumps(value, default=str)), None)
        return
    for text in overrides:
        name, equals, value_text = text.partition("=")
        key = tuple(name.strip().split("."))
        where = Origin(f"--set {text}")
        if not equals or not all(key):
            where.report("is written key.path=value, such as run.mode=no_grad", None)
        else:
            _parse(value_text, where)
        if where.problems:
            origin.problems += where.problems
        else:
            data = None if value_text.strip() == "" else where.data
            column = len(name) + 2
            _put(origin, key, data, Place("--set", 1, column, text))


def _put(origin: Origin, key: tuple[str, ...], value: Any, place: Place | None) -> None:
    """Set one dotted key; a mapping given from code is merged into the section."""
    section = origin.data
    for depth, part in enumerate(key[:-1]):
        section = section.setdefault(part, {})
        if not isinstance(section, dict):
            origin.report(
                f"{dotted(key)}: {dotted(key[: depth + 1])} is no section, so nothing can be set "
                "below it",
                place,
            )
            return
    old = section.get(key[-1])
    if place is None and isinstance(value, dict) and isinstance(old, dict):
        for name, item in value.items():
            _put(origin, (*key, name), item, None)
        return
    section[key[-1]] = value
    for table in (origin.keys, origin.values):
        for stale in [known for known in table if known[: len(key)] == key]:
            del table[stale]
        if place:
            table[key] = place
