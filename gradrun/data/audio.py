"""Audio files, decoded by threads ahead of the model, in the order of their names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import numpy as np
import torch

from gradrun.config.data import AudioData
from gradrun.config.model import HuggingFaceModel
from gradrun.core.errors import ConfigError, SampleError, first_line
from gradrun.core.units import pluralize
from gradrun.data.audio_decoding import SUFFIXES, AudioDecoder, Samples, Trait
from gradrun.data.audio_processor import AudioProcessor
from gradrun.data.batch import Batch
from gradrun.data.dataset_rows import open_samples
from gradrun.data.decoded_files import DecodedFiles
from gradrun.data.source import InputBatcher, OpeningFacts, Preview
from gradrun.results.result import Statement

_File = Samples | SampleError


class Audio(DecodedFiles[list[Future[_File]]]):
    """The audio files that a config names, of which the first is decoded."""

    config: AudioData
    noun = "audio file"

    def __init__(self, config: AudioData, facts: OpeningFacts) -> None:
        self._decoder, self._processor, model = AudioDecoder(config), None, facts.model
        if (source := config.processor_source(model)) is not None:
            own = config.processor is None and isinstance(model, HuggingFaceModel)
            revision = model.revision if own else None  # type: ignore[union-attr]
            self._processor = AudioProcessor(source, revision, config.seconds)
        listed = open_samples(config, SUFFIXES, "audio files")
        super().__init__(config, listed, len(listed.names), facts.classes)
        self._rate = self._choose_rate()
        self._length = None if config.seconds is None else round(config.seconds * self._rate)
        call = "keyword" if self._processor and config.call == "auto" else config.call
        self._new_batch = InputBatcher(call, 2 if config.lengths else 1)
        self._channels = 0
        first = self._first()
        self._channels = len(first)
        inputs, _ = self._inputs([first])
        self.sample_bytes = sum(tensor.nbytes for tensor in inputs.values())

    def previews(self, positions: Sequence[int]) -> Iterator[Preview]:
        yield from (Preview(self._listed.names[position]) for position in positions)

    def statements(self) -> Iterator[Statement]:
        config = self.config
        yield from self._listed.statements("audio file")
        if config.channels == "all":
            channels = pluralize(self._channels, "channel")
        else:
            how = "the first" if config.channels == "first" else "the mean"
            channels = f"1 channel{self._share(Trait.MIXED, f', {how} of several')}"
        resampled = self._share(Trait.RESAMPLED, ", resampled with soxr")
        text = f"float32, {channels}; {self._rate} Hz{resampled}"
        loud = self._share(Trait.LOUD, "; values beyond [-1, 1]")
        yield Statement(topic="samples", text=text + loud)
        if self._processor:
            yield from self._processor.statements()
        else:
            to = "the longest of the batch" if self._length is None else f"{config.seconds:g} s"
            given = f"lengths as input {config.lengths}" if config.lengths else "lengths not passed"
            text = f"zeros at the end, to {to}; {given}"
            yield Statement(topic="padding", text=text)
        if cut := self._share(Trait.CUT, "longer files are cut"):
            yield Statement(topic="length", text=cut)
        if config.labels:
            yield self._listed.describe_labels(self.classes)

    def _share(self, trait: Trait, text: str) -> str:
        """Return the text with the number of files that have a trait, "" if none has it."""
        count = int(np.count_nonzero(self.flags & trait))
        read = int(np.count_nonzero(self.flags))
        return f"{text} ({count:,} of {pluralize(read, 'file')})" if count else ""

    # --- reading -------------------------------------------------------------------------------

    def _choose_rate(self) -> int:
        """Return the sample rate of the inputs."""
        config, processor = self.config, self._processor
        if processor:
            if config.sample_rate not in {None, processor.rate}:
                raise ConfigError(
                    f"{processor.name} needs {processor.rate} samples per second",
                    "data.sample_rate",
                )
            return processor.rate
        if config.sample_rate:
            return config.sample_rate
        found: dict[int, str] = {}
        problem: SampleError | None = None
        for number, name in enumerate(self._listed.names):
            try:
                found.setdefault(self._decoder.rate(partial(self._listed.open, number), name), name)
            except SampleError as error:
                problem = error
                continue
            if len(found) > 1:
                listed = " and ".join(f"{file} has {rate} Hz" for rate, file in found.items())
                raise ConfigError(
                    f"the files have different sample rates: {listed}; set data.sample_rate to the "
                    "rate of the training, to which other files are resampled",
                    "data.path",
                )
        if not found:
            raise self._unreadable(problem) from problem
        return next(iter(found))

    def _decode(self, pool: ThreadPoolExecutor, numbers: range) -> list[Future[_File]]:
        return [pool.submit(self._try_read, number) for number in numbers]

    def _collate(self, numbers: range, decoding: list[Future[_File]]) -> Batch:
        read = [file.result() for file in decoding]
        inputs, errors = self._inputs(read)
        ids = [self._listed.names[number] for number in numbers]
        return self._new_batch(inputs, ids, errors, lengths=self._lengths(read))

    def _try_read(self, number: int) -> _File:
        try:
            return self._read(number)
        except SampleError as error:
            return error

    def _read(self, number: int) -> Samples:
        """Return the samples of one file [channels, samples], cut to `seconds`."""
        name = self._listed.names[number]
        samples, traits = self._decoder.decode(partial(self._listed.open, number), name, self._rate)
        limit = self._processor.limit if self._processor else self._length
        if limit is not None and samples.shape[1] > limit:
            traits |= Trait.CUT
        self.flags[number] = traits
        if self._channels and len(samples) != self._channels:
            raise SampleError(
                f"{name} has {pluralize(len(samples), 'channel')}, but the first file has "
                f"{self._channels}; set data.channels: mean"
            )
        return samples[:, : self._length]

    def _inputs(
        self, files: Sequence[_File]
    ) -> tuple[dict[str, torch.Tensor], dict[int, SampleError]]:
        """Return the inputs of some files, each [n, ...], and the errors by row."""
        errors = {row: file for row, file in enumerate(files) if isinstance(file, SampleError)}
        read = [file for file in files if not isinstance(file, SampleError)]
        # Silence in place of unreadable files, which makes no batch longer.
        length = min((file.shape[1] for file in read), default=self._length or self._rate)
        silence = np.zeros((max(self._channels, 1), length), np.float32)
        samples = [silence if isinstance(file, SampleError) else file for file in files]
        inputs = self._process(samples) if self._processor else self._pad(samples)
        if errors:
            for tensor in inputs.values():
                tensor[list(errors)] = 0
        return inputs, errors

    def _lengths(self, files: Sequence[_File]) -> dict[str, torch.Tensor]:
        """Return the lengths of files that are padded to the longest of the batch, by input."""
        if self._processor or self._length is not None:
            return {}
        counts = [0 if isinstance(file, SampleError) else file.shape[1] for file in files]
        return {self.config.input: torch.tensor(counts)}

    def _process(self, samples: Sequence[Samples]) -> dict[str, torch.Tensor]:
        assert self._processor
        try:
            return self._processor([file[0] for file in samples])
        except Exception as error:  # the libraries raise many types of error
            raise ConfigError(
                f"{self._processor.name} fails on a batch: {first_line(error)}", "data.processor"
            ) from error

    def _pad(self, samples: Sequence[Samples]) -> dict[str, torch.Tensor]:
        config = self.config
        longest = max(file.shape[1] for file in samples) if self._length is None else self._length
        padded = np.zeros((len(samples), len(samples[0]), longest), np.float32)
        for row, file in enumerate(samples):
            padded[row, :, : file.shape[1]] = file
        if not config.channel_axis and config.channels != "all":
            padded = padded[:, 0]
        inputs = {config.input: torch.from_numpy(padded)}
        if config.lengths:
            inputs[config.lengths] = torch.tensor([file.shape[1] for file in samples])
        return inputs
