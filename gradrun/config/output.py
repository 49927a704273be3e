"""The `output` section."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer
from pydantic_core import PydanticCustomError

from gradrun.config.base import OutputPath, Section, Size


def _check_output_name(name: str) -> str:
    if name != PurePosixPath(name).name or name in {"", ".", ".."} or "\\" in name:
        raise PydanticCustomError(
            "output_name",
            "an output is selected by name or position, not by path; files stay below output.path",
        )
    return name


def _as_tuple(names: object) -> object:
    """Wrap a single name or position in a tuple, and convert positions to names ("0")."""
    if isinstance(names, list):
        return tuple(str(name) if type(name) is int else name for name in names)
    return (str(names),) if isinstance(names, str) or type(names) is int else names


def _unwrap_single(transforms: tuple[str, ...]) -> str | list[str]:
    return transforms[0] if len(transforms) == 1 else list(transforms)


Transform = Literal[
    "none",
    "softmax",
    "argmax",
    "classify",
    "topk",
    "mean_pool",
    "cls",
    "last_token",
    "normalize",
]
OutputName = Annotated[str, AfterValidator(_check_output_name)]


class OutputSection(Section):
    """Which outputs are written, in which format, and where."""

    path: OutputPath = Field(description="folder of the run; must not exist yet")
    format: Literal["npy", "safetensors", "jsonl", "csv", "parquet"] = "npy"
    select: Annotated[
        tuple[OutputName, ...],
        BeforeValidator(_as_tuple, json_schema_input_type=str | int | tuple[str | int, ...]),
    ] = Field((), description="names or positions of the outputs to write; default: all")
    transform: Annotated[
        tuple[Transform, ...],
        BeforeValidator(_as_tuple, json_schema_input_type=Transform | tuple[Transform, ...]),
        PlainSerializer(_unwrap_single),
    ] = Field(("none",), description="one or several, applied in order: [mean_pool, normalize]")
    dim: int = Field(-1, description="dimension of the classes; default: the last")
    k: Size = Field(5, description="topk: number of classes")
