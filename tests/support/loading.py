"""Load one model source from a config, or expect an error."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import nn

from gradrun.config.model import ModelConfig
from gradrun.core.errors import ConfigError
from gradrun.models import load_model

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


def load(source: str, *, trust_code: bool = False, **keys: Any) -> nn.Module:
    config = {"source": source, **keys}
    parsed: Any = TypeAdapter(ModelConfig).validate_json(json.dumps(config, default=str))
    return load_model(parsed, torch.device("cpu"), trust_code=trust_code).module


def load_error(source: str, *, trust_code: bool = False, **keys: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load(source, trust_code=trust_code, **keys)
    return caught.value
