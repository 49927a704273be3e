"""Convert pydantic's errors to sentences: the problem, the allowed values, a suggestion."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from gradrun.config.schema import RunConfig
from gradrun.config.yaml_reader import Key, dotted
from gradrun.core.suggest import suggest

_KINDS = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a section",
    "model_type": "a section",
    "model_attributes_type": "a section",
    "path_type": "a path",
    "finite_number": "a finite number",
}
_MAPS = {"dict_type", "model_type", "model_attributes_type"}
_BOUNDS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
_ALLOWED = {
    "run.device": "auto, cpu, cuda, cuda:N or mps",
    "run.threads": "auto or an integer from 1 to 4096",
    "data.decode_threads": "auto or an integer from 1 to 4096",
    "engine.workers": "auto or an integer from 1 to 10000",
    "run.warmup": "auto or an integer from 0 to 100000",
}


@dataclass(frozen=True)
class ConfigIssue:
    """A problem with one key; `about_key`: with the key itself, not its value."""

    key: Key
    text: str
    about_key: bool = False


def config_issues(problems: Sequence[Any], data: Any) -> Iterator[ConfigIssue]:
    """Convert pydantic's ErrorDetails about `data`.

    For a value of a union, pydantic reports every member. A member of another type than the value
    is left out if a member of its type, or an item in the value, explains the problem.
    """
    found = [(config_issue(problem, data), _is_other_type(problem)) for problem in problems]
    explained = {issue.key for issue, other_type in found if not other_type}
    explained |= {issue.key[:end] for issue, _ in found for end in range(len(issue.key))}
    for issue, other_type in found:
        if not (other_type and issue.key in explained):
            yield issue


def _is_other_type(problem: Any) -> bool:
    """Decide whether a value has another type than one of the members of a union."""
    kind, given = problem["type"], problem["input"]
    if kind == "literal_error":
        return isinstance(given, list | tuple | Mapping)
    return kind in _KINDS and kind not in {"int_from_float", "finite_number"}


def config_issue(problem: Any, data: Any) -> ConfigIssue:
    """Convert a pydantic ErrorDetails about `data`."""
    key, section, within = _resolve_location(problem["loc"], data)
    kind, context = problem["type"], problem.get("ctx", {})
    if within:  # in a list of files and maps, which is joined to a map
        name, fields = str(problem["loc"][-1]), section.model_fields if section else {}
        unknown = kind == "extra_forbidden"
        text = f"unknown key {name!r}; {suggest(name, fields)}" if unknown else ""
        return ConfigIssue(key, f"{within}: {text or _describe_value(problem, '')}")
    if kind == "extra_forbidden":
        allowed = sorted(section.model_fields, key="source".__ne__) if section else []
        return ConfigIssue(key, f"unknown key; {suggest(str(key[-1]), allowed)}", about_key=True)
    if kind == "missing":
        return ConfigIssue(key, "is missing" + _description(section, key), about_key=True)
    if kind == "union_tag_not_found":
        sources = ", ".join(_sources(key[-1]))
        return ConfigIssue((*key, "source"), f"is missing; one of {sources}", about_key=True)
    if kind == "union_tag_invalid":
        text = f"unknown source {context['tag']!r}; {suggest(context['tag'], _sources(key[-1]))}"
        return ConfigIssue((*key, "source"), text)
    # Limits are validated together with the metrics, so pydantic's location is the section.
    if kind == "unknown_limit":
        text = f"unknown limit; {suggest(context['name'], context['allowed'])}"
        return ConfigIssue((*key, context["section"], context["name"]), text, about_key=True)
    if kind == "limit":
        return ConfigIssue((*key, context["section"], context["name"]), context["problem"])
    text = _describe_value(problem, dotted(key))
    if kind == "tuple_type" and section and not isinstance(problem["input"], str | Mapping):
        text += _list_example(section, key)
    if kind in _MAPS and key and section:
        text += _map_advice(section, key)
    return ConfigIssue(key, text)


def _list_example(section: type[BaseModel], key: Key) -> str:
    field = section.model_fields.get(str(key[-1]))
    if field is None or _members(field):
        return ""
    items = str(field.annotation)
    return ", such as [1, 8, 8]" if "int" in items else ", such as [a, b]" if "str" in items else ""


def _map_advice(section: type[BaseModel], key: Key) -> str:
    """Describe the map that a key needs, for a value that is not a map."""
    field = section.model_fields.get(str(key[-1]))
    in_map = field is None  # data.inputs.x: the field is `inputs`
    field = section.model_fields.get(str(key[-2])) if in_map and len(key) > 1 else field
    members = _members(field) if field else []
    if len(members) != 1:
        return "; write one key per line, such as source: ..."
    example = getattr(members[0], "example", "")
    if not example:
        return f": {', '.join(members[0].model_fields)}"
    is_dict = field is not None and get_origin(field.annotation) is dict
    if is_dict and not in_map:
        return f"; write a map of names, such as {{x: {example}}}"
    return f"; write a map, such as {example}"


def _describe_value(problem: Any, key: str) -> str:
    kind, context, given = problem["type"], problem.get("ctx", {}), problem["input"]
    if key in _ALLOWED:
        return f"unknown value {_format(given)}; allowed: {_ALLOWED[key]}"
    if kind == "tuple_type" and isinstance(given, str):
        return f"{_format(given)} is not a list; write [{given:.60}]"
    if kind == "tuple_type" and isinstance(given, Mapping) and given:
        return f"{_format(given)} is not a list; write [{', '.join(map(str, given)):.60}]"
    if kind in _KINDS:
        return f"{_format(given)} is not {_KINDS[kind]}"
    if kind in {"enum", "literal_error"}:
        allowed = [
            word.strip(" '") for word in context["expected"].replace(" or ", ", ").split(",")
        ]
        return f"unknown value {_format(given)}; {suggest(str(given), allowed)}"
    if kind == "value_error":
        return str(context["error"])
    for bound, words in _BOUNDS.items():
        if bound in context:
            return f"{_format(given)} must be {words} {context[bound]}"
    if kind in {"too_short", "too_long"}:
        limit = next(
            f"{words} {context[name]}"
            for name, words in (("min_length", "at least"), ("max_length", "at most"))
            if name in context
        )
        return f"has {context['actual_length']} entries; allowed: {limit}"
    return str(problem["msg"])


def _format(value: Any) -> str:
    if isinstance(value, Mapping):
        return "a section"
    if isinstance(value, list | tuple):
        return "a list"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _description(section: type[BaseModel] | None, key: Key) -> str:
    field = section.model_fields.get(str(key[-1])) if section else None
    return f": {field.description}" if field and field.description else ""


def _sources(section: object) -> list[str]:
    """Return the allowed values of `model.source` or `data.source`."""
    return [_source(member) for member in _members(RunConfig.model_fields[str(section)])]


def _source(member: type[BaseModel]) -> str:
    return str(get_args(member.model_fields["source"].annotation)[0])


def _members(field: FieldInfo) -> list[type[BaseModel]]:
    """Return the section classes in a field's type, also inside dict[str, ...]."""
    members: list[type[BaseModel]] = []
    pending: list[Any] = [field.annotation]
    while pending:
        annotation = pending.pop(0)
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            members.append(annotation)
        else:
            pending += get_args(annotation)
    return members


def _resolve_location(loc: Key, data: Any) -> tuple[Key, type[BaseModel] | None, str]:
    """Return the key of a pydantic location, and the section class that declares the key.

    The last item is the name of a section that `data` does not have under the key, because it was
    joined from a list or read from a file; otherwise "".

    Besides keys, a location contains the chosen member of a union (model, zoo, name) and the
    branches of a plain union (run, threads, int).
    """
    key: Key = ()
    section: type[BaseModel] | None = None
    candidates: list[type[BaseModel]] = [RunConfig]
    within = ""
    is_container = False  # a dict or tuple of sections; the next part is a name or an index
    for part in loc:
        if len(candidates) > 1:
            candidates = [member for member in candidates if _source(member) == part]
            continue
        named = candidates and not is_container
        field = candidates[0].model_fields.get(str(part)) if named else None
        value = _get(data, part)
        if is_container and isinstance(part, str) and value is _ABSENT and candidates:
            within, section, data, is_container = part, candidates[0], None, False
            continue
        if isinstance(data, list) and isinstance(part, str):
            continue  # the branch of a union
        if within or (field is None and value is _ABSENT):
            break
        key, data = (*key, part), None if value is _ABSENT else value
        if is_container:
            is_container = False
            continue
        section = candidates[0] if candidates else None
        candidates = _members(field) if field else []
        is_container = field is not None and get_origin(field.annotation) in {dict, tuple}
    return key, section, within


_ABSENT = object()


def _get(data: Any, part: str | int) -> Any:
    if isinstance(data, Mapping):
        return data.get(part, _ABSENT)
    if isinstance(data, list) and isinstance(part, int) and part < len(data):
        return data[part]
    return _ABSENT
