"""Load a config: read, apply overrides, validate; report all errors with file:line:col."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from gradrun.config.base import PathResolver
from gradrun.config.overrides import Overrides, apply_overrides
from gradrun.config.schema import RunConfig
from gradrun.config.validation_errors import config_issues
from gradrun.config.yaml_reader import Document, SourceMap, dotted, read_yaml
from gradrun.core.errors import ConfigError
from gradrun.core.remote import forget_versions


@dataclass(frozen=True)
class LoadedConfig:
    """A validated config and where its keys were written; `locations` is None for code."""

    config: RunConfig
    locations: SourceMap | None = None

    def location(self, key: str) -> str | None:
        """Return "file:line:column" of a dotted key or the section above it, if known."""
        location = self.locations.find_dotted(key) if self.locations else None
        return str(location) if location else None

    @contextmanager
    def error_locations(self) -> Iterator[None]:
        """Add file:line:col to a ConfigError from the block that names a key."""
        try:
            yield
        except ConfigError as error:
            if not (error.key and self.locations):
                raise
            location = self.locations.find_dotted(error.key)
            text = self.locations.annotate(f"{error.key}: {error}", location)
            raise type(error)(text) from error


ConfigSource = LoadedConfig | RunConfig | str | Path | Mapping[str, Any]
"""Types of a config argument: loaded, made in code, the path of a YAML file, or a mapping."""


def load_config(
    source: str | Path | Mapping[str, Any],
    overrides: Overrides = (),
    *,
    output_base: Path | None = None,
    source_name: str = "--set",
) -> LoadedConfig:
    """Read and validate a config.

    Args:
        source: the path of a YAML file, or its content as a mapping.
        overrides: "key.path=value" texts and options, or a mapping of dotted keys (or sections)
            to values; validated like the file.
        output_base: the folder where a relative output.path starts; default: the config's.
        source_name: the name of the overrides in error locations.

    Raises:
        ConfigError: lists every problem with its location.
    """
    forget_versions()
    if isinstance(source, Mapping):
        base = Path.cwd()
        document = Document("config", json.loads(json.dumps(source, default=str)))
    else:
        base = Path(os.path.abspath(source)).parent  # noqa: PTH100 - keep symbolic links
        document = read_yaml(Path(source))
    apply_overrides(document, overrides, source_name)
    config = _validate(document, PathResolver(base, output_base or base))
    document.raise_problems()
    assert config
    return LoadedConfig(config, document.locations)


def _validate(document: Document, paths: PathResolver) -> RunConfig | None:
    try:
        return RunConfig.model_validate_json(json.dumps(document.data), context=paths)
    except ValidationError as error:
        reported = {position for position, _ in document.problems}
        for issue in dict.fromkeys(config_issues(error.errors(), document.data)):
            location = document.locations.find(issue.key, of_key=issue.about_key)
            if location is None or (location.line, location.column) not in reported:
                text = f"{dotted(issue.key)}: {issue.text}" if issue.key else issue.text
                document.report(text, location)
    return None


def resolve_config(
    config: ConfigSource, overrides: Mapping[str, Any] | Sequence[str] = ()
) -> LoadedConfig:
    """Load a config argument of any accepted type and apply overrides to it."""
    if isinstance(config, RunConfig):
        config = LoadedConfig(config)
    if not isinstance(config, LoadedConfig):
        return load_config(config, overrides)
    return load_config(config.config.model_dump(mode="json"), overrides) if overrides else config


def is_trusted(trust_code: bool) -> bool:
    """Return whether the config may run code: by argument or by GRADRUN_TRUST_CODE=1."""
    return trust_code or os.environ.get("GRADRUN_TRUST_CODE") == "1"
