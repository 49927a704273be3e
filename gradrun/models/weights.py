"""Load weights into a module, from safetensors or from a checkpoint that weights_only can read."""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import safetensors
import safetensors.torch
import torch
from torch import nn

from gradrun.core.errors import ConfigError, first_line

_KEY = "model.weights"
_USUAL_KEYS = ("state_dict", "model", "model_state_dict")
_MAX_LISTED = 8

_LEGACY_PICKLES = 5
"""Pickles in a checkpoint of the format before torch 1.6, ahead of the storages."""

_MAX_TUPLE_ITEMS = 10_000_000
_MAX_TUPLE_DEPTH = 100


def load_weights(module: nn.Module, path: Path, nested_key: str | None) -> None:
    """Copy the tensors of a file into a module.

    Args:
        module: its state dict must have the same keys and shapes as the file.
        path: a .safetensors file or a checkpoint of torch.save.
        nested_key: key of the state dict in the checkpoint; default: the usual keys.

    Raises:
        ConfigError: the file cannot be read without running code, or does not fit the module.
    """
    state = _read(path, nested_key)
    expected = module.state_dict()
    problems = [
        *_listed("missing in the file", [key for key in expected if key not in state]),
        *_listed("not in the model", [key for key in state if key not in expected]),
        *_listed(
            "different shape",
            [
                f"{key} {list(state[key].shape)} (the model has {list(expected[key].shape)})"
                for key in expected
                if key in state
                and not nn.parameter.is_lazy(expected[key])  # takes the shape of the loaded tensor
                and state[key].shape != expected[key].shape
            ],
        ),
    ]
    if problems:
        raise ConfigError(f"{path} does not fit the model: {'; '.join(problems)}", _KEY)
    try:
        module.load_state_dict(dict(state))
    except Exception as error:  # for example sparse or quantized tensors for dense parameters
        raise ConfigError(f"{path} does not fit the model: {first_line(error)}", _KEY) from error


@contextmanager
def downloading(library: str, name: str) -> Iterator[None]:
    """Turn the errors of a library that downloads its own weights into a ConfigError."""
    try:
        yield
    except Exception as error:  # no network, no weights of that name, wrong arguments
        raise ConfigError(
            f"cannot get {library}'s weights of {name}: {type(error).__name__}: "
            f"{first_line(error)}; set model.weights to read them from a file",
            "model.pretrained",
        ) from error


def _listed(problem: str, keys: list[str]) -> list[str]:
    more = f" and {len(keys) - _MAX_LISTED} more" if len(keys) > _MAX_LISTED else ""
    return [f"{problem}: {', '.join(map(str, keys[:_MAX_LISTED]))}{more}"] if keys else []


def _read(path: Path, nested_key: str | None) -> Mapping[str, torch.Tensor]:
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path)
        except (safetensors.SafetensorError, OSError, ValueError, MemoryError) as error:
            raise ConfigError(f"{path} is not a valid safetensors file: {error}", _KEY) from error
    return _state_dict(_load_checkpoint(path), path, nested_key)


def _load_checkpoint(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            _check_size(file, path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except ConfigError:
        raise
    except pickle.UnpicklingError as error:
        with path.open("rb") as file:
            magic = file.read(2)
        if magic != b"PK" and not magic.startswith(b"\x80"):  # a zip archive, or a pickle
            raise ConfigError(f"{path} is not a checkpoint of torch.save", _KEY) from error
        raise ConfigError(
            f"{path} contains Python objects besides tensors, and unpickling them could run code; "
            "save a .safetensors file, or torch.save(model.state_dict(), ...)",
            _KEY,
        ) from error
    except Exception as error:  # torch raises many types of error for a damaged archive
        raise ConfigError(
            f"{path} is not a checkpoint of torch.save: {first_line(error):.200}", _KEY
        ) from error


# --- checkpoints that torch.load cannot handle -------------------------------------------------


def _check_size(file: IO[bytes], path: Path) -> None:
    """Refuse a checkpoint that expands without limit when torch.load reads it.

    torch.load allocates all that a compressed archive expands to. It also hashes dict keys, so
    that nested tuples in a few hundred bytes make it hang or overflow the C stack.
    """
    zipped = file.read(4) == b"PK\x03\x04"
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    if zipped:
        reader = torch._C.PyTorchFileReader(file)
        if _expanded_bytes(reader, file) > size:
            raise ConfigError(
                f"{path} is a compressed archive, which torch.save does not write; save it again "
                "with torch.save, or as a .safetensors file",
                _KEY,
            )
        _check_tuples(io.BytesIO(reader.get_record("data.pkl")), path)
        return
    for _ in range(_LEGACY_PICKLES):
        if file.tell() < size:
            _check_tuples(file, path)


def _expanded_bytes(reader: Any, file: IO[bytes]) -> int:
    if hasattr(reader, "get_record_size"):
        return sum(map(reader.get_record_size, reader.get_all_records()))
    with zipfile.ZipFile(file) as archive:  # for torch 2.11 and older
        return sum(member.file_size for member in archive.infolist())


def _check_tuples(file: IO[bytes], path: Path) -> None:
    """Follow the opcodes of one pickle, tracking only the size and depth of tuples.

    Raises:
        ConfigError: tuples are nested too deeply, or expand too far through repeated references.
        UnpicklingError: the pickle calls an object that is not a global; torch would format it.
        Exception: the pickle is damaged.
    """
    scalar, function = (0, 0), (0, -1)
    stack: list[tuple[int, int]] = []
    marks: list[int] = []
    memo: dict[Any, tuple[int, int]] = {}
    for opcode, argument, _ in pickletools.genops(file):
        name, before = opcode.name, opcode.stack_before
        if name == "MARK":
            marks.append(len(stack))
        elif "PUT" in name:
            memo[argument] = stack[-1]
        elif "GET" in name:
            stack.append(memo[argument])
        else:
            sliced = pickletools.markobject in before
            first = (
                marks.pop() - before.index(pickletools.markobject)
                if sliced
                else (len(stack) - len(before))
            )
            if first < 0:
                raise pickle.UnpicklingError("stack underflow")
            taken = stack[first:]
            del stack[first:]
            made = function if name == "GLOBAL" else (taken or [scalar])[0]
            if name in {"REDUCE", "NEWOBJ"} and made != function:
                raise pickle.UnpicklingError("calls an object that is not a global")
            if "TUPLE" in name or name in {"REDUCE", "NEWOBJ"}:
                items = len(taken) + sum(item[0] for item in taken)
                depth = 1 + max((item[1] for item in taken), default=0)
                if items > _MAX_TUPLE_ITEMS or depth > _MAX_TUPLE_DEPTH:
                    raise ConfigError(
                        f"{path} contains tuples nested without limit; save a .safetensors file",
                        _KEY,
                    )
                made = (items, depth)
            stack += [made] * len(opcode.stack_after)


def _state_dict(checkpoint: Any, path: Path, nested_key: str | None) -> Mapping[str, torch.Tensor]:
    if nested_key is not None:
        state = checkpoint
        whole = isinstance(checkpoint, Mapping) and nested_key in checkpoint
        for part in [nested_key] if whole else nested_key.split("."):
            state = state.get(part) if isinstance(state, Mapping) else None
        if not _is_state_dict(state):
            raise ConfigError(
                f"{path} has no state dict under {nested_key!r}; {_contents(checkpoint)}",
                "model.weights_key",
            )
        return state  # type: ignore[no-any-return]
    if _is_state_dict(checkpoint):
        return checkpoint  # type: ignore[no-any-return]
    for usual in _USUAL_KEYS:
        if isinstance(checkpoint, Mapping) and _is_state_dict(checkpoint.get(usual)):
            return checkpoint[usual]  # type: ignore[no-any-return]
    raise ConfigError(
        f"{path} has no state dict at the top or under {', '.join(_USUAL_KEYS)}; "
        f"{_contents(checkpoint)}; set model.weights_key to its key",
        _KEY,
    )


def _is_state_dict(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(isinstance(tensor, torch.Tensor) for tensor in value.values())
    )


def _contents(checkpoint: Any) -> str:
    if isinstance(checkpoint, Mapping):
        return "it contains " + ", ".join(f"{key!s:.100}" for key in list(checkpoint)[:_MAX_LISTED])
    return f"it contains a {type(checkpoint).__name__}"
