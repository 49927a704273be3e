"""YAML text to RunConfig, where every error has its file:line:col, all of them at once.

A config is data: tags, aliases that explode and files that are no text are errors, and nothing in
it can run code. Knows no torch; what the keys mean stands in config.py.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from gradrun.config.schema import RunConfig
from gradrun.config.validation_errors import config_issue
from gradrun.core.errors import ConfigError

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
_SURROGATE = re.compile("[\ud800-\udfff]")
_YAML = "tag:yaml.org,2002:"
_PLAIN_TAGS = {
    _YAML + kind
    for kind in ("map", "seq", "str", "int", "float", "bool", "null", "timestamp", "merge", "value")
}
_SNIPPET = 120
"""Characters of a line that are shown; of a longer one, those around the caret."""


@dataclass(frozen=True)
class SourceLocation:
    """Where a key or a value was written; lines and columns count from 1."""

    file: str
    line: int
    column: int
    text: str
    """The line itself."""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}"


class SourceMap:
    """What was written and where: the plain data of a config and the place of each of its keys."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.data: Any = {}
        self.keys: dict[Key, SourceLocation] = {}
        self.values: dict[Key, SourceLocation] = {}
        self.problems: list[tuple[tuple[int, int], str]] = []

    def report(self, text: str, place: SourceLocation | None) -> None:
        """Note a problem, with the line and a caret under it where the place is known."""
        if place is None:
            self.problems.append(((0, 0), f"{self.name}  {text}"))
            return
        begin = max(0, place.column - _SNIPPET // 2) if len(place.text) > _SNIPPET else 0
        shown = place.text[begin : begin + _SNIPPET]
        caret = f"    {shown}\n    {' ' * (place.column - 1 - begin)}^"
        self.problems.append(((place.line, place.column), f"{place}  {text}\n{caret}"))

    def place(self, key: Key, *, of_key: bool = False) -> SourceLocation | None:
        """Where `key` was written, or the nearest section around it that was."""
        for length in range(len(key), -1, -1):
            part = key[:length]
            tables = (self.keys, self.values) if of_key else (self.values, self.keys)
            for table in tables:
                if part in table:
                    return table[part]
        return None

    def where(self, key: str) -> str | None:
        """Where a dotted key, or the section around it, was written, as "file:line:column"."""
        place = self.place(tuple(key.split(".")))
        return str(place) if place else None

    def raise_problems(self, kind: type[ConfigError] = ConfigError) -> None:
        if self.problems:
            raise kind("\n".join(text for _, text in sorted(self.problems)))


def load_config(
    source: str | Path | Mapping[str, Any],
    overrides: Sequence[str] | Mapping[str, Any] = (),
    *,
    output_base: Path | None = None,
    source_name: str = "--set",
) -> RunConfig:
    """Read, check and resolve a config.

    Args:
        source: a YAML file, or the same as a mapping.
        overrides: "key.path=value" texts, or a mapping of dotted keys (or sections) to values;
            checked like the file.
        output_base: the folder that a relative output.path starts from; default: the config's.
        told_as: the place that errors in overrides are told of.

    Raises:
        ConfigError: with every problem found, each with its place.
    """
    if isinstance(source, Mapping):
        origin, base = SourceMap("config"), Path.cwd()
        origin.data = json.loads(json.dumps(source, default=str))
    else:
        origin = _read(Path(source))
        base = Path(os.path.abspath(source)).parent  # noqa: PTH100 - a link stays a link
    _override(origin, overrides, source_name)
    reported = {where for where, _ in origin.problems}
    try:
        config = RunConfig.model_validate_json(
            json.dumps(origin.data), context=_ConfigPaths(base, output_base or base)
        )
    except ValidationError as error:
        complaints = (config_issue(problem, origin.data) for problem in error.errors())
        for found in dict.fromkeys(complaints):
            place = origin.place(found.key, of_key=found.about_key)
            if place is None or (place.line, place.column) not in reported:
                text = f"{dotted(found.key)}: {found.text}" if found.key else found.text
                origin.report(text, place)
    origin.raise_problems()
    config._origin = origin
    return config


@contextmanager
def with_locations(config: RunConfig) -> Iterator[None]:
    """Give a ConfigError from inside the block the place of the key that it names."""
    try:
        yield
    except ConfigError as error:
        if error.key and config._origin:
            key: Key = tuple(
                int(k) if k.isdecimal() and k.isascii() and len(k) < 10 else k
                for k in error.key.split(".")
            )
            config._origin.problems.clear()
            config._origin.report(f"{error.key}: {error}", config._origin.place(key))
            config._origin.raise_problems(type(error))
        raise


def dotted(key: Key) -> str:
    """`("data", "path")` as "data.path"."""
    return ".".join(map(str, key))


class _ConfigPaths:
    """config.Paths: relative paths start at the config's folder, and input files exist."""

    def __init__(self, base: Path, output_base: Path) -> None:
        self.base, self.output_base = base, output_base

    def input_file(self, path: Path) -> Path:
        resolve_config = _joined(self.base, path)
        if not resolve_config.exists():
            raise ValueError(f"there is no file {resolve_config}")
        if not resolve_config.is_file():
            what = "a folder" if resolve_config.is_dir() else "no plain file"
            raise ValueError(f"{resolve_config} is {what}")
        return resolve_config

    def input_folder(self, path: Path) -> Path:
        resolve_config = _joined(self.base, path)
        if not resolve_config.is_dir():
            what = "is a file" if resolve_config.exists() else "does not exist"
            raise ValueError(f"{resolve_config} {what}, where a folder is wanted")
        return resolve_config

    def output_folder(self, path: Path) -> Path:
        if ".." in path.parts:
            raise ValueError(
                f"{str(path)!r} climbs out by '..'; a config writes below its own folder or to an "
                "absolute path, and --output FOLDER on the command line goes anywhere"
            )
        return _joined(self.output_base, path)


def _joined(base: Path, path: Path) -> Path:
    """`path` from `base` on, with ~ resolved; ValueError where no file could have that name."""
    try:
        joined = base / path.expanduser()
        joined.lstat()
    except FileNotFoundError:
        return joined
    except (OSError, RuntimeError, ValueError) as error:
        if isinstance(error, OSError) and error.errno != errno.ENAMETOOLONG:
            return joined
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{str(path)!r:.60} is no usable path: {reason}") from error
    return joined


# --- text -> data and places -------------------------------------------------------------------


def _read(path: Path) -> SourceMap:
    origin = SourceMap(str(path))
    try:
        if path.is_dir():
            raise ConfigError(f"{path}: a folder, where a YAML file is wanted")
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # a ValueError: no file may have this name
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path}: cannot be read: {reason}") from error
    if len(raw) > MAX_BYTES:
        raise ConfigError(f"{path}: over 1 MiB, which is no config; data files go under data.path")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start} is not UTF-8 text") from error
    _parse(text, origin)
    if isinstance(origin.data, dict):
        return origin
    if not origin.problems:
        origin.report(
            "a config is a mapping with the sections model, data, run and output"
            if origin.data is not None
            else "the file is empty; `gradrun init` writes a starter",
            origin.values.get(()),
        )
    origin.raise_problems()
    return origin


def _parse(text: str, origin: SourceMap, shown: str = "") -> None:
    """Fill `origin` from YAML text; problems are noted there, under lines of `shown` if given."""
    lines = (shown or text).expandtabs(1).splitlines() or [""]
    origin.data = None
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        reason = error.problem or error.context or "cannot be read"
        if "'\\t'" in reason:
            reason = "a tab; YAML is indented with spaces"
        origin.report(f"not YAML: {reason}", _place(mark, lines, origin.name) if mark else None)
    except yaml.reader.ReaderError as error:
        before = text[: error.position].splitlines(keepends=True)
        mark = yaml.Mark("", 0, max(0, len(before) - 1), len(before[-1]) if before else 0, None, 0)
        reason = f"the character {chr(error.character)!r} does not belong in a text file"
        origin.report(f"not YAML: {reason}", _place(mark, lines, origin.name))
    except yaml.YAMLError as error:
        origin.report(f"not YAML: {str(error).splitlines()[0]}", None)
    except RecursionError:
        origin.report("not a config: nested too deeply", None)
    else:
        if node is not None:
            _Walk(lines, origin).start(node)


def _place(mark: yaml.Mark, lines: list[str], name: str) -> SourceLocation:
    line = min(mark.line, len(lines) - 1)
    return SourceLocation(name, line + 1, mark.column + 1, lines[line])


class _Walk:
    """One walk over a YAML document, from nodes to plain data and the places of its keys."""

    def __init__(self, lines: list[str], origin: SourceMap) -> None:
        self.lines, self.origin = lines, origin
        self.nodes = 0
        self.at: SourceLocation | None = None

    def start(self, node: yaml.Node) -> None:
        try:
            self.origin.data = self.value(node, (), ())
        except RecursionError:
            self.origin.report("not a config: nested too deeply", self.at)
        except OverflowError:
            self.origin.report("not a config: too long, or aliases (*name) without end", self.at)

    def value(self, node: yaml.Node, key: Key, above: tuple[int, ...]) -> Any:
        self.nodes += 1
        self.at = self.place(node)
        # Sections within sections of aliases grow as a power: the bomb is cut, not expanded.
        if self.nodes > MAX_NODES or id(node) in above:
            raise OverflowError
        place = self.origin.values[key] = self.at
        if not self.plain(node, place):
            return None
        above = (*above, id(node))
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, key, above)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, (*key, i), above) for i, item in enumerate(node.value)]
        assert isinstance(node, yaml.ScalarNode)
        return self.scalar(node)

    def place(self, node: yaml.Node) -> SourceLocation:
        return _place(node.start_mark, self.lines, self.origin.name)

    def plain(self, node: yaml.Node, place: SourceLocation) -> bool:
        """Whether the node is plain data; if not, it is reported."""
        if node.tag not in _PLAIN_TAGS:
            tag = node.tag.replace(_YAML, "!!", 1)
            text = f"the tag {tag}: a config is data and takes no tags; write plain values"
        elif isinstance(node, yaml.ScalarNode) and _SURROGATE.search(node.value):
            text = f"{node.value!r:.60} holds half a character, which is no text"
        else:
            return True
        self.origin.report(text, place)
        return False

    def mapping(self, node: yaml.MappingNode, key: Key, above: tuple[int, ...]) -> dict[str, Any]:
        data: dict[str, Any] = {}
        for name_node, value_node in node.value:
            place = self.place(name_node)
            name = name_node.value
            if not isinstance(name_node, yaml.ScalarNode):
                self.origin.report("a key is one word", place)
            elif not self.plain(name_node, place):
                continue
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

    def scalar(self, node: yaml.ScalarNode) -> Any:
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


def _override(
    origin: SourceMap, overrides: Sequence[str] | Mapping[str, Any], source_name: str
) -> None:
    if isinstance(overrides, Mapping):
        for name, value in overrides.items():
            data = json.loads(json.dumps(value, default=str))
            place = SourceLocation("override", 1, 1, f"{name}={value!r:.100}")
            _put(origin, tuple(name.split(".")), data, place, merge=True)
        return
    for text in overrides:
        name, equals, value_text = text.partition("=")
        key = tuple(name.strip().split("."))
        where, column = SourceMap(source_name), len(name) + 2
        if not equals or not all(key):
            where.report(
                "is written key.path=value, such as run.mode=no_grad",
                SourceLocation(source_name, 1, 1, text),
            )
        else:
            _parse(" " * (column - 1) + value_text, where, text)
        if where.problems:
            origin.problems += where.problems
        else:
            _put(origin, key, where.data, SourceLocation(source_name, 1, column, text))


def _put(
    origin: SourceMap,
    key: tuple[str, ...],
    value: Any,
    place: SourceLocation,
    *,
    merge: bool = False,
) -> None:
    """Set one dotted key; `merge`: a mapping is merged into the section that is there."""
    section = origin.data
    for depth, part in enumerate(key[:-1]):
        if part not in section:
            origin.keys[key[: depth + 1]] = place
        section = section.setdefault(part, {})
        if not isinstance(section, dict):
            origin.report(
                f"{dotted(key)}: {dotted(key[: depth + 1])} is no section, so nothing can be set "
                "below it",
                place,
            )
            return
    old = section.get(key[-1])
    if merge and isinstance(value, dict) and isinstance(old, dict):
        for name, item in value.items():
            _put(origin, (*key, name), item, place, merge=True)
        return
    section[key[-1]] = value
    for table in (origin.keys, origin.values):
        for stale in [known for known in table if known[: len(key)] == key]:
            del table[stale]
        table[key] = place
