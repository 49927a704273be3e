"""Run a model or data that are in memory; the predictions are returned instead of written."""

from __future__ import annotations

import csv
import json
import mimetypes
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, Dataset

from gradrun.config.data import PythonData
from gradrun.config.load import ConfigSource, LoadedConfig, load_config, resolve_config
from gradrun.config.model import EagerModel
from gradrun.config.objects import (
    ObjectArrays,
    ObjectConfig,
    ObjectItems,
    ObjectModel,
    ObjectOutput,
    is_object,
)
from gradrun.config.schema import RunConfig
from gradrun.core.errors import ConfigError, Interrupted, RunFailed, first_line
from gradrun.core.optional import import_optional
from gradrun.core.units import format_number
from gradrun.data.objects import is_frame, read_inputs, read_labels
from gradrun.output import quarantine
from gradrun.output.formats import FORMATS, parquet
from gradrun.output.formats.memory import PredictionArrays
from gradrun.results.result import InferResult

_PLACEHOLDER_MODEL = {"source": "layers", "layers": ["Identity"]}
_PLACEHOLDER_DATA = {"source": "synthetic", "inputs": {"x": {"shape": [1]}}, "samples": 1}


@dataclass(frozen=True)
class Inference:
    """Predictions in memory, and the result of the run that made them."""

    predictions: dict[str, Any]
    """Output name to an array [samples, ...]; to a list of values if they are not rows of one
    shape, or if output.format is jsonl."""
    ids: Sequence[int | str]
    """The id of each sample: the index of a table, otherwise its position."""
    quarantined: tuple[dict[str, Any], ...]
    """Samples without a prediction: their position, id and error."""
    result: InferResult
    """Measurements, interpretation and warnings."""

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name} {_describe(rows)}" for name, rows in self.predictions.items())
        rate = format_number(self.result.measurements[0].throughput)
        return f"<Inference {shapes}; {rate} samples/s>"

    def _repr_html_(self) -> str:
        return self.result._repr_html_()


def _describe(rows: Any) -> str:
    if isinstance(rows, np.ndarray):
        return f"{rows.dtype} {list(rows.shape)}"
    return f"list of {len(rows)}"


def open_config(
    config: ConfigSource | None,
    model: Any,
    data: Any,
    labels: Any,
    overrides: Mapping[str, Any],
    folder: Path,
    *,
    as_files: bool,
) -> tuple[LoadedConfig, bool]:
    """Return a config with the objects, and whether the code that it names may run.

    Args:
        model: a module, or a section; None for that of the config.
        data: the data, or a section; None for that of the config.
        folder: a temporary folder, for lists of texts or files, and for predictions if no
            output.path is set.
        as_files: save the objects in the folder, for other processes.

    Raises:
        ConfigError: a value is of a kind that cannot be run.
    """
    own_path = folder / "predictions"
    sections: dict[str, Any] = {"output": {"path": str(own_path)}}
    if config is not None:
        sections |= resolve_config(config).config.model_dump(mode="json")
    own_model, own_data = is_object(model), is_object(data)
    _check_data(data)
    if own_model:
        _check_module(model)
        sections["model"] = _PLACEHOLDER_MODEL
        if as_files:
            sections["model"] = {"source": "python", "target": _save(model, folder, "model")}
    elif model is not None:
        sections["model"] = model
    if (listed := _as_files(data, folder)) is not None:
        sections["data"], own_data = listed, False
    elif own_data and _are_items(data):
        saved = _save(data, folder, "data") if as_files else f"memory:{type(data).__name__}"
        sections["data"] = {"source": "python", "target": saved}
    elif own_data:
        arrays = ObjectArrays(
            source="object",
            name=type(data).__name__,
            value=data,
            floats="float64" if _is_double(model) else "float32",
            labels=labels,
        )
        sections["data"] = _save_arrays(arrays, folder) if as_files else _PLACEHOLDER_DATA
    elif data is not None:
        sections["data"] = data
    if labels is not None and (not own_data or _are_items(data)):
        raise ConfigError("labels belong to arrays in memory; set data.labels otherwise", "data")
    for name in ("model", "data"):
        if name not in sections:
            raise ConfigError(f"{name} is missing: pass model=... and data=...")
    run = load_config(sections, overrides).config
    if not as_files:
        replaced = ObjectConfig(**dict(run))
        if own_model:
            options = {key: getattr(run.model, key) for key in EagerModel.model_fields}
            value = ObjectModel(source="object", name=type(model).__name__, value=model, **options)
            replaced = replaced.replace({"model": value})
        if own_data and isinstance(run.data, PythonData):
            replaced = replaced.replace({"data": ObjectItems(**dict(run.data), value=data)})
        elif own_data:
            changes = {"batch_size": run.data.batch_size, "call": run.data.call}
            replaced = replaced.replace({"data": arrays.model_copy(update=changes)})
        if run.output.path == own_path and run.output.format != "jsonl":
            keys = dict(run.output) | {"format": "npy", "arrays": PredictionArrays()}
            replaced = replaced.replace({"output": ObjectOutput.model_validate(keys)})
        run = replaced
    others = [sections[name] for name, own in (("model", own_model), ("data", own_data)) if not own]
    return LoadedConfig(run), not any("target" in other for other in others)


def _check_data(data: Any) -> None:
    if isinstance(data, str | bytes | Path):
        raise ConfigError(
            f"data is a {type(data).__name__}: pass a list of texts or files, an array such as "
            'numpy.load(...), or a section such as {"source": "arrays", "path": "x.npy"}',
            "data",
        )
    if isinstance(data, set | frozenset):
        raise ConfigError("data is a set, which has no order; pass a list", "data")


def _are_items(data: Any) -> bool:
    """Return whether samples are read one by one, as from a Dataset or a generator."""
    if isinstance(data, Dataset | DataLoader):
        return True
    known = isinstance(data, list | tuple | Mapping | torch.Tensor | str | bytes)
    arrays = known or hasattr(data, "dtype") or hasattr(data, "__array__")
    return not arrays and (hasattr(data, "__getitem__") or hasattr(data, "__iter__"))


def is_consumed(data: Any) -> bool:
    """Return whether data can be read only once, as those of a generator."""
    return hasattr(data, "__next__")


def _save(value: Any, folder: Path, section: str) -> str:
    """Save the object of a section for other processes; return the target that loads it.

    Raises:
        ConfigError: the object cannot be pickled.
    """
    cloudpickle = import_optional("cloudpickle", section)
    try:
        saved = cloudpickle.dumps(value)
    except Exception as error:  # hooks, locks or open files of the user's code
        raise ConfigError(
            f"the {type(value).__name__} cannot be sent to another process: "
            f"{type(error).__name__}: {first_line(error)}; put its class in a file, and use "
            f"{section}: {{source: python}}",
            section,
        ) from error
    (folder / f"{section}.pkl").write_bytes(saved)
    name = type(value).__name__
    (folder / f"{section}.py").write_text(_LOADER.format(name=name, section=section))
    return f"{folder / section}.py:{name}"


_LOADER = """\
import pathlib
import pickle


def {name}():
    return pickle.loads(pathlib.Path(__file__).with_name("{section}.pkl").read_bytes())
"""


def _save_arrays(given: ObjectArrays, folder: Path) -> dict[str, Any]:
    """Save arrays for other processes; return the section that loads them."""
    inputs, positional = read_inputs(given)
    section: dict[str, Any] = {"source": "arrays", "inputs": {}}
    for name, rows in inputs.items():
        path = folder / f"{len(section['inputs'])}.safetensors"
        save_file({"rows": rows.contiguous()}, path)
        section["inputs"][name] = {"path": str(path), "key": "rows"}
    if positional:
        section["call"] = "positional"
    if given.labels is not None:
        save_file({"rows": read_labels(given).contiguous()}, folder / "labels.safetensors")
        section["labels"] = {"path": str(folder / "labels.safetensors"), "key": "rows"}
    return section


def _check_module(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"model is a {type(model).__name__}, not a torch.nn.Module or a section such as "
            '{"source": "timm", "name": "resnet18"}',
            "model",
        )


def _is_double(model: Any) -> bool:
    return isinstance(model, nn.Module) and any(
        parameter.dtype == torch.float64 for parameter in model.parameters()
    )


@contextmanager
def restored(model: Any) -> Iterator[None]:
    """Restore the training mode of each module, and the device, which a run changes."""
    if not isinstance(model, nn.Module):
        yield
        return
    training = [(module, module.training) for module in model.modules()]
    device = next((parameter.device for parameter in model.parameters()), None)
    try:
        yield
    finally:
        for module, flag in training:
            module.training = flag
        if device is not None:
            model.to(device)


# --- lists of texts and files --------------------------------------------------------------------


def _as_files(data: Any, folder: Path) -> dict[str, Any] | None:
    """Return the section for a list of texts or of image files; None for other data."""
    if is_frame(data) and len(data.columns) == 1 and _are_texts(data.iloc[:, 0].tolist()):
        data = data.iloc[:, 0].tolist()
    elif hasattr(data, "tolist") and getattr(getattr(data, "dtype", None), "kind", "") in "OU":
        data = data.tolist()  # a Series or an array of texts
    if not isinstance(data, list | tuple) or not data:
        return None
    paths = all(isinstance(item, Path) for item in data)
    kinds = {_kind(item) for item in data} if paths or _are_texts(data) else {""}
    if kinds <= {"image"} or kinds <= {"audio"}:
        listed = folder / "files.csv"
        with listed.open("w", newline="") as file:
            rows = ([str(Path(item).resolve())] for item in data)
            csv.writer(file, quoting=csv.QUOTE_ALL).writerows([["path"], *rows])
        source = "images" if kinds == {"image"} else "audio"
        return {"source": source, "path": str(listed), "column": "path"}
    if paths:
        other = next(item for item in data if _kind(item) not in {"image", "audio"})
        raise ConfigError(f"{other} is neither an image nor an audio file", "data")
    if not _are_texts(data):
        if any(isinstance(item, str) for item in data):
            number, item = next((n, x) for n, x in enumerate(data) if not isinstance(x, str))
            raise ConfigError(f"item {number} of data is {item!r:.60}, not a text", "data")
        return None
    texts = folder / "texts.jsonl"
    with texts.open("w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in data)
    return {"source": "text", "path": str(texts), "field": "text"}


def _kind(file: str | Path) -> str:
    """Return "image" or "audio" by the suffix of a file name, or another kind of media."""
    return (mimetypes.guess_type(str(file))[0] or "").partition("/")[0]


def _are_texts(items: Sequence[Any]) -> bool:
    return all(isinstance(item, str) for item in items)


# --- predictions ---------------------------------------------------------------------------------


@contextmanager
def without_folder(folder: Path) -> Iterator[None]:
    """Replace the name of a temporary folder, which is removed, in the error of a run."""
    try:
        yield
    except (RunFailed, Interrupted) as error:
        text, found, _ = str(error).partition(f" are saved in {folder}")
        if not found:
            raise
        text += " are lost; with an output folder, output=..., they are kept"
        if isinstance(error, Interrupted):
            raise Interrupted(text, exit_code=error.exit_code, result=error.result) from None
        raise RunFailed(text, result=error.result) from error.__cause__


def format_is_set(config: RunConfig) -> bool:
    """Report whether the user chose the format of the files; a run in memory writes none."""
    output = config.output
    return not isinstance(output, ObjectOutput) and "format" in output.model_fields_set


def in_lines(config: RunConfig) -> RunConfig:
    """Return a config that writes lines of JSON, which have values of any size."""
    output = config.output
    if isinstance(output, ObjectOutput):
        return config.replace({"output": output.in_files("jsonl")})
    return config.replace({"output.format": "jsonl"})


def collect(result: InferResult, config: RunConfig, data: Any, temporary: Path) -> Inference:
    """Return the predictions of a run in memory.

    The result names no files in the temporary folder, which is removed.
    """
    output, folder = config.output, config.output.path
    if folder.is_relative_to(temporary):
        result = result.replace(files=(), info=result.info.replace(output_path=""))
    in_memory = output.arrays.arrays if isinstance(output, ObjectOutput) else None
    return Inference(
        predictions=_read(folder, output.format) if in_memory is None else in_memory,
        ids=_ids(data, result.predictions or 0),
        quarantined=tuple(_quarantined(folder)),
        result=result,
    )


def _read(folder: Path, form: str) -> dict[str, Any]:
    """Return the predictions of a run folder by output name."""
    parts: dict[str, list[Any]] = {}
    if form == "jsonl":  # values that are not one row of fixed shape, too
        with (folder / "predictions.jsonl").open() as file:
            for line in map(json.loads, file):
                for name in line.keys() - {"id"}:
                    parts.setdefault(name, []).append(line[name])
        return dict(parts)
    for _, rows in FORMATS[form].read(folder, ()):
        for name, values in rows.items():
            parts.setdefault(name, []).append(values)
    found: dict[str, Any] = {name: np.concatenate(arrays) for name, arrays in parts.items()}
    if form == "parquet":  # columns of values, which are not arrays
        for row in parquet.records(folder):
            if not (names := row.keys() - parts.keys() - {"id"}):
                break
            for name in names:
                found.setdefault(name, []).append(row[name])
    return found


def _quarantined(folder: Path) -> Iterator[dict[str, Any]]:
    path = folder / quarantine.FILE_NAME
    if path.exists():
        for line in path.read_text().splitlines():
            entry = json.loads(line)
            yield {"sample": entry["sample"], "id": entry["id"], "error": entry["error"]}


def _ids(data: Any, samples: int) -> Sequence[int | str]:
    index = getattr(data, "index", None)
    if index is None or callable(index):  # a list has a method of this name
        return range(samples)
    ids: list[int | str] = index.tolist()
    return ids
