"""Open data sources from a config section, and read them completely."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter

from gradrun.config.data import DataConfig
from gradrun.core.errors import ConfigError, SampleError
from gradrun.data import open_data
from gradrun.data.batch import Batch
from gradrun.data.source import BatchSource


def data(source: str, seed: int = 0, **keys: Any) -> BatchSource:
    keys = {"source": source, **keys}
    config: Any = TypeAdapter(DataConfig).validate_json(json.dumps(keys, default=str))
    return open_data(config, seed=seed)


def joined(batches: Iterable[Batch], name: str | None = None) -> torch.Tensor:
    """Concatenate one input of all batches."""
    return torch.cat([b.kwargs[name] if name else b.args[0] for b in batches])


def data_error(source: str, **keys: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        list(data(source, **keys).batches())
    return str(caught.value)


def read_all(source: BatchSource) -> None:
    """Read every batch; raises the first error of a sample."""
    for batch in source.batches():
        batch.raise_errors()


def data_problem(source: str, **keys: Any) -> str:
    """The first error of the data, whether it concerns the file or one sample."""
    with pytest.raises((ConfigError, SampleError)) as caught:
        read_all(data(source, **keys))
    return str(caught.value)
