"""The networks that ship with gradrun, in the folder models/."""

from __future__ import annotations

from gradrun.config.model import ZooModel
from gradrun.core.imports import import_file
from gradrun.core.resources import bundled
from gradrun.models.loaded import LoadedModel
from gradrun.models.python import build_module
from gradrun.models.weights import load_weights


def open_model(config: ZooModel, *, trust_code: bool) -> LoadedModel:
    """Build the network and load its trained weights, unless the config names other weights."""
    folder = bundled("models")
    network = import_file(folder / f"{config.name}.py").build
    module = build_module(network, config.args, f"models/{config.name}.py")
    trained = folder / f"{config.name}.safetensors"
    if trained.exists() and not config.weights:
        load_weights(module, trained, None)
        return LoadedModel(module, files=(trained,))
    return LoadedModel(module)
