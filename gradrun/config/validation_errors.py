"""pydantic's errors as sentences: what is wrong, what is allowed, did you mean.

Knows the models of config.py, and nothing of files or YAML.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from gradrun.config.schema import RunConfig
from gradrun.core.suggest import suggest

Key = tuple[str | int, ...]

_KINDS = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "tuple_type": "a list, such as [1, 8, 8]",
    "list_type": "a list",
    "dict_type": "a section with keys of its own",
    "model_type": "a section with keys of its own",
    "model_attributes_type": "a section with keys of its own",
    "path_type": "a path",
    "finite_number": "a finite number",
}
_BOUNDS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
_ALLOWED = {
    "device": "auto, cpu, cuda, cuda:N or mps",
    "threads": "auto or a whole number from 1 to 4096",
    "warmup": "auto or a whole number from 0 to 100000",
}


@dataclass(frozen=True)
class ConfigIssue:
    """A sentence about one key; `about_key`: it is the key itself that is wrong, not its value."""

    key: Key
    text: str
    about_key: bool = False


def config_issue(problem: Any, data: Any) -> ConfigIssue:
    """What a pydantic error (an ErrorDetails) about `data` means in words."""
    key, section = _walk(problem["loc"], data)
    kind, context = problem["type"], problem.get("ctx", {})
    if kind == "extra_forbidden":
        allowed = sorted(section.model_fields, key="source".__ne__) if section else []
        return ConfigIssue(key, f"unknown key; {suggest(str(key[-1]), allowed)}", about_key=True)
    if kind == "missing":
        return ConfigIssue(key, "is missing" + _meaning(section, key), about_key=True)
    if kind == "union_tag_not_found":
        sources = ", ".join(_sources(key[-1]))
        return ConfigIssue((*key, "source"), f"is missing; one of {sources}", about_key=True)
    if kind == "union_tag_invalid":
        text = f"unknown source {context['tag']!r}; {suggest(context['tag'], _sources(key[-1]))}"
        return ConfigIssue((*key, "source"), text)
    # Limits are held against the metrics, so it is their section that these are told of.
    if kind == "unknown_limit":
        text = f"unknown limit; {suggest(context['name'], context['allowed'])}"
        return ConfigIssue((*key, "limits", context["name"]), text, about_key=True)
    if kind == "limit":
        return ConfigIssue((*key, "limits", context["name"]), context["problem"])
    text = _value_text(problem, str(key[-1]) if key else "")
    if kind in {"model_type", "model_attributes_type"} and key and section:
        field = section.model_fields.get(str(key[-1]))
        members = _members(field) if field else []
        if len(members) == 1:
            text += f": {', '.join(members[0].model_fields)}"
    return ConfigIssue(key, text)


def _value_text(problem: Any, name: str) -> str:
    kind, context, given = problem["type"], problem.get("ctx", {}), problem["input"]
    if name in _ALLOWED:
        return f"unknown value {_shown(given)}; allowed: {_ALLOWED[name]}"
    if kind in _KINDS:
        return f"{_shown(given)} is not {_KINDS[kind]}"
    if kind in {"enum", "literal_error"}:
        allowed = [
            word.strip(" '") for word in context["expected"].replace(" or ", ", ").split(",")
        ]
        return f"unknown value {_shown(given)}; {suggest(str(given), allowed)}"
    if kind == "value_error":
        return str(context["error"])
    for bound, words in _BOUNDS.items():
        if bound in context:
            return f"{_shown(given)} must be {words} {context[bound]}"
    if kind in {"too_short", "too_long"}:
        limit = next(
            f"{words} {context[name]}"
            for name, words in (("min_length", "at least"), ("max_length", "at most"))
            if name in context
        )
        return f"has {context['actual_length']} entries, and {limit} are wanted"
    return str(problem["msg"])


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return "a section"
    if isinstance(value, list | tuple):
        return "a list"
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _meaning(section: type[BaseModel] | None, key: Key) -> str:
    field = section.model_fields.get(str(key[-1])) if section else None
    return f": {field.description}" if field and field.description else ""


def _sources(section: object) -> list[str]:
    """The names that `model.source` or `data.source` may have."""
    return [_source(member) for member in _members(RunConfig.model_fields[str(section)])]


def _source(member: type[BaseModel]) -> str:
    return str(get_args(member.model_fields["source"].annotation)[0])


def _members(field: FieldInfo) -> list[type[BaseModel]]:
    """The section classes that a field may hold, inside dict[str, ...] too."""
    found: list[type[BaseModel]] = []
    pending: list[Any] = [field.annotation]
    while pending:
        annotation = pending.pop(0)
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            found.append(annotation)
        else:
            pending += get_args(annotation)
    return found


def _walk(loc: Key, data: Any) -> tuple[Key, type[BaseModel] | None]:
    """The key that pydantic's location means, and the section class that holds that key.

    A location also names the union member that was chosen (model, zoo, name) and the branches
    of a plain union (run, threads, int), which the file does not.
    """
    key: Key = ()
    holder: type[BaseModel] | None = None
    here: list[type[BaseModel]] = [RunConfig]
    named = False  # the value here holds sections, and the next part is a name or a place
    for part in loc:
        if len(here) > 1:
            here = [member for member in here if _source(member) == part]
            continue
        field = here[0].model_fields.get(str(part)) if here and not named else None
        written = _get(data, part)
        if field is None and written is _ABSENT:
            break
        key, data = (*key, part), None if written is _ABSENT else written
        if named:
            named = False
            continue
        holder = here[0] if here else None
        here = _members(field) if field else []
        named = field is not None and get_origin(field.annotation) in {dict, tuple}
    return key, holder


_ABSENT = object()


def _get(data: Any, part: str | int) -> Any:
    if isinstance(data, Mapping):
        return data.get(part, _ABSENT)
    if isinstance(data, list) and isinstance(part, int) and part < len(data):
        return data[part]
    return _ABSENT
