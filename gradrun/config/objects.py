"""Configs with a model or data in memory, which only Python code can pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from gradrun.config.data import Classes, DataConfig, PythonData, _Data
from gradrun.config.model import EagerModel, ModelConfig
from gradrun.config.output import OutputSection
from gradrun.config.schema import RunConfig


class ObjectModel(EagerModel):
    """A module in memory."""

    source: Literal["object"]
    name: str = Field(description="the type of the module")
    value: Any = Field(exclude=True, repr=False, description="the torch.nn.Module")


class ObjectArrays(_Data):
    """Arrays in memory."""

    source: Literal["object"]
    name: str = Field(description="the type of the object")
    value: Any = Field(exclude=True, repr=False, description="the arrays")
    floats: Literal["float32", "float64"] = Field(
        "float32", description="dtype of arrays that are float64 because NumPy's default is"
    )
    labels: Any = Field(None, exclude=True, repr=False, description="an array, for metrics")
    classes: Classes = None


class ObjectItems(PythonData):
    """A Dataset, DataLoader or iterable in memory; `target` is its type."""

    value: Any = Field(exclude=True, repr=False, description="the object")

    def targets(self) -> dict[str, str]:
        return {"collate": self.collate} if self.collate else {}


class ObjectOutput(OutputSection):
    """Predictions in memory, as in .npy files; the folder has only the journal and the result."""

    arrays: Any = Field(exclude=True, repr=False, description="receives the predictions")

    def in_files(self, form: str) -> OutputSection:
        """Return the section that writes files of a format to the folder."""
        keys = {name: getattr(self, name) for name in OutputSection.model_fields}
        return OutputSection(**keys | {"format": form})


class ObjectConfig(RunConfig):
    """A config of which model or data may be in memory; it is not written to files whole."""

    model: ModelConfig | ObjectModel  # type: ignore[assignment]
    data: DataConfig | ObjectArrays | ObjectItems  # type: ignore[assignment]


def is_object(value: Any) -> bool:
    """Return whether an argument is a model or data in memory, not a section of a config."""
    if not isinstance(value, Mapping):
        return value is not None
    return "source" not in value and any(hasattr(part, "dtype") for part in value.values())
