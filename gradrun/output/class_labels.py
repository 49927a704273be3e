"""Class names for outputs that contain class numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gradrun.config.output import OutputSection
from gradrun.output.columns import ValueColumn, tensors_of
from gradrun.output.missing import MISSING_CLASS

if TYPE_CHECKING:
    from gradrun.output.columns import Column
    from gradrun.output.transforms import Outputs

FILE_NAME = "classes.txt"
"""The class names of a run, one per line, beside the predictions."""

DEFAULT_OUTPUT = "prediction"
"""Name of the output of a model with one output."""

_CLASS_NUMBERS = {"argmax", "classify", "topk"}
_TYPED_ARRAYS = {"npy", "safetensors"}


def writes_names(config: OutputSection) -> bool:
    """Whether the files of predictions contain class names."""
    maps = config.transform.values() if isinstance(config.transform, dict) else [config.transform]
    numbers = any(_CLASS_NUMBERS & {*steps} for steps in maps)
    return numbers and config.format not in _TYPED_ARRAYS


class ClassLabels:
    """Names the label columns of text and table formats, and the classes in them."""

    def __init__(
        self,
        config: OutputSection,
        classes: Sequence[str] = (),
        counts: Mapping[str, int] | None = None,
    ) -> None:
        """Store the names; `counts` maps outputs of class numbers to their number of classes."""
        self.config, self.classes, self.counts = config, classes, counts or {}

    def columns(self, outputs: Outputs) -> dict[str, str]:
        """Map each output of class numbers to the name of its label column."""
        named = [name for name in outputs if self.classes and self.fits(name)]
        labels = {
            name: self._label_of(name) or _label_of_detections(name, outputs[name])
            for name in named
        }
        return {name: label for name, label in labels.items() if label}

    def fits(self, name: str) -> bool:
        """Whether the names may be those of an output, which has as many classes or is unknown."""
        return self.counts.get(name, len(self.classes)) == len(self.classes)

    def has_numbers(self, name: str) -> bool:
        """Whether an output contains class numbers, with or without names."""
        return bool(self._label_of(name))

    def _label_of(self, name: str) -> str:
        output, _, suffix = name.rpartition(".")
        for step, ending, label in (("topk", "indices", "labels"), ("classify", "class", "label")):
            if suffix == ending and step in self.config.transforms_as(output or DEFAULT_OUTPUT):
                return f"{output}.{label}".removeprefix(".")
        if "argmax" in self.config.transforms_as(name):
            return "label" if name == DEFAULT_OUTPUT else f"{name}.label"
        return ""

    def names_of(self, numbers: Any) -> Any:
        """Class names for a nested list of numbers.

        A number without a name becomes its decimal text, MISSING_CLASS an empty string. None stays.
        """
        if numbers is None:
            return None
        if isinstance(numbers, list):
            return [self.names_of(number) for number in numbers]
        if numbers == MISSING_CLASS:
            return ""
        known = 0 <= numbers < len(self.classes)
        return self.classes[numbers] if known else str(numbers)

    def describes(self, outputs: Outputs) -> bool:
        """Whether an output contains class numbers, or one score per class."""
        count = len(self.classes)
        scores = (
            self.counts[name] == count if name in self.counts else count in tensor.shape[1:]
            for name, tensor in tensors_of(outputs).items()
        )
        return count > 0 and (bool(self.columns(outputs)) or any(scores))

    def text(self) -> str:
        """The content of classes.txt; line breaks in names are escaped."""
        return "".join(f"{as_line(name)}\n" for name in self.classes)


def _label_of_detections(name: str, column: Column) -> str:
    """Return the name of the label column of class numbers that a detector calls labels, or ""."""
    prefix, dot, last = name.rpartition(".")
    if last != "labels" or not isinstance(column, ValueColumn) or not column.has_integers:
        return ""
    return f"{prefix}{dot}label_names"


def as_line(value: int | str) -> str:
    """Return an id or a name as one line of text, with line breaks escaped."""
    return str(value).replace("\n", "\\n").replace("\r", "\\r")
