"""Write a tuned config: the text of the original with changed keys and a comment for each."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from gradrun.config.load import load_config
from gradrun.config.schema import RunConfig
from gradrun.core.errors import GradrunError
from gradrun.results.trials import describe_value

_SAFE_WORDS = frozenset({"true", "false", "null", "~", ""})


def rewrite(
    text: str, changes: Mapping[str, Any], comments: Mapping[str, str], header: Sequence[str]
) -> str:
    """Set dotted keys in the text of a config, in place; new keys follow those of their section.

    Args:
        changes: dotted keys to values; None removes nothing, it is written as null.
        comments: a comment for each key, on the line above it.
    """
    for key, value in changes.items():
        text = _set(text, key.split("."), value, comments.get(key, ""))
    return "".join(f"# {line}\n" for line in header) + text


def _set(text: str, path: Sequence[str], value: Any, comment: str) -> str:
    """Set one key in the text."""
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    node: yaml.Node | None = root
    for depth, name in enumerate(path):
        found = _child(node, name)
        if found is None:
            return _add(text, node, path[depth:], value, comment)
        key_node, node = found
    assert node is not None
    new = _scalar(value)
    begin, end = node.start_mark.index, node.end_mark.index
    if isinstance(node, yaml.ScalarNode):
        text = text[:begin] + (new if begin < end else f" {new}") + text[end:]
    elif node.flow_style:  # type: ignore[attr-defined]
        text = text[:begin] + new + text[end:]
    else:  # a block: put the value behind its key
        at = key_node.end_mark.index + 1
        stop = begin + len(text[begin:end].rstrip())
        text = text[:at] + f" {new}" + text[stop:]
    return _comment(text, key_node.start_mark.index, comment)


def _child(node: yaml.Node | None, name: str) -> tuple[yaml.Node, yaml.Node] | None:
    if not isinstance(node, yaml.MappingNode):
        return None
    return next(((k, v) for k, v in node.value if getattr(k, "value", None) == name), None)


def _add(
    text: str, section: yaml.Node | None, path: Sequence[str], value: Any, comment: str
) -> str:
    """Add a key to a section."""
    for name in reversed(path[1:]):
        value = {name: value}
    entry = f"{path[0]}: {_scalar(value)}"
    if isinstance(section, yaml.MappingNode) and section.flow_style:
        at = section.end_mark.index - 1
        body = text[:at].rstrip()
        separator = " " if body.endswith(",") else "" if body.endswith("{") else ", "
        added = body + separator + entry + text[at:]
        return _comment(added, section.start_mark.index, comment)
    if isinstance(section, yaml.MappingNode) and section.value:
        key_node, value_node = section.value[-1]
        indent = " " * key_node.start_mark.column
        last = value_node.end_mark.index
        # The end of a block includes the comments behind it; stay above them.
        last = key_node.start_mark.index + len(text[key_node.start_mark.index : last].rstrip())
        last = _end_of_content(text, key_node.start_mark.index, last)
        line_end = text.find("\n", last)
        line_end = len(text) if line_end < 0 else line_end
        lines = f"\n{indent}# {comment}" if comment else ""
        return f"{text[:line_end]}{lines}\n{indent}{entry}{text[line_end:]}"
    # An empty section, such as "run:".
    if section is not None and section.start_mark.index:
        at = section.start_mark.index
        return f"{text[:at].rstrip(' ')} {{{entry}}}{text[section.end_mark.index :]}"
    return f"{text.rstrip()}\n{entry}\n"


def _end_of_content(text: str, begin: int, end: int) -> int:
    """Return the end of the last line of a range that is not a comment."""
    lines = text[begin:end].split("\n")
    while len(lines) > 1 and (not lines[-1].strip() or lines[-1].lstrip().startswith("#")):
        end -= len(lines.pop()) + 1
    return end


def _comment(text: str, index: int, comment: str) -> str:
    """Put a comment on a line above the one at an index."""
    if not comment:
        return text
    begin = text.rfind("\n", 0, index) + 1
    indent = text[begin : begin + len(text[begin:]) - len(text[begin:].lstrip(" "))]
    return f"{text[:begin]}{indent}# {comment}\n{text[begin:]}"


def _scalar(value: Any) -> str:
    """Write a value on one line."""
    if isinstance(value, dict | list):
        return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6).strip()
    if isinstance(value, str) and (value.lower() in _SAFE_WORDS or yaml.safe_load(value) != value):
        return yaml.safe_dump(value, default_style='"').strip()
    return describe_value(value)


def relocated_paths(config: RunConfig, text: str, source: Path, target: Path) -> dict[str, Any]:
    """Return the keys with relative paths, as they are from the folder of the new file."""
    old, new = source.parent.resolve(), target.parent.resolve()
    base = source.absolute().parent
    if old == new:
        return {}

    def moved(key: str, path: str) -> str:
        if Path(path).is_absolute() or path.startswith("~"):
            return path
        # Outputs stay below a folder: they do not allow "..".
        output = key.startswith(("output.", "check."))
        return str(old / path) if output else os.path.relpath(old / path, new)

    changes: dict[str, Any] = {}
    pending: list[tuple[str, Any, Any]] = [("", config.model_dump(), yaml.safe_load(text))]
    while pending:
        key, typed, written = pending.pop()
        if isinstance(typed, dict) and isinstance(written, dict):
            dot = key and "."
            pending += [(f"{key}{dot}{n}", typed[n], written[n]) for n in written if n in typed]
        elif isinstance(typed, str) and isinstance(written, str):
            # Python code, such as nets.py:Net, whose path the config has made absolute.
            if typed.startswith("/") and os.path.normpath(typed) == os.path.normpath(
                base / written
            ):
                changes[key] = moved(key, written)
        elif isinstance(typed, Path) or (
            isinstance(typed, tuple) and any(isinstance(item, Path) for item in typed)
        ):
            listed = isinstance(written, list)
            paths = [moved(key, str(path)) for path in (written if listed else [written])]
            value = paths if listed else paths[0]
            if value != written:
                changes[key] = value
    return changes


def write_tuned(
    source: Path,
    target: Path,
    config: RunConfig,
    expected: RunConfig,
    changes: Mapping[str, Any],
    comments: Mapping[str, str],
    header: Sequence[str],
) -> str:
    """Return the text of the tuned config, which loads as `expected`.

    Texts that use anchors or merge keys may not allow a change in place; then the whole config is
    written, without the original's comments.
    """
    text = source.read_text(encoding="utf-8")
    moved = relocated_paths(config, text, source, target)
    try:
        tuned = rewrite(text, {**moved, **changes}, comments, header)
        if _loads_as(tuned, expected, target):
            return tuned
    except (yaml.YAMLError, GradrunError):
        pass
    dumped = expected.model_dump(mode="json", exclude_defaults=True)
    note = "The original could not be changed in place, so its comments are missing."
    changed = (f"{key}: {comment}" for key, comment in comments.items())
    lines = "".join(f"# {line}\n" for line in (*header, note, *changed))
    return lines + yaml.safe_dump(dumped, sort_keys=False, allow_unicode=True)


def _loads_as(text: str, expected: RunConfig, target: Path) -> bool:
    draft = target.with_name(f".{target.name}.draft")
    try:
        draft.write_text(text, encoding="utf-8")
        loaded = load_config(draft).config
    except (GradrunError, OSError):
        return False
    finally:
        draft.unlink(missing_ok=True)
    same: bool = _normalized(loaded.model_dump()) == _normalized(expected.model_dump())
    return same


def _normalized(value: Any) -> Any:
    """Return plain data with absolute paths without "..", which differ by the file's folder."""
    if isinstance(value, dict):
        return {key: _normalized(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_normalized(item) for item in value]
    is_path = isinstance(value, Path) or (isinstance(value, str) and value.startswith("/"))
    return os.path.normpath(value) if is_path else value
