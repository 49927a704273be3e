"""A small config, written with replacements."""

from __future__ import annotations

from pathlib import Path

import pytest

from gradrun.config.load import load_config
from gradrun.core.errors import ConfigError

CONFIG = """\
model:
  source: layers
  layers: [{Linear: [4, 3]}, ReLU]
data:
  source: synthetic
  inputs: {x: {shape: [4]}}
  samples: 7
run:
  mode: no_grad
output:
  path: out
"""


def write(old: str = "", new: str = "") -> str:
    assert CONFIG.count(old) == 1 or not old
    Path("c.yaml").write_text(CONFIG.replace(old, new) if old else CONFIG, encoding="utf-8")
    return "c.yaml"


def errors(old: str = "", new: str = "", *sets: str) -> str:
    """Return the errors of loading the config with `old` replaced by `new`."""
    with pytest.raises(ConfigError) as caught:
        load_config(write(old, new), sets)
    return str(caught.value)
