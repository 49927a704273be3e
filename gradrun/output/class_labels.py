"""Class names for outputs that contain class numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from gradrun.config.output import OutputSection
from gradrun.output.missing import MISSING_CLASS

DEFAULT_OUTPUT = "prediction"
"""Name of the output of a model with one output."""


class ClassLabels:
    """Names the label columns of text and table formats, and the classes in them."""

    def __init__(self, config: OutputSection | None = None, classes: Sequence[str] = ()) -> None:
        # Numbers over another dimension than the last may count something other than classes.
        has_classes = config is not None and config.dim == -1 and bool(classes)
        self.transform = config.transform[-1] if config and has_classes else ""
        self.classes = classes

    def columns(self, names: Iterable[str]) -> dict[str, str]:
        """Map each output of class numbers to the name of its label column."""
        if self.transform == "argmax":
            return {name: "label" if name == DEFAULT_OUTPUT else f"{name}.label" for name in names}
        for word, suffix, label in (("topk", "indices", "labels"), ("classify", "class", "label")):
            if self.transform == word:
                outputs = [name for name in names if name.endswith(suffix)]
                return {name: f"{name.removesuffix(suffix)}{label}" for name in outputs}
        return {}

    def names_of(self, numbers: Any) -> Any:
        """Class names for a nested list of numbers.

        A number without a name becomes its decimal text, MISSING_CLASS an empty string.
        """
        if isinstance(numbers, list):
            return [self.names_of(number) for number in numbers]
        if numbers == MISSING_CLASS:
            return ""
        known = 0 <= numbers < len(self.classes)
        return self.classes[numbers] if known else str(numbers)
