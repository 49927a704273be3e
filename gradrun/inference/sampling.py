"""Take the first batches of a data source, for comparisons and audits."""

from __future__ import annotations

import torch

from gradrun.config.schema import RunConfig
from gradrun.core.errors import ConfigError
from gradrun.data import open_data
from gradrun.data.batch import Batch, transfer_to
from gradrun.data.source import BatchSource, read_one, whole_batches
from gradrun.inference.meters.cpu_memory import storage_bytes

_MAX_BATCHES = 8
_MAX_BYTES = 64 * 1024 * 1024


def batch_number(
    config: RunConfig, device: torch.device, number: int, *, trust_code: bool = False
) -> Batch | None:
    """Return a copy of one batch, on `device`; None if the data have no such batch."""
    data = open_data(
        config.data, seed=config.run.seed, model=config.model, device=device, trust_code=trust_code
    )
    batch = read_one(data, number * data.batch_size)
    if batch is None or batch.errors:
        return None
    move = transfer_to(device, getattr(config.model, "dtype", None))
    return (move(batch) if move else batch).map(torch.clone)


def first_batches(
    config: RunConfig, device: torch.device, data: BatchSource | None = None
) -> list[Batch]:
    """Return copies of the first full batches, on `device`.

    Batches with unreadable samples are skipped. At most 8 batches are returned, and fewer if they
    exceed 64 MiB.

    `data` is the opened data of the config; default: open it.

    Raises:
        ConfigError: every batch has a sample that cannot be read.
    """
    if data is None:
        data = open_data(config.data, seed=config.run.seed, model=config.model, device=device)
    move = transfer_to(device, getattr(config.model, "dtype", None))
    batches: list[Batch] = []
    size, error = 0, ""
    last, variable = _MAX_BATCHES * data.batch_size, whole_batches(data) != data.batch_size
    for batch in data.batches(0, min(last, data.samples or last)):
        if batch.errors:
            error = str(next(iter(batch.errors.values())))
            continue
        if batches and batch.size < batches[0].size and not variable:
            break
        batches.append((move(batch) if move else batch).map(torch.clone))
        size += storage_bytes(batches[-1].tensors())
        if len(batches) == _MAX_BATCHES or size > _MAX_BYTES:
            break
    if not batches:
        text = f"every batch has a sample that cannot be read: {error}"
        raise ConfigError(text, config.data.location)
    return batches
