"""Open the data of a config: the table of data sources, and the checks that all sources share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import psutil
import torch

from gradrun.config.data import DataConfig
from gradrun.config.model import ModelConfig
from gradrun.core.errors import ConfigError
from gradrun.core.imports import require_trust
from gradrun.core.units import format_bytes
from gradrun.data import arrays, audio, images, objects, python, records, synthetic, text
from gradrun.data.source import BatchSource, OpeningFacts

SOURCES: dict[str, Callable[[Any, OpeningFacts], BatchSource]] = {
    "arrays": arrays.open_data,
    "synthetic": synthetic.open_data,
    "records": records.Records,
    "text": text.Texts,
    "images": images.Images,
    "audio": audio.Audio,
    "object": objects.open_data,
    "python": python.open_data,
}
"""data.source -> opener of its data section."""

_CPU = torch.device("cpu")


def open_data(
    config: DataConfig,
    *,
    seed: int,
    model: ModelConfig | None = None,
    model_classes: Sequence[str] = (),
    device: torch.device = _CPU,
    trust_code: bool = False,
    keep: Sequence[str] = (),
) -> BatchSource:
    """Open a data source; read headers and count samples, not the data.

    Args:
        seed: of synthetic data.
        model: the model section, which may provide the tokenizer or the preprocessing.
        model_classes: the class names of the model, which labels may use without data.classes.
        device: of the model; defaults of some keys depend on it.
        trust_code: allow code of the config to run.
        keep: columns that are written beside the predictions; for records and texts only.

    Raises:
        ConfigError: the data need trust, a file is missing, damaged or empty, or a batch would not
            fit in memory.
    """
    for key, target in config.targets().items():
        require_trust(trust_code, f"{target} is Python code", f"data.{key}")
    config = config.with_defaults(model, device.type)
    facts = OpeningFacts(seed, model, model_classes, keep)
    data = SOURCES[config.source](config, facts)
    if data.samples == 0:
        raise ConfigError("the data contains no samples", config.location)
    batch = min(data.batch_size, data.samples or data.batch_size) * data.sample_bytes
    free = psutil.virtual_memory().available
    if batch > free:
        raise ConfigError(
            f"one batch needs {format_bytes(batch)}, but only {format_bytes(free)} of memory is "
            f"free; one sample has {format_bytes(data.sample_bytes)}, so choose a smaller batch",
            "data.batch_size",
        )
    return data
