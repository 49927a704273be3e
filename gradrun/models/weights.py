"""Load weights into a module, from safetensors or from a checkpoint that weights_only can read."""

from __future__ import annotations

import copy
import hashlib
import io
import os
import pickle
import pickletools
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import IO, Any

import safetensors
import safetensors.torch
import torch
from torch import nn

from gradrun.core.errors import ConfigError, first_line
from gradrun.core.options import option
from gradrun.core.units import first_names
from gradrun.results.result import Statement

State = dict[str, Any]
"""A state dict: name to tensor, or to packed parameters or extra state."""

_KEY = "model.weights"
_USUAL_KEYS = ("state_dict", "model", "model_state_dict")
_COMPILED = "_orig_mod."
"""Name of the module in a wrapper of torch.compile."""
_MAX_LISTED = 8
_HASHED_BLOCKS, _HASHED_BLOCK_BYTES = 256, 1024 * 1024

_LEGACY_PICKLES = 5
"""Pickles in a checkpoint of the format before torch 1.6, ahead of the storages."""

_MAX_TUPLE_ITEMS = 10_000_000
_MAX_TUPLE_DEPTH = 100


def load_weights(
    module: nn.Module, path: Path, nested_key: str | None, *, trust_code: bool = False
) -> tuple[Statement, ...]:
    """Copy the tensors of a file into a module, as its load_state_dict accepts them.

    A prefix of wrappers that all keys share, such as DDP's `module.`, is removed if the module
    does not have it.

    Args:
        module: the module; tensors that it shares need only one of their names in the file.
        path: a .safetensors file or a checkpoint of torch.save.
        nested_key: key of the state dict in the checkpoint; default: the usual keys.

    Returns:
        The changes that were made to the keys.

    Raises:
        ConfigError: the file cannot be read without running code, or does not fit the module.
    """
    state = _read(path, nested_key, trust_code)
    expected = module.state_dict(keep_vars=True)
    state, renamed = _fit_keys(state, expected)
    _add_shared_names(state, expected)
    try:
        module.load_state_dict(state)
    except Exception as error:  # a module may have a load_state_dict of its own
        problems = _mismatches(state, expected) or [first_line(error)]
        problems += _partial_prefix(state, expected)
        raise ConfigError(f"{path} does not fit the model: {'; '.join(problems)}", _KEY) from error
    return tuple(Statement(topic="weights", text=text) for text in renamed)


def _fit_keys(state: State, expected: State) -> tuple[State, list[str]]:
    """Remove the prefixes of wrappers from the keys, or add that of the module.

    Returns:
        The state dict, and a description of each change.
    """
    renamed = []
    if any(_COMPILED in key for key in state) and not any(_COMPILED in key for key in expected):
        state = {key.replace(_COMPILED, ""): value for key, value in state.items()}
        renamed.append(f"{_COMPILED!r} of torch.compile removed from the keys")
    if prefix := _wrapper_prefix(state, expected):
        # torch also renames the versions of modules, which it stores beside the keys.
        nn.modules.utils.consume_prefix_in_state_dict_if_present(state, prefix)
        renamed.append(f"prefix {prefix!r} removed from all keys")
    elif prefix := _wrapper_prefix(expected, state):
        state = {prefix + key: value for key, value in state.items()}
        renamed.append(f"prefix {prefix!r} added to all keys")
    return state, renamed


def _wrapper_prefix(wrapped: State, plain: State) -> str:
    """Return the dotted prefix of all keys of `wrapped` that those of `plain` lack, or ""."""
    if any(key in plain for key in wrapped):
        return ""
    levels = zip(*(key.split(".")[:-1] for key in wrapped), strict=False)
    parts = [level[0] for level in takewhile(lambda level: len({*level}) == 1, levels)]
    prefixes = [".".join(parts[:count]) + "." for count in range(1, len(parts) + 1)]
    return next(
        (
            prefix
            for prefix in prefixes
            if any(key.removeprefix(prefix) in plain for key in wrapped)
        ),
        "",
    )


def _partial_prefix(state: State, expected: State) -> list[str]:
    """Describe a prefix of some keys, if these would fit without it."""
    for prefix in dict.fromkeys(key.partition(".")[0] + "." for key in state):
        fitting = [key for key in state if key.removeprefix(prefix) in expected]
        if fitting and not any(key in expected for key in state):
            others = [key for key in state if key not in fitting]
            return [
                f"{len(fitting)} of {len(state)} keys fit without their prefix {prefix!r}; save "
                f"the file without {first_names(others, _MAX_LISTED)}"
            ]
    return []


def _add_shared_names(state: State, expected: State) -> None:
    """Add the names of tensors that the module shares with a name in the file."""
    stored = {_identity(tensor): key for key, tensor in expected.items() if key in state}
    for key, tensor in expected.items():
        if key not in state and _identity(tensor) in stored:
            state[key] = state[stored[_identity(tensor)]]


def _identity(value: Any) -> Any:
    """Return the place of a tensor in memory and its shape; lazy tensors have no place."""
    if not isinstance(value, torch.Tensor) or nn.parameter.is_lazy(value) or not value.numel():
        return id(value)
    return value.data_ptr(), value.shape, value.stride()


def _mismatches(state: State, expected: State) -> list[str]:
    return [
        *_listed("missing in the file", [key for key in expected if key not in state]),
        *_listed("not in the model", [key for key in state if key not in expected]),
        *_listed(
            "different shape",
            [
                f"{key} {list(state[key].shape)} (the model has {list(value.shape)})"
                for key, value in expected.items()
                if isinstance(value, torch.Tensor)
                and isinstance(state.get(key), torch.Tensor)
                and not nn.parameter.is_lazy(value)  # takes the shape of the loaded tensor
                and state[key].shape != value.shape
            ],
        ),
    ]


def describe_file(path: Path) -> str:
    """Return the name of a file and the start of its SHA-256.

    Files of up to 256 MiB are read whole, which takes about 0.3 s. Of larger files, 256 evenly
    spaced blocks of 1 MiB are read, and the text calls the hash sampled.
    """
    digest = hashlib.sha256()
    try:
        size = path.stat().st_size
        sampled = size > _HASHED_BLOCKS * _HASHED_BLOCK_BYTES
        with path.open("rb") as file:
            for block in range(_HASHED_BLOCKS):
                if sampled:
                    file.seek((size - _HASHED_BLOCK_BYTES) * block // (_HASHED_BLOCKS - 1))
                digest.update(file.read(_HASHED_BLOCK_BYTES))
    except OSError:  # it was removed after the model was loaded
        return path.name
    return f"{path.name} ({'sampled ' if sampled else ''}sha256 {digest.hexdigest()[:8]})"


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
    return [f"{problem}: {first_names(keys, _MAX_LISTED)}"] if keys else []


def _read(path: Path, nested_key: str | None, trust_code: bool) -> State:
    """Return the state dict in a file, as a dict of its own."""
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path)
        except (safetensors.SafetensorError, OSError, ValueError, MemoryError) as error:
            raise ConfigError(f"{path} is not a valid safetensors file: {error}", _KEY) from error
    state = _state_dict(_load_checkpoint(path, trust_code), path, nested_key)
    _check_storages(state, path)
    return copy.copy(state)


def _load_checkpoint(path: Path, trust_code: bool) -> Any:
    try:
        with path.open("rb") as file:
            _check_size(file, path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types of error for a damaged archive
        if trust_code:
            return _unpickle(path)
        if isinstance(error, ConfigError):
            raise
        if not isinstance(error, pickle.UnpicklingError):
            raise ConfigError(
                f"{path} is not a checkpoint of torch.save: {first_line(error):.200}", _KEY
            ) from error
        with path.open("rb") as file:
            magic = file.read(2)
        if magic != b"PK" and not magic.startswith(b"\x80"):  # a zip archive, or a pickle
            raise ConfigError(f"{path} is not a checkpoint of torch.save", _KEY) from error
        raise ConfigError(
            f"{path} contains Python objects besides tensors, and unpickling them could run code; "
            "save a .safetensors file, or torch.save(model.state_dict(), ...), or pass "
            f"{option('trust_code')} if you trust the file",
            _KEY,
        ) from error


def _unpickle(path: Path) -> Any:
    """Load a trusted checkpoint with all of its objects, which may run code."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.load warns about archives of torch.jit.save
            return torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:  # unpickling calls code of any library
        raise ConfigError(
            f"{path} cannot be read by torch.load: {type(error).__name__}: "
            f"{first_line(error):.200}",
            _KEY,
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


def _check_storages(state: State, path: Path) -> None:
    """Refuse tensors that are larger than their records; torch 2.6 reads the memory beyond them."""
    if hasattr(torch._C.PyTorchFileReader, "get_record_size") or not zipfile.is_zipfile(path):
        return  # newer torch compares the sizes
    tensors = (value for value in state.values() if isinstance(value, torch.Tensor))
    storages = (x.untyped_storage() for x in tensors if x.layout == torch.strided)
    wanted = {storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes()}
    with zipfile.ZipFile(path) as archive:
        records = Counter(member.file_size for member in archive.infolist())
    if Counter(wanted.values()) - records:
        raise ConfigError(
            f"{path} is not a checkpoint of torch.save: a tensor is larger than its record", _KEY
        )


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


def _state_dict(checkpoint: Any, path: Path, nested_key: str | None) -> State:
    if nested_key is not None:
        state = checkpoint
        whole = isinstance(checkpoint, Mapping) and nested_key in checkpoint
        for part in [nested_key] if whole else nested_key.split("."):
            state = state.get(part) if isinstance(state, Mapping) else None
        found = _as_state_dict(state)
        if found is None:
            raise ConfigError(
                f"{path} has no state dict under {nested_key!r}; {_contents(checkpoint)}",
                "model.weights_key",
            )
        return found
    candidates = [checkpoint]
    if isinstance(checkpoint, Mapping):
        candidates += [checkpoint.get(usual) for usual in _USUAL_KEYS]
    for candidate in candidates:
        if (found := _as_state_dict(candidate)) is not None:
            return found
    raise ConfigError(
        f"{path} has no state dict at the top or under {', '.join(_USUAL_KEYS)}; "
        f"{_contents(checkpoint)}; set model.weights_key to its key",
        _KEY,
    )


def _as_state_dict(value: Any) -> State | None:
    """Return a state dict, or that of a pickled module; None for another object."""
    if isinstance(value, nn.Module):
        return value.state_dict()
    if isinstance(value, dict) and value and all(map(_is_entry, value.keys(), value.values())):
        return value
    return None


def _is_entry(key: Any, value: Any) -> bool:
    """Return whether key and value belong into a state dict: tensors, packed or extra state."""
    if not isinstance(key, str):
        return False
    name = key.rpartition(".")[2]
    return isinstance(value, torch.Tensor) or name in {"_extra_state", "_packed_params", "dtype"}


def _contents(checkpoint: Any) -> str:
    if isinstance(checkpoint, Mapping):
        return "it contains " + ", ".join(f"{key!s:.100}" for key in list(checkpoint)[:_MAX_LISTED])
    return f"it contains a {type(checkpoint).__name__}"
