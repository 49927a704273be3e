"""Prepare TorchScript code for runs in several gradient modes."""

from __future__ import annotations

from contextlib import suppress

import torch
from torch import nn

from gradrun.data.batch import Batch
from gradrun.inference.module_state import preserve_module_state


def compile_without_gradients(model: nn.Module, batch: Batch) -> None:
    """Let TorchScript parts of a model compile in no_grad, so that they run in every mode.

    Scripted code compiles in its first two calls and keeps that program. If these are in grad mode,
    the program saves tensors for a backward pass in every mode, and inference_mode forbids that.
    Copies of scripted modules share their program, so a new copy does not help. Errors of the model
    are ignored: they recur in the run, which reports them. The model's state is restored.
    """
    if not any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        return
    with suppress(Exception, SystemExit), preserve_module_state(model), torch.no_grad():
        for _ in range(2):
            copy = batch.map(torch.clone)
            model(*copy.args, **copy.kwargs)
