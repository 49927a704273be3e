"""Feature extractors of transformers: samples of one rate to the inputs of a model."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gradrun.core.errors import ConfigError, first_line
from gradrun.core.optional import hub_errors, import_transformers
from gradrun.core.pretrained import processor_folder
from gradrun.data.audio_decoding import Samples
from gradrun.results.result import Statement

_KEY = "data.processor"


class AudioProcessor:
    """A feature extractor, called as its library does by default, but with padding."""

    def __init__(self, source: str | Path, revision: str | None, seconds: float | None) -> None:
        """Load the extractor and try it on a second of silence.

        Args:
            seconds: cut or pad every file to this length; default: the processor's, or the longest.

        Raises:
            ConfigError: the source has no feature extractor, or one for something else.
        """
        self._extractor = _load(source, revision)
        rate = getattr(self._extractor, "sampling_rate", None)
        if not isinstance(rate, int):
            raise ConfigError(f"{self.name} has no sampling_rate; it is not for audio", _KEY)
        self.rate: int = rate
        parameters = inspect.signature(type(self._extractor).__call__).parameters
        self._options: dict[str, Any] = {}
        default = parameters["padding"].default if "padding" in parameters else None
        if "padding" in parameters:
            self._options["padding"] = default or True
        if seconds is not None:
            length = round(seconds * rate)
            self._options |= {"padding": "max_length", "max_length": length, "truncation": True}
        cuts = "truncation" in parameters and parameters["truncation"].default is True
        own = getattr(self._extractor, "n_samples", None) if cuts else None
        self.limit: int | None = round(seconds * rate) if seconds is not None else own
        """Samples after which a file is cut, if known."""
        try:
            self.names = tuple(self([np.zeros(rate, np.float32)]))
        except ConfigError:
            raise
        except Exception as error:  # a processor of images or of pairs may raise anything
            text = f"{self.name} does not turn samples into tensors: {first_line(error)}"
            raise ConfigError(text, _KEY) from error

    @property
    def name(self) -> str:
        """The name of its class."""
        return type(self._extractor).__name__

    def __call__(self, samples: Sequence[Samples]) -> dict[str, torch.Tensor]:
        """Return the inputs of the model for some files, each [n, ...]."""
        outputs = self._extractor(
            [*samples], sampling_rate=self.rate, return_tensors="pt", **self._options
        )
        return {name: value for name, value in outputs.items() if isinstance(value, torch.Tensor)}

    def statements(self) -> Iterator[Statement]:
        """Yield the steps of the processor."""
        normalized = ", normalized" if getattr(self._extractor, "do_normalize", False) else ""
        text = f"{self.name}, {self.rate} Hz{normalized}; inputs {', '.join(self.names)}"
        yield Statement(topic="preprocess", text=text)
        masked = "attention_mask" in self.names
        length = self._options.get("max_length") or self.limit
        to = {True: "to the longest of the batch", "longest": "to the longest of the batch"}.get(
            self._options.get("padding"), f"to {length / self.rate:g} s" if length else ""
        )
        mask = "with attention_mask" if masked else "without a mask, as the processor does"
        yield Statement(topic="padding", text=f"by the processor {to}, {mask}".replace(" ,", ","))


def _load(source: str | Path, revision: str | None) -> Any:
    transformers = import_transformers(_KEY)
    source = processor_folder(source, _KEY)
    with hub_errors(source, _KEY, "which feature extractors never run; choose another one"):
        return transformers.AutoFeatureExtractor.from_pretrained(
            source, revision=revision or "main", trust_remote_code=False
        )
