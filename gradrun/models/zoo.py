"""The networks that ship with gradrun, built from the files in models/.

Knows which file a name means and whether trained weights lie beside it; not what the network is.
"""

from __future__ import annotations

from torch import nn

from gradrun.config.model import ZooModel
from gradrun.core.resources import bundled
from gradrun.models.python import build, import_file
from gradrun.models.weights import load_weights


def open_model(config: ZooModel, *, trust_code: bool) -> nn.Module:
    """The network, with its trained weights where it has them and the config names no others."""
    folder = bundled("models")
    network = import_file(folder / f"{config.name}.py").build
    module = build(network, config.args, f"models/{config.name}.py")
    trained = folder / f"{config.name}.safetensors"
    if trained.exists() and not config.weights:
        load_weights(module, trained, None)
    return module
