"""The `output` section."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PlainSerializer,
    TypeAdapter,
    ValidationInfo,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticKnownError

from gradrun.config.base import OutputPath, Section, Size, resolve_target
from gradrun.core.remote import is_remote


def _check_output_name(name: str) -> str:
    if name != PurePosixPath(name).name or name in {"", ".", ".."} or "\\" in name:
        raise ValueError(
            "an output is selected by name or position, not by path; files stay below output.path"
        )
    return name


def _as_tuple(names: object) -> object:
    """Wrap a single name or position in a tuple, and convert positions to names ("0")."""
    if isinstance(names, list):
        return tuple(str(name) if type(name) is int else name for name in names)
    return (str(names),) if isinstance(names, str) or type(names) is int else names


Channel = Annotated[int, Field(ge=0, le=255)]
Color = tuple[Channel, Channel, Channel]


def _unwrap_single(
    transforms: tuple[str, ...] | dict[str, tuple[str, ...]],
) -> str | list[str] | dict[str, Any]:
    if isinstance(transforms, dict):
        return {name: _unwrap_single(steps) for name, steps in transforms.items()}
    return transforms[0] if len(transforms) == 1 else list(transforms)


BuiltinTransform = Literal[
    "auto", "none", "softmax", "sigmoid", "argmax", "classify", "topk", "threshold", "uint8",
    "mean_pool", "cls", "last_token", "sentence_embedding", "normalize", "perplexity",
]  # fmt: skip


def _check_transform(name: str, info: ValidationInfo) -> str:
    """Return a transform of gradrun, or the resolved target of a function."""
    if ":" in name:
        return resolve_target(name, info)
    if name not in get_args(BuiltinTransform):
        expected = ", ".join(map(repr, get_args(BuiltinTransform)))
        raise PydanticKnownError("literal_error", {"expected": expected})
    return name


Target = Annotated[str, Field(pattern=".:[^:]+$")]
Transform = Annotated[
    str,
    AfterValidator(_check_transform),
    WithJsonSchema(TypeAdapter[Any](BuiltinTransform | Target).json_schema()),
]
"""A transform of gradrun, or FILE.py:FUNCTION."""

OutputName = Annotated[str, AfterValidator(_check_output_name)]
Transforms = Annotated[
    tuple[Transform, ...],
    BeforeValidator(_as_tuple, json_schema_input_type=Transform | tuple[Transform, ...]),
]


_REMOTE_FORMATS = ("parquet", "safetensors", "jsonl", "csv")
"""Formats whose files do not change, or only grow."""


class OutputSection(Section):
    """Which outputs are written, in which format, and where."""

    path: OutputPath = Field(description="folder of the run; must not exist yet")
    format: Literal["npy", "safetensors", "jsonl", "csv", "parquet", "files"] = Field(
        "npy", description="of the predictions; files: one file per sample"
    )
    file_type: Literal["auto", "png", "npy", "txt", "json"] = Field(
        "auto",
        description="files: the kind of file; auto: txt for texts, png for maps of class numbers "
        "and of uint8, json for lists and dicts, npy for other outputs",
    )
    palette: Literal["auto"] | bool | tuple[Color, ...] = Field(
        "auto",
        description="files: colors of class numbers in .png files, as [[0, 0, 0], [255, 0, 0]] for "
        "the first classes; auto: own colors; false: gray levels",
    )
    select: Annotated[
        tuple[OutputName, ...],
        BeforeValidator(_as_tuple, json_schema_input_type=str | int | tuple[str | int, ...]),
    ] = Field((), description="names or positions of the outputs to write; default: all")
    name: OutputName | None = Field(
        None, description="name of the written output, if there is one; default: prediction"
    )
    transform: Annotated[
        Transforms | dict[OutputName, Transforms], PlainSerializer(_unwrap_single)
    ] = Field(
        ("auto",),
        description="one or several, applied in order: [mean_pool, normalize]; or a map from "
        "outputs to transforms: {sentiment: softmax, topic: topk}; FILE.py:FUNCTION: your function "
        "of the model's output for a batch (needs --trust-code); auto: sentence_embedding for a "
        "sentence-transformers folder unless select is set, else none",
    )
    keep: Annotated[
        tuple[str, ...],
        BeforeValidator(_as_tuple, json_schema_input_type=str | tuple[str, ...]),
    ] = Field(
        (),
        description="columns of the input file to write beside the predictions: [id, title]; for "
        "csv, jsonl and parquet",
    )
    dim: int | None = Field(
        None,
        description="dimension of the classes; default: 1 for outputs with four or more dimensions "
        "(images: [n, classes, height, width]), else the last",
    )
    k: Size = Field(5, description="topk: number of classes")
    threshold: float | None = Field(
        None,
        description="threshold: values above it become 1, others 0; default: 0.5 after sigmoid",
    )

    examples: int = Field(
        8,
        ge=0,
        le=100,
        description="predictions that reports show with their inputs; 0: none, so that result.json "
        "contains no input",
    )

    def transforms_of(self, name: str) -> tuple[str, ...]:
        """Return gradrun's transforms of the output with this name, without `auto` and `none`."""
        steps = self.transform
        if isinstance(steps, dict):
            steps = steps.get(name, ())
        return tuple(step for step in steps if step not in {"auto", "none"} and ":" not in step)

    @property
    def decoder(self) -> str:
        """The user's function, FILE.py:FUNCTION, which comes before gradrun's transforms; or ""."""
        first = "" if isinstance(self.transform, dict) else self.transform[0]
        return first if ":" in first else ""

    def transforms_as(self, name: str) -> tuple[str, ...]:
        """Return the transforms of the output that is written under this name."""
        if isinstance(self.transform, dict) and name not in self.transform:
            sources = self.select or tuple(self.transform)
            return self.transforms_of(sources[0]) if len(sources) == 1 else ()
        return self.transforms_of(name)

    @property
    def transforms(self) -> bool:
        """Whether any output is transformed."""
        return isinstance(self.transform, dict) or bool(self.transforms_of(""))

    @model_validator(mode="after")
    def _check_remote_format(self) -> OutputSection:
        if is_remote(self.path) and self.format not in _REMOTE_FORMATS:
            raise ValueError(
                f"format {self.format} cannot be written to an object store; set "
                "output.format: parquet, safetensors, jsonl or csv"
            )
        return self

    @model_validator(mode="after")
    def _check_decoder(self) -> OutputSection:
        every = self.transform.values() if isinstance(self.transform, dict) else [self.transform]
        later = [step for steps in every for step in steps if ":" in step]
        if later != ([self.decoder] if self.decoder else []):
            name = later[-1].rpartition("/")[2]
            raise ValueError(
                f"{name} must be the first transform and not belong to one output: it gets the "
                f"model's output of a batch; write output.transform: {name}, or [{name}, softmax]"
            )
        return self

    @model_validator(mode="after")
    def _check_threshold(self) -> OutputSection:
        every = self.transform.values() if isinstance(self.transform, dict) else [self.transform]
        for steps in every:
            used = "threshold" in steps
            if used and self.threshold is None and "sigmoid" not in steps:
                raise ValueError(
                    "the transform threshold needs output.threshold: 0.5 for probabilities, 0 "
                    "for logits; after sigmoid it is 0.5 by default"
                )
        return self
