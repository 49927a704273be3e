"""Text generation: prompts or audio in, text out, with random numbers of its own per sample."""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from gradrun.config.data import DataConfig, TextData
from gradrun.config.model import HuggingFaceModel
from gradrun.core.errors import ConfigError, SampleError, first_line
from gradrun.core.optional import import_optional, import_transformers
from gradrun.core.pretrained import load_tokenizer
from gradrun.core.suggest import suggest
from gradrun.models.loaded import LoadedModel
from gradrun.results.result import Generation, Statement

_KEY = "model.generate"

_COUNTS = {
    "max_new_tokens": 1,
    "min_new_tokens": 0,
    "max_length": 1,
    "min_length": 0,
    "num_beams": 1,
    "top_k": 0,
    "no_repeat_ngram_size": 0,
}
"""Settings that are whole numbers, with their minimum."""

_SAMPLING = {
    "temperature": ("TemperatureLogitsWarper", "temperature", 1.0),
    "top_h": ("TopHLogitsWarper", "top_h", None),
    "top_k": ("TopKLogitsWarper", "top_k", 0),
    "top_p": ("TopPLogitsWarper", "top_p", 1.0),
    "min_p": ("MinPLogitsWarper", "min_p", None),
    "typical_p": ("TypicalLogitsWarper", "mass", 1.0),
    "epsilon_cutoff": ("EpsilonLogitsWarper", "epsilon", 0.0),
    "eta_cutoff": ("EtaLogitsWarper", "epsilon", 0.0),
}
"""Settings of sampling, in the order of transformers: class, its argument, value without effect."""

_TOP_K = 50
"""The default of transformers for sampling."""

_SUPPORTED = {
    *_COUNTS, *_SAMPLING, "do_sample", "stop_strings", "early_stopping", "length_penalty",
    "repetition_penalty", "bad_words_ids", "forced_bos_token_id", "forced_eos_token_id",
    "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens",
    "begin_suppress_tokens", "sequence_bias", "renormalize_logits", "pad_token_id", "bos_token_id",
    "eos_token_id", "decoder_start_token_id", "use_cache", "cache_implementation",
    "prefill_chunk_size",
}  # fmt: skip

_OF_SPEECH = ("language", "task")
"""Arguments of generate() of speech models, which are settings too."""

_REASONS = {
    "num_return_sequences": "a prompt has one text; repeat the prompt for several",
    "max_time": "the texts would depend on the speed of the machine",
    "encoder_repetition_penalty": "the texts would depend on the padding of the batch",
    "encoder_no_repeat_ngram_size": "the texts would depend on the padding of the batch",
}


class TextGenerator(nn.Module):
    """Calls generate() of a transformers model; its output is a list with a text per sample."""

    def __init__(self, model: Any, tokenizer: Any, settings: Any, seed: int) -> None:
        """Prepare the steps of each token.

        Args:
            model: the model of transformers.
            tokenizer: decodes its tokens.
            settings: a GenerationConfig with everything that is set.
            seed: of random numbers.

        Raises:
            ValueError: a setting is invalid.
        """
        super().__init__()
        self.model = model
        self._tokenizer, self._seed = tokenizer, seed
        self._causal = not model.config.is_encoder_decoder
        self._settings = settings = copy.deepcopy(settings)
        self._steps = settings.max_new_tokens or settings.max_length
        self._warpers = _warpers(settings) if settings.do_sample else None
        # The random choice of transformers depends on the other samples of the batch.
        settings.do_sample = False
        self._penalize: Callable[..., torch.Tensor] | None = None
        if self._causal and (settings.repetition_penalty or 1.0) != 1.0:
            self._penalize = _processor("RepetitionPenaltyLogitsProcessor")(
                settings.repetition_penalty
            )
            settings.repetition_penalty = 1.0
        ends = settings.eos_token_id
        self._ends = {*ends} if isinstance(ends, list | tuple) else {ends}
        stops = settings.stop_strings or ()
        self._stops = (stops,) if isinstance(stops, str) else tuple(stops)
        # Those of transformers may begin in the prompt, and not all tokenizers can use them.
        for own in (settings, model.generation_config):
            own.update(stop_strings=None)
        self._batches: list[tuple[float, float, int, int]] = []
        """Seconds until the first token and until the end, tokens, and steps of each batch."""

    def forward(
        self, sample_numbers: torch.Tensor | None = None, **inputs: torch.Tensor
    ) -> list[str]:
        """Return the text of each sample.

        Args:
            sample_numbers: the positions [n] of the samples in the data, for random numbers.
            inputs: input_ids and attention_mask [n, tokens], padded on the left for causal models;
                or the inputs of another encoder.

        Raises:
            SampleError: the model computes NaN.
        """
        device = next(iter(inputs.values())).device
        stopping = import_optional("transformers", _KEY, "generation.stopping_criteria")
        watch = _Watch(device)
        steps: list[Callable[..., torch.Tensor]] = [watch.check]
        if self._penalize:
            mask = inputs["attention_mask"]
            mask = mask.repeat_interleave(self._settings.num_beams or 1, 0)
            steps.append(partial(_without_padding, self._penalize, mask))
        if self._warpers is not None and sample_numbers is not None:
            numbers = _random_numbers(self._seed, sample_numbers.tolist(), self._steps)
            steps.append(_Sampler(self._warpers, numbers.to(device)))
        criteria: list[Any] = [watch]
        if self._stops:
            start = inputs["input_ids"].shape[1] if self._causal else 1
            criteria.append(_StopStrings(self._stops, self._tokenizer, start))
        sequences = self.model.generate(
            **inputs,
            generation_config=self._settings,
            logits_processor=steps,
            stopping_criteria=stopping.StoppingCriteriaList(criteria),
        )
        watch.finish()
        rows = [self._until_end(row) for row in self._new_tokens(sequences, inputs).tolist()]
        texts = self._tokenizer.batch_decode(rows, skip_special_tokens=True)
        lengths = [len(row) for row in rows]
        self._batches.append((watch.first, watch.total, sum(lengths), max(lengths)))
        return [
            text[: min((at for stop in self._stops if (at := text.find(stop)) >= 0), default=None)]
            for text in texts
        ]

    def take_times(self) -> Generation:
        """Return the times of the batches since the last call, and forget them."""
        first, total, tokens, steps = (
            zip(*self._batches, strict=True) if self._batches else [()] * 4
        )
        self._batches = []
        return Generation(
            first_token_seconds=first,
            batch_seconds=total,
            batch_tokens=tokens,
            batch_steps=steps,
        )

    def _new_tokens(
        self, sequences: torch.Tensor, inputs: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        """Return the tokens after the prompt, or after the decoder's start token."""
        if self._causal:
            return sequences[:, inputs["input_ids"].shape[1] :]
        start = self._settings.decoder_start_token_id
        started = sequences.shape[1] and bool((sequences[:, 0] == start).all())
        return sequences[:, 1:] if started else sequences

    def _until_end(self, row: list[int]) -> list[int]:
        """Return the tokens of a text up to its end token, without padding."""
        for i, token in enumerate(row):
            if token in self._ends:
                return row[: i + 1]
        while row and row[-1] == self._settings.pad_token_id:
            row = row[:-1]
        return row


def take_times(module: nn.Module) -> Generation | None:
    """Return the times of the batches since the last call; None if it generates no text."""
    return module.take_times() if isinstance(module, TextGenerator) else None


def generating(
    model: LoadedModel, config: HuggingFaceModel, data: DataConfig | None
) -> LoadedModel:
    """Return a model that generates text, with statements of how it does.

    Its random numbers come from the seed of torch's default generator, which the caller has seeded.

    Raises:
        ConfigError: a setting is unknown, invalid or does not fit the model.
    """
    source, revision = config.path, config.revision
    if isinstance(data, TextData):
        source, revision = data.tokenizer_source(config)
    tokenizer = load_tokenizer(source, revision)
    module: Any = model.module
    given = config.generate or {}
    folder = module.generation_config.to_diff_dict()
    own = {name: folder[name] for name in folder if name in _SUPPORTED and folder[name]}
    for name, problem in _problems(config, own, module):
        raise ConfigError(problem, f"{_KEY}.{name}")
    try:
        settings = copy.deepcopy(module.generation_config)
        settings.update(**given, pad_token_id=given.get("pad_token_id", tokenizer.pad_token_id))
        for name in _OF_SPEECH:
            if name in given:
                setattr(settings, name, given[name])
        settings.use_cache = given.get("use_cache", True)
        if given.get("max_new_tokens"):
            settings.max_length = None
        if settings.do_sample and settings.top_k is None:
            settings.top_k = _TOP_K
        if settings.decoder_start_token_id is None:
            settings.decoder_start_token_id = getattr(module.config, "decoder_start_token_id", None)
        if settings.eos_token_id is None:
            settings.eos_token_id = tokenizer.eos_token_id
        settings.validate()
        generator = TextGenerator(module, tokenizer, settings, torch.initial_seed())
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError(first_line(error), _KEY) from error
    notes = _statements(settings, own, given, causal=not module.config.is_encoder_decoder)
    return model.replace(module=generator.train(module.training), notes=(*model.notes, *notes))


def _problems(
    config: HuggingFaceModel, own: Mapping[str, Any], module: Any
) -> Iterator[tuple[str, str]]:
    """Yield the settings that cannot be used, each with the reason."""
    given = config.generate or {}
    known = {*_SUPPORTED}
    if "language" in type(module).generate.__annotations__:
        known |= {*_OF_SPEECH}
    others = import_transformers(_KEY).GenerationConfig().to_dict().keys() - known
    for name in given:
        if name in others:
            reason = _REASONS.get(name, "it is not one of the settings that gradrun supports")
            yield name, f"{name} cannot be set: {reason}"
        elif name not in known:
            yield name, f"unknown setting {name!r}; {suggest(name, known)}"
    for name, low in _COUNTS.items():
        value = given.get(name)
        if value is not None and (type(value) is not int or value < low):
            yield name, f"{value!r} is not a whole number from {low} on"
    together = {**own, **given}
    sampled = together.get("do_sample", False)
    if not isinstance(sampled, bool):
        yield "do_sample", f"{sampled!r} is not true or false"
    stops = given.get("stop_strings") or []
    for stop in stops if isinstance(stops, list) else [stops]:
        if not isinstance(stop, str) or not stop:
            yield "stop_strings", f"{stop!r} is not a text"
    for name in _SAMPLING:
        if name in given and not sampled:
            yield name, f"{name} has no effect without sampling; add do_sample: true"
    if sampled and (together.get("num_beams") or 1) > 1:
        yield (
            "num_beams",
            "beam search and sampling cannot be combined; set num_beams: 1 or do_sample: false",
        )
    if sampled and config.auto_class == "AutoModelForSpeechSeq2Seq":
        yield "do_sample", "models of speech choose the most likely token; set do_sample: false"
    yield from _length_problems(given, together, module)


def _length_problems(
    given: Mapping[str, Any], together: Mapping[str, Any], module: Any
) -> Iterator[tuple[str, str]]:
    encodes = module.config.is_encoder_decoder
    for end in ("max", "min"):
        name, new = f"{end}_length", f"{end}_new_tokens"
        if not encodes and together.get(name) and not together.get(new):
            where = "" if name in given else " of the model's generation_config.json"
            yield (
                new,
                f"{name}{where} counts the prompt and its padding, so that texts would depend on "
                f"their batch; set {new}",
            )
    limit = together.get("max_new_tokens") or together.get("max_length")
    if limit is None:
        text = "set the greatest number of tokens of a text, such as max_new_tokens: 64"
        yield "max_new_tokens", f"max_new_tokens is missing; {text}"
    if encodes:
        decoder = module.config.get_text_config(decoder=True)
        names = ("max_target_positions", "max_position_embeddings")
        positions = next((p for name in names if (p := getattr(decoder, name, None))), None)
        if positions and limit > positions:
            text = f"the decoder has positions for {positions} tokens; set at most {positions - 1}"
            yield "max_new_tokens", text


def _statements(
    settings: Any, own: Mapping[str, Any], given: Mapping[str, Any], *, causal: bool
) -> Iterator[Statement]:
    if settings.do_sample:
        values = {name: getattr(settings, name) for name in _SAMPLING}
        listed = ", ".join(f"{name} {value:g}" for name, value in values.items() if value)
        how = f"sampling{f', {listed}' if listed else ''}; a seed per sample, from run.seed"
    elif (settings.num_beams or 1) > 1:
        how = f"beam search, {settings.num_beams} beams"
    else:
        how = "greedy, the most likely token"
    most = settings.max_new_tokens
    limit = f"{most:,} new tokens" if most else f"{settings.max_length:,} tokens"
    gradients = "generate() disables gradients in every mode"
    yield Statement(topic="generation", text=f"{how}; at most {limit}; {gradients}")
    prompt = "without the prompt and " if causal else "without "
    text = f"{prompt}special tokens"
    if stops := settings.stop_strings:
        text += (
            f"; ends before {', '.join(map(repr, [stops] if isinstance(stops, str) else stops))}"
        )
    yield Statement(topic="text", text=text)
    if own:
        listed = ", ".join(
            f"{name} {value}{' (replaced)' if name in given else ''}" for name, value in own.items()
        )
        yield Statement(topic="generation_config.json", text=f"{listed:.300}")


# --- the steps of a token ------------------------------------------------------------------------


class _Sampler:
    """Chooses the next token of each row by the row's own random number."""

    def __init__(self, warpers: Sequence[Callable[..., Any]], numbers: torch.Tensor) -> None:
        """Store the steps before the choice, and numbers [n, steps] from 0 to 1."""
        self._warpers, self._numbers, self._step = warpers, numbers, 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return scores [n, tokens] in which only the chosen token is possible."""
        for warper in self._warpers:
            scores = warper(input_ids, scores)
        # The running sum in float64, so that rounding moves no choice in practice.
        sums = scores.double().softmax(-1).cumsum(-1)
        drawn = self._numbers[:, self._step, None] * sums[:, -1:]
        chosen = torch.searchsorted(sums, drawn, right=True).clamp(max=sums.shape[1] - 1)
        self._step += 1
        return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)


class _StopStrings:
    """Ends the texts that contain a stop string."""

    def __init__(self, stops: Sequence[str], tokenizer: Any, start: int) -> None:
        """Store the strings, and the number of tokens before the text."""
        self._stops, self._tokenizer, self._start = stops, tokenizer, start
        # A character has at most 4 bytes, each of which may be a token.
        self._tail = 4 * max(map(len, stops)) + 4

    def __call__(self, input_ids: torch.Tensor, scores: Any, **keys: Any) -> torch.Tensor:
        """Return which rows [n] are complete, by the end of their new tokens."""
        new = input_ids[:, max(self._start, input_ids.shape[1] - self._tail) :].tolist()
        texts = self._tokenizer.batch_decode(new, skip_special_tokens=True)
        ended = [any(stop in text for stop in self._stops) for text in texts]
        return torch.tensor(ended, device=input_ids.device)


class _Watch:
    """Records the time of the first token and the end, and whether scores are NaN."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._nan: torch.Tensor | None = None
        self.first = 0.0
        """Seconds until the first token of all samples."""
        self.total = 0.0
        self._began = time.perf_counter()

    def check(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Note NaN, which a choice of the greatest score would ignore."""
        nan = scores.isnan().any()
        self._nan = nan if self._nan is None else self._nan | nan
        return scores

    def __call__(self, input_ids: torch.Tensor, scores: Any, **keys: Any) -> torch.Tensor:
        """Note the time of the first token; ends no text."""
        if not self.first:
            self.first = self._elapsed()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def finish(self) -> None:
        """Note the time of the last token.

        Raises:
            SampleError: a score was NaN.
        """
        self.total = self._elapsed()
        if self._nan is not None and self._nan.item():
            raise SampleError("the scores of the next token contain NaN")

    def _elapsed(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter() - self._began


def _without_padding(
    process: Callable[..., torch.Tensor],
    mask: torch.Tensor,
    input_ids: torch.Tensor,
    scores: torch.Tensor,
) -> torch.Tensor:
    """Apply a processor to rows whose padding is replaced by their last prompt token."""
    prompt = input_ids[:, : mask.shape[1]]
    prompt = torch.where(mask.bool(), prompt, prompt[:, -1:])
    return process(torch.cat([prompt, input_ids[:, mask.shape[1] :]], 1), scores)


def _random_numbers(seed: int, samples: Sequence[int], steps: int) -> torch.Tensor:
    """Return numbers [n, steps] from 0 to 1 that depend on the seed and the sample alone."""
    rows = []
    for sample in samples:
        digest = hashlib.blake2b(f"{seed} {sample}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest) >> 1)
        rows.append(torch.rand(steps, generator=generator, dtype=torch.float64))
    return torch.stack(rows)


def _warpers(settings: Any) -> list[Callable[..., torch.Tensor]]:
    """Return the steps before a random choice, in the order of transformers."""
    found = []
    for name, (kind, argument, neutral) in _SAMPLING.items():
        value = getattr(settings, name)
        if value is not None and value != neutral:
            found.append(_processor(kind)(**{argument: value}))
    return found


def _processor(name: str) -> Any:
    return getattr(import_optional("transformers", _KEY, "generation.logits_process"), name)
