"""The configuration reference, generated from the JSON Schema of a config."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from gradrun.config.schema import RunConfig

Schema = dict[str, Any]

_INTRODUCTION = """\
# Configuration

A config is one YAML file with the sections below. `model`, `data` and `output` are required.
This page is generated from the JSON Schema that `gradrun schema` prints; point your editor to that
schema for completion.

- Unknown keys and values of the wrong type are errors. `gradrun validate` lists all of them, with
  their lines, without running anything.
- Relative paths start at the folder of the config file.
- Override a value for one run with `--set key.path=value`, for example
  `--set run.mode=no_grad`. The value is parsed as YAML.
"""


def config_page() -> str:
    """The page as Markdown."""
    schema = RunConfig.model_json_schema()
    lines = [_INTRODUCTION]
    for name, section in schema["properties"].items():
        required = [s for s in section.get("anyOf", [section]) if s.get("type") != "null"]
        text = [_sentence(section["description"]), ""] if "anyOf" in section else []
        lines += [f"## {name}", "", *text, *_section(name, required[0], schema["$defs"])]
    return "\n".join(lines) + "\n"


def _section(name: str, section: Schema, definitions: Schema) -> Iterator[str]:
    if "oneOf" in section:
        yield f"`{name}.source` selects one of these:"
        yield ""
        for source in section["discriminator"]["mapping"]:
            yield f"- [`{source}`](#{name}-{source})"
        yield ""
        for source, reference in section["discriminator"]["mapping"].items():
            yield f"### {source} {{ #{name}-{source} }}"
            yield ""
            yield from _table(f"{name}", _resolve(reference, definitions), definitions)
    elif "items" in section:
        item = next(s for s in section["items"]["anyOf"] if "$ref" in s)
        yield f"A list. {_sentence(section.get('description', ''))}"
        yield ""
        yield "Each entry is a name or a mapping:"
        yield ""
        yield from _table(f"{name}[]", _resolve(item["$ref"], definitions), definitions)
    else:
        yield from _table(name, _resolve(section["$ref"], definitions), definitions)


def _table(path: str, section: Schema, definitions: Schema) -> Iterator[str]:
    """A section's description, its keys, then the sections nested in it."""
    if text := section.get("description"):
        yield text
        yield ""
    yield "| key | type | description |"
    yield "|---|---|---|"
    required, nested = section.get("required", []), []
    for key, field in section["properties"].items():
        if key == "source":
            continue
        reference, suffix = _nested(field, definitions)
        if reference:
            nested.append((f"{path}.{key}{suffix}", reference))
        default = "Required." if key in required else _default(field.get("default"))
        words = (_sentence(field.get("description", "")), default)
        cells = (f"`{key}`", _kind(field, definitions), " ".join(filter(None, words)))
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
    yield ""
    for name, definition in nested:
        yield f"#### `{name}`"
        yield ""
        yield from _table(name, definition, definitions)


def _nested(field: Schema, definitions: Schema) -> tuple[Schema | None, str]:
    """The section that a key takes, and the suffix for one entry of it."""
    extra = field.get("additionalProperties")
    if isinstance(extra, dict) and "$ref" in extra:
        definition = _resolve(extra["$ref"], definitions)
        return (definition, ".<name>") if "properties" in definition else (None, "")
    for option in field.get("anyOf", [field]):
        if "$ref" in option:
            definition = _resolve(option["$ref"], definitions)
            if "properties" in definition:
                return definition, ""
    return None, ""


def _kind(field: Schema, definitions: Schema) -> str:
    """A field's type in words."""
    if "anyOf" in field:
        kinds = [_kind(option, definitions) for option in field["anyOf"]]
        return " or ".join(dict.fromkeys(kind for kind in kinds if kind != "null"))
    if "$ref" in field:
        definition = _resolve(field["$ref"], definitions)
        return "section" if "properties" in definition else _kind(definition, definitions)
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if "const" in field:
        return f"`{field['const']}`"
    kind = field.get("type", "any")
    if kind == "array":
        if "prefixItems" in field:
            return "[" + ", ".join(_kind(item, definitions) for item in field["prefixItems"]) + "]"
        return f"list of {_kind(field.get('items', {}), definitions)}"
    if kind == "object":
        extra = field.get("additionalProperties")
        inner = _kind(extra, definitions) if isinstance(extra, dict) else "any"
        return f"mapping of {inner}"
    if kind == "string":
        return "path" if field.get("format") == "path" else "text"
    return f"{kind}{_bounds(field)}"


def _bounds(field: Schema) -> str:
    """Limits of a number, where they are narrower than any sensible value."""
    words = [
        f"{sign} {field[key]:,}"
        for key, sign in (
            ("minimum", "≥"),
            ("exclusiveMinimum", ">"),
            ("maximum", "≤"),
            ("exclusiveMaximum", "<"),
        )
        if key in field and abs(field[key]) < 2**40
    ]
    return f" {', '.join(words)}" if words else ""


def _default(value: Any) -> str:
    """The default as a sentence; empty where the description or the nested section gives it."""
    if value is None or isinstance(value, dict):
        return ""
    literal = value if isinstance(value, str) else json.dumps(value).replace('"', "")
    return f"Default: `{literal}`."


def _sentence(text: str) -> str:
    text = text.strip()
    return (
        f"{text[0].upper()}{text[1:]}{'' if text.endswith(('.', '...')) else '.'}" if text else ""
    )


def _resolve(reference: str, definitions: Schema) -> Schema:
    definition: Schema = definitions[reference.rpartition("/")[2]]
    return definition
