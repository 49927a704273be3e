"""Read YAML as plain data, with the location of every key and value.

A config is data: tags and alias bombs are errors, and nothing in the file can run code.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from gradrun.core.errors import ConfigError
from gradrun.core.remote import hide_credentials

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
_EXCERPT = 120
"""Maximum characters of a line in an error; of a longer line, those around the caret."""


@dataclass(frozen=True)
class SourceLocation:
    """Position of a key or value; line and column count from 1, `text` is the whole line."""

    file: str
    line: int
    column: int
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}"

    def annotate(self, message: str) -> str:
        """Return the message with its location, the line and a caret."""
        begin = max(0, self.column - _EXCERPT // 2) if len(self.text) > _EXCERPT else 0
        excerpt = hide_credentials(self.text)[begin : begin + _EXCERPT]
        return f"{self}  {message}\n    {excerpt}\n    {' ' * (self.column - 1 - begin)}^"


@dataclass
class SourceMap:
    """Locations of the keys and values of a config."""

    name: str
    keys: dict[Key, SourceLocation] = field(default_factory=dict)
    values: dict[Key, SourceLocation] = field(default_factory=dict)

    def find(self, key: Key, *, of_key: bool = False) -> SourceLocation | None:
        """Return the location of a value (or its key), or else of the nearest section above."""
        tables = (self.keys, self.values) if of_key else (self.values, self.keys)
        for length in range(len(key), -1, -1):
            for table in tables:
                if location := table.get(key[:length]):
                    return location
        return None

    def find_dotted(self, key: str) -> SourceLocation | None:
        """Return the location of a dotted key, such as "model.layers.1"."""
        parts = (
            int(k) if k.isdecimal() and k.isascii() and len(k) < 10 else k for k in key.split(".")
        )
        return self.find(tuple(parts))

    def annotate(self, message: str, location: SourceLocation | None) -> str:
        """Return the message with its location, or with the file's name if there is none."""
        return location.annotate(message) if location else f"{self.name}  {message}"


class Document:
    """The data of a config, their locations, and the problems found so far."""

    def __init__(self, name: str, data: Any = None) -> None:
        self.data = data
        self.locations = SourceMap(name)
        self.problems: list[tuple[tuple[int, int], str]] = []
        """((line, column), text)"""

    def report(self, message: str, location: SourceLocation | None) -> None:
        """Add a problem."""
        position = (location.line, location.column) if location else (0, 0)
        self.problems.append((position, self.locations.annotate(message, location)))

    def raise_problems(self) -> None:
        """Raise a ConfigError with all problems in the order of their lines, if any."""
        if self.problems:
            raise ConfigError("\n".join(text for _, text in sorted(self.problems)))


def read_yaml(path: Path) -> Document:
    """Read a config file.

    Raises:
        ConfigError: the file cannot be read or is not a mapping. Other problems are in the result.
    """
    try:
        if path.is_dir():
            raise ConfigError(f"{path}: is a folder, not a YAML file")
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # a ValueError: an impossible file name
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path}: cannot be read: {reason}") from error
    if len(raw) > MAX_BYTES:
        raise ConfigError(f"{path}: larger than 1 MiB; reference data files by data.path")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start} is not UTF-8 text") from error
    document = Document(str(path))
    parse_yaml(text, document)
    if not isinstance(document.data, dict):
        if not document.problems:
            document.report(
                "a config is a mapping with the sections model, data, run and output"
                if document.data is not None
                else "the file is empty; `gradrun init` writes a starter",
                document.locations.values.get(()),
            )
        document.raise_problems()
    return document


def parse_yaml(text: str, document: Document, displayed: str = "") -> None:
    """Parse into `document`; its problems quote lines of `displayed`, by default the text."""
    name = document.locations.name
    lines = (displayed or text).expandtabs(1).splitlines() or [""]
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        reason = error.problem or error.context or "cannot be read"
        if "'\\t'" in reason:
            reason = "a tab; YAML is indented with spaces"
        document.report(f"invalid YAML: {reason}", _locate(mark, lines, name) if mark else None)
    except yaml.reader.ReaderError as error:
        before = text[: error.position].splitlines(keepends=True)
        mark = yaml.Mark("", 0, max(0, len(before) - 1), len(before[-1]) if before else 0, None, 0)
        reason = f"the character {chr(error.character)!r} is not allowed"
        document.report(f"invalid YAML: {reason}", _locate(mark, lines, name))
    except yaml.YAMLError as error:
        document.report(f"invalid YAML: {str(error).splitlines()[0]}", None)
    except RecursionError:
        document.report("invalid config: nested too deeply", None)
    else:
        if node is not None:
            _NodeReader(lines, document).read(node)


def _locate(mark: yaml.Mark, lines: list[str], name: str) -> SourceLocation:
    line = min(mark.line, len(lines) - 1)
    return SourceLocation(name, line + 1, mark.column + 1, lines[line])


class _NodeReader:
    """Convert YAML nodes to plain data and record the location of each key."""

    def __init__(self, lines: list[str], document: Document) -> None:
        self._lines, self._document = lines, document
        self._locations = document.locations
        self._nodes = 0
        self._current: SourceLocation | None = None

    def read(self, node: yaml.Node) -> None:
        try:
            self._document.data = self._value(node, (), ())
        except RecursionError:
            self._document.report("invalid config: nested too deeply", self._current)
        except OverflowError:
            text = "invalid config: too long, or recursive aliases (*name)"
            self._document.report(text, self._current)

    def _value(self, node: yaml.Node, key: Key, ancestors: tuple[int, ...]) -> Any:
        self._nodes += 1
        self._current = location = self._location(node)
        # Nested aliases grow exponentially; stop instead of expanding them.
        if self._nodes > MAX_NODES or id(node) in ancestors:
            raise OverflowError
        self._locations.values[key] = location
        if not self._check_plain(node, location):
            return None
        ancestors = (*ancestors, id(node))
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, key, ancestors)
        if isinstance(node, yaml.SequenceNode):
            return [self._value(item, (*key, i), ancestors) for i, item in enumerate(node.value)]
        assert isinstance(node, yaml.ScalarNode)
        return _scalar(node)

    def _location(self, node: yaml.Node) -> SourceLocation:
        return _locate(node.start_mark, self._lines, self._locations.name)

    def _check_plain(self, node: yaml.Node, location: SourceLocation) -> bool:
        """Report a node that is not plain data."""
        if node.tag not in _PLAIN_TAGS:
            tag = node.tag.replace(_YAML, "!!", 1)
            text = f"tag {tag} is not allowed; a config contains plain values only"
        elif isinstance(node, yaml.ScalarNode) and _SURROGATE.search(node.value):
            text = f"{node.value!r:.60} contains half of a surrogate pair, which is not valid text"
        else:
            return True
        self._document.report(text, location)
        return False

    def _mapping(
        self, node: yaml.MappingNode, key: Key, ancestors: tuple[int, ...]
    ) -> dict[str, Any]:
        data: dict[str, Any] = {}
        for name_node, value_node in node.value:
            location = self._location(name_node)
            name = name_node.value
            if not isinstance(name_node, yaml.ScalarNode):
                self._document.report("a key must be a single word", location)
            elif not self._check_plain(name_node, location):
                continue
            elif name in data:
                first = self._locations.keys[(*key, name)].line
                text = f"{dotted((*key, name))}: duplicate key (first in line {first})"
                self._document.report(text, location)
            else:
                self._locations.keys[(*key, name)] = location
                data[name] = self._value(value_node, (*key, name), ancestors)
        return data


def _scalar(node: yaml.ScalarNode) -> Any:
    """Convert by the rules of YAML 1.2: 1e-5 is a number; yes, no, on and off are text."""
    text: str = node.value
    if node.style is not None:
        return text
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text) and len(text) < 400:
        return int(text)
    return float(text) if _FLOAT.fullmatch(text) else text


def dotted(key: Key) -> str:
    """Join `("data", "path")` as "data.path"."""
    return ".".join(map(str, key))
