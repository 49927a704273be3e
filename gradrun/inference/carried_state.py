"""Find models whose predictions depend on earlier batches."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from gradrun.data.batch import Batch
from gradrun.inference.module_state import preserve_module_state
from gradrun.output.columns import close
from gradrun.output.transforms import Outputs

_MAX_LISTED = 3


def carried_state(
    model: nn.Module, batch: Batch, predict: Callable[[Batch], Outputs]
) -> str | None:
    """Run a batch twice, and describe the state that changes its outputs; None without such state.

    Models that draw random numbers, and outputs that differ by rounding on a device, pass. The
    state of the model is restored.

    Args:
        model: the model that `predict` runs.
        batch: a small batch.
        predict: returns the outputs of a batch.

    Returns:
        The names of up to three buffers or attributes, such as " (rnn.hidden)"; empty if the state
        is not in a module.

    Raises:
        Exception: the model fails.
    """
    with preserve_module_state(model) as changed:
        random_state = _random_state(batch)
        first = {name: rows.clone() for name, rows in predict(batch.map(torch.clone)).items()}
        second = predict(batch.map(torch.clone))
        tolerance = 0.0 if all(tensor.is_cpu for tensor in batch.tensors()) else 1e-3
        same = all(close(rows, second[name], tolerance) for name, rows in first.items())
        if same or not torch.equal(random_state, _random_state(batch)):
            return None
        names = changed()
    return f" ({', '.join(names[:_MAX_LISTED])})" if names else ""


def _random_state(batch: Batch) -> torch.Tensor:
    """The states of torch's generators for the CPU and the device of a batch."""
    devices = {tensor.device for tensor in batch.tensors()}
    states = [torch.cuda.get_rng_state(device) for device in devices if device.type == "cuda"]
    return torch.cat([torch.get_rng_state(), *states])
