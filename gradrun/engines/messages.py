"""Messages between the driver of a run and its workers, encoded without pickled objects."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import torch

from gradrun.output.columns import ValueColumn, value_bytes
from gradrun.output.transforms import Outputs
from gradrun.results.result import Environment, Generation, Memory, Padding


class TensorData(msgspec.Struct, frozen=True, array_like=True, tag="tensor"):
    """A tensor as its dtype, shape and bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: memoryview
    """Of the message when it is decoded, so that rows are not copied."""


class ValueData(msgspec.Struct, frozen=True, array_like=True, tag="values"):
    """A column of values; tensors are extensions of the message format."""

    values: list[Any]


class Open(msgspec.Struct, frozen=True, kw_only=True, tag="open"):
    """Driver to worker: the run to prepare for."""

    config: dict[str, Any]
    trust_code: bool


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag="ready"):
    """Worker to driver: the model runs."""

    node: str
    environment: Environment
    files: dict[str, dict[str, Any]]
    """Fingerprint of each input file, as in the header of the journal."""
    checksum: int
    """CRC-32 of the outputs of the first batch."""
    load_seconds: float
    open_seconds: float
    first_batch_seconds: float
    batch_seconds: float
    """Forward seconds of the first batch when it ran again."""
    samples: int
    batch_size: int
    whole_batches: int = 0
    """Samples of which every multiple is the start of a batch."""
    unit: int = 0
    """Samples at whose multiples a task may start: a batch, or a chunk of grouped batches."""
    varies: bool = False
    """Whether the work per sample depends on its length."""
    memory: Memory = Memory(weights=0, inputs=0)
    """Bytes of the weights and of the first batch."""
    modules: dict[str, int] = {}
    """Number of modules of the model by type, including base classes, such as Linear."""


class Task(msgspec.Struct, frozen=True, kw_only=True, tag="task"):
    """Driver to worker: the samples to run, in the order of the run."""

    start: int
    stop: int
    threads: int | None = None
    """Run on all CPUs with this many threads, to measure; default: as the config says."""
    rows: bool = True
    """Return the outputs; False if the task is only timed."""


class Rows(msgspec.Struct, frozen=True, kw_only=True, tag="rows"):
    """Outputs of consecutive samples."""

    outputs: dict[str, TensorData | ValueData]
    size: int
    """Number of samples."""
    ids: list[Any] | int
    """The ids, or the first one if they are consecutive numbers."""
    valid: TensorData | None
    """Mask of the samples with a prediction; None if all have one."""

    @property
    def nbytes(self) -> int:
        """Size of the outputs in memory."""
        return sum(
            sum(map(value_bytes, packed.values))
            if isinstance(packed, ValueData)
            else len(packed.data)
            for packed in self.outputs.values()
        )


class Quarantined(msgspec.Struct, frozen=True, kw_only=True, tag="quarantined"):
    """One sample without a prediction: the arguments of Quarantine.add()."""

    sample: int
    id: Any
    error: Any
    details: Any


class Done(msgspec.Struct, frozen=True, kw_only=True, tag="done"):
    """Worker to driver: the result of a task."""

    start: int
    stop: int
    events: list[Rows | Quarantined] = []
    """In the order in which a single process would have written them."""
    positions: list[int] | None = None
    """Input position of each sample; None if samples run in the order of the input."""
    batch_seconds: bytes = b""
    """Forward time of each batch, as float64."""
    batch_sizes: bytes = b""
    """Samples of each batch, as int64."""
    recovered: int = 0
    """Samples of failed batches, which are not timed."""
    data_seconds: float = 0.0
    seconds: float = 0.0
    """Wall time of the task."""
    padding: Padding | None = None
    generation: Generation | None = None
    flags: bytes = b""
    """What the data source noted about each sample, in the dtype of BatchSource.flags."""
    batch_limit: int | None = None
    limited_from: int = 0
    process_peak: int | None = None
    error: Any = None
    """The error that ended the run at the samples after the last event; None if there is none."""
    resume_options: str = ""
    """Options without which a resume would fail at the same sample."""
    interrupted: bool = False
    """Whether a KeyboardInterrupt of the model ended the run."""
    batch_elements: bytes = b""
    """Elements of the inputs of each batch, as int64."""
    largest: tuple[int, int, int] = (0, 0, 0)
    """Elements, first sample and size of the largest batch."""
    waited: float = 0.0
    """Share of the time in which a thread could run and waited for a CPU; that of the longest."""


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag="failed"):
    """Worker to driver: the run cannot be prepared."""

    error: Any
    invalid: bool = False
    """Whether the config, the model or the data are invalid, as ConfigError says."""


Request = Open | Task
Reply = Ready | Done | Failed

_TENSOR, _JSON = 1, 2
"""Codes of extensions: a tensor in a column of values, and a value that msgpack cannot represent.

Those are whole numbers of more than 64 bits and names of files that are not UTF-8. Fields that may
contain them are of type Any.
"""


def _encode_tensor(value: Any) -> msgspec.msgpack.Ext:
    return msgspec.msgpack.Ext(_TENSOR, msgspec.msgpack.encode(pack_tensor(value)))


def _escaped(value: Any) -> Any:
    """Return a message whose values msgpack can represent."""
    if isinstance(value, msgspec.Struct):
        fields = {name: _escaped(getattr(value, name)) for name in value.__struct_fields__}
        return msgspec.structs.replace(value, **fields)
    if isinstance(value, list | tuple):
        return [*map(_escaped, value)]
    if isinstance(value, dict):
        return {name: _escaped(item) for name, item in value.items()}
    try:
        msgspec.msgpack.encode(value if isinstance(value, str | int) else None)
    except (UnicodeEncodeError, OverflowError):
        return msgspec.msgpack.Ext(_JSON, json.dumps(value).encode())
    return value


def _decode_extension(code: int, data: memoryview) -> Any:
    if code == _JSON:
        return json.loads(bytes(data))
    # A copy, so that a single value does not keep the whole message.
    return unpack_tensor(msgspec.msgpack.decode(bytearray(data), type=TensorData))


_ENCODER: Any = msgspec.msgpack.Encoder(enc_hook=_encode_tensor)
_REQUESTS: Any = msgspec.msgpack.Decoder(Request, ext_hook=_decode_extension)
_REPLIES: Any = msgspec.msgpack.Decoder(Reply, ext_hook=_decode_extension)


def encode(message: Request | Reply) -> bytes:
    """Return a message as bytes."""
    try:
        data: bytes = _ENCODER.encode(message)
    except (UnicodeEncodeError, OverflowError):
        data = _ENCODER.encode(_escaped(message))
    return data


def decode_request(data: bytes | bytearray) -> Request:
    """Parse a message to a worker.

    Raises:
        ValueError: the bytes are not such a message.
    """
    request: Request = _REQUESTS.decode(data)
    return request


def decode_reply(data: bytes | bytearray) -> Reply:
    """Parse a message of a worker; tensors can be written to if `data` can.

    Raises:
        ValueError: the bytes are not such a message.
    """
    reply: Reply = _REPLIES.decode(data)
    return reply


def pack_tensor(tensor: torch.Tensor) -> TensorData:
    """Encode a CPU tensor of any dtype."""
    name = str(tensor.dtype).removeprefix("torch.")
    return TensorData(name, tuple(tensor.shape), tensor_bytes(tensor))


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the values of a CPU tensor in row-major order, without a copy if they are so."""
    if not tensor.numel():
        return memoryview(b"")
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data


def unpack_tensor(packed: TensorData) -> torch.Tensor:
    """Decode a tensor, which shares the memory of the message."""
    dtype = getattr(torch, packed.dtype)
    if not packed.data:
        return torch.empty(packed.shape, dtype=dtype)
    values = torch.from_numpy(np.frombuffer(packed.data, np.uint8))
    return values.view(dtype).reshape(packed.shape)


def pack_column(column: torch.Tensor | ValueColumn) -> TensorData | ValueData:
    """Encode a column."""
    if isinstance(column, ValueColumn):
        return ValueData(column.values)
    return pack_tensor(column)


def unpack_column(packed: TensorData | ValueData) -> torch.Tensor | ValueColumn:
    """Decode a column; a tensor shares the memory of the message."""
    return ValueColumn(packed.values) if isinstance(packed, ValueData) else unpack_tensor(packed)


def pack_rows(outputs: Outputs, ids: Sequence[int | str], valid: torch.Tensor | None) -> Rows:
    """Encode the arguments of PredictionWriter.write()."""
    return Rows(
        outputs={name: pack_column(column) for name, column in outputs.items()},
        size=len(ids),
        ids=ids.start if isinstance(ids, range) else list(ids),
        valid=None if valid is None else pack_tensor(valid),
    )


def unpack_rows(rows: Rows) -> tuple[Outputs, Sequence[int | str], torch.Tensor | None]:
    """Decode the arguments of PredictionWriter.write()."""
    outputs = {name: unpack_column(packed) for name, packed in rows.outputs.items()}
    first = rows.ids
    ids = range(first, first + rows.size) if isinstance(first, int) else first
    return outputs, ids, None if rows.valid is None else unpack_tensor(rows.valid)
