"""Decode audio files to float32 samples of one rate and one kind of channels."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntFlag
from typing import IO, Any

import numpy as np

from gradrun.config.data import AudioData
from gradrun.core.errors import SampleError
from gradrun.core.optional import import_optional

SUFFIXES = frozenset(
    ".wav .flac .ogg .oga .opus .mp3 .aif .aiff .aifc .au .snd .caf .w64 .rf64".split()
)
"""Suffixes of files that libsndfile decodes, in lower case."""

_SHORTER = re.compile(r"^(?:data|SSND)\s*:\s*(\d+) \(should be (\d+)\)", re.MULTILINE)
"""Line in the log of libsndfile about a file that ends before the size in its header."""
_UNKNOWN_SIZE = 2**31 - 2**16
"""Sizes from here on mean that the program that wrote the header did not know the size."""

OpenFile = Callable[[], IO[bytes]]
Samples = np.ndarray[Any, np.dtype[np.float32]]


class Trait(IntFlag):
    """A property of a file that the decoder had to interpret."""

    READ = 1
    RESAMPLED = 2
    MIXED = 4
    """The file has several channels."""
    CUT = 8
    """The file is longer than the limit."""
    LOUD = 16
    """Samples are beyond [-1, 1]."""


class AudioDecoder:
    """Decodes files to [channels, samples], with one channel unless all are requested."""

    def __init__(self, config: AudioData) -> None:
        """Import the libraries.

        Raises:
            ConfigError: one is missing.
        """
        self._channels = config.channels
        self._soundfile = import_optional("soundfile", "data.source")
        self._soxr = import_optional("soxr", "data.source")

    def rate(self, open_file: OpenFile, name: str) -> int:
        """Return the sample rate in the header of a file.

        Raises:
            SampleError: the file is not an audio file.
        """
        with self._open(open_file, name) as file:
            return int(file.samplerate)

    def decode(self, open_file: OpenFile, name: str, rate: int) -> tuple[Samples, Trait]:
        """Return the samples of a file at `rate`, and its traits.

        Raises:
            SampleError: the file cannot be decoded.
        """
        traits = Trait.READ
        with self._open(open_file, name) as file:
            try:
                samples = file.read(dtype="float32", always_2d=True)
                announced, log = file.frames, file.extra_info
            except (RuntimeError, ValueError) as error:
                raise SampleError(f"{name} cannot be decoded: {_reason(error)}") from error
            own_rate = file.samplerate
        if (short := _SHORTER.search(log)) and int(short[2]) < int(short[1]) < _UNKNOWN_SIZE:
            raise SampleError(
                f"{name} is truncated: it has {int(short[2]):,} of {int(short[1]):,} bytes"
            )
        if len(samples) < announced:
            raise SampleError(
                f"{name} is truncated: it has {len(samples):,} of {announced:,} samples"
            )
        if not len(samples):
            raise SampleError(f"{name} contains no samples")
        if not np.isfinite(samples).all():
            raise SampleError(f"{name} has samples that are NaN or infinite")
        if np.abs(samples).max() > 1:
            traits |= Trait.LOUD
        if samples.shape[1] > 1 and self._channels != "all":
            traits |= Trait.MIXED
            mixed = samples.mean(axis=1) if self._channels == "mean" else samples[:, 0]
            samples = mixed[:, None]
        if own_rate != rate:
            traits |= Trait.RESAMPLED
            samples = self._soxr.resample(np.ascontiguousarray(samples), own_rate, rate)
            if not len(samples):
                raise SampleError(f"{name} is too short to be resampled to {rate} Hz")
        return np.ascontiguousarray(samples.T), traits

    @contextmanager
    def _open(self, open_file: OpenFile, name: str) -> Iterator[Any]:
        try:
            stored = open_file()
        except FileNotFoundError as error:
            raise SampleError(f"{name} does not exist") from error
        except OSError as error:
            raise SampleError(f"{name} cannot be read: {_reason(error)}") from error
        except SampleError as error:
            raise SampleError(f"{name} {error}") from error
        with stored:
            try:
                opened = self._soundfile.SoundFile(stored)
            except (RuntimeError, OSError, ValueError, TypeError) as error:
                raise SampleError(f"{name} cannot be read: {_reason(error)}") from error
            with opened as file:
                yield file


def _reason(error: Exception) -> str:
    """Return the message of libsndfile without the path."""
    text = getattr(error, "error_string", None) or str(error)
    return str(text).strip().rstrip(".")
