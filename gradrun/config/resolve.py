"""The public functions, one a file, where the parts meet: each is a job from config to result.

Here stands what they share. Knows no parts itself, so that a job imports only what it needs.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gradrun.config.load import load_config
from gradrun.config.schema import RunConfig


def resolve_config(
    config: RunConfig | str | Path | Mapping[str, Any],
    overrides: Mapping[str, Any] | Sequence[str],
) -> RunConfig:
    """A config from whatever a caller gave, with the overrides (or --set texts) in it."""
    if not isinstance(config, RunConfig):
        return load_config(config, overrides)
    return load_config(config.model_dump(mode="json"), overrides) if overrides else config


def is_trusted(trust_code: bool) -> bool:
    """Whether the user lets a config's code run, by argument or environment."""
    return trust_code or os.environ.get("GRADRUN_TRUST_CODE") == "1"
