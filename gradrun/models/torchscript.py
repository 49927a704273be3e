"""A model from torch.jit.save, run as it was scripted or traced.

Knows the file and which of TorchScript's operators reach beyond the model.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import torch
from torch import nn

from gradrun.config.model import TorchScriptModel
from gradrun.core.errors import ConfigError
from gradrun.models.archives import HostileError, opened
from gradrun.models.pickles import check_storages

# TorchScript is no Python: what it can do to the world outside, it does through these operators
# and those that extensions register.
_REACHES_OUT = re.compile(
    r"\.\s*(?P<file>save|from_file)\b"
    r"|\bops\s*\.\s*(?!(?:aten|prim|quantized|torchvision)\b)(?P<extension>\w+)"
)
_COMMENT = re.compile(r"#.*|\\\n")


def open_model(config: TorchScriptModel, *, trust_code: bool) -> nn.Module:
    """The scripted module, on the CPU."""
    try:
        if not trust_code:
            _inspect(config.path)
        with warnings.catch_warnings():
            # torch.jit announces its own retirement at every load; the user did not ask.
            warnings.simplefilter("ignore", DeprecationWarning)
            module: nn.Module = torch.jit.load(str(config.path), map_location="cpu")  # type: ignore[no-untyped-call]
    except ConfigError:
        raise
    except Exception as error:  # a damaged archive fails in any of a dozen ways
        raise ConfigError(
            f"{config.path} is no TorchScript archive that torch {torch.__version__} reads; "
            "it is written by torch.jit.save (source: exported reads torch.export's .pt2)",
            "model.path",
        ) from error
    return module


def _inspect(path: Path) -> None:
    """Refuse a program that could write files, or read memory that is not its own.

    Loading alone may run some of it.

    Read as torch's own reader sees the archive, before torch.jit sees it.
    """
    try:
        with path.open("rb") as file:
            reader = opened(file)
            check_storages(reader)
    except HostileError as error:
        raise ConfigError(
            f"{path} {error}; if you trust the file, run with --trust-code", "model.path"
        ) from error
    reader = torch._C.PyTorchFileReader(str(path))
    for name in reader.get_all_records():
        if not name.endswith(".py"):
            continue
        code = _COMMENT.sub("", reader.get_record(name).decode("utf-8", errors="replace"))
        if found := _REACHES_OUT.search(code):
            what = found["file"] or f"an operator of {found['extension']}"
            raise ConfigError(
                f"{path} uses {what}, which reaches beyond the model (to files, say), and nothing "
                "was run; if you trust the file, run with --trust-code",
                "model.path",
            )
