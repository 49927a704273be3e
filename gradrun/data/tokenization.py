"""Texts to padded token numbers: tokenizer, prompt, length limit and padding side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from threading import Lock
from typing import Any, NamedTuple

import torch

from gradrun.config.data import TextData
from gradrun.config.model import HuggingFaceModel, ModelConfig
from gradrun.core.errors import ConfigError, SampleError, first_line
from gradrun.core.pretrained import (
    SentenceFolder,
    choose_prompt,
    load_tokenizer,
    read_sentence_folder,
)
from gradrun.core.suggest import suggest
from gradrun.data.text_files import Text
from gradrun.data.text_model import TextModel, text_model
from gradrun.results.result import Statement

_NO_LIMIT = 1_000_000
"""Tokenizers without a maximum length report 1e30."""

Tokens = dict[str, list[list[int]]]
"""Output of the tokenizer to one row of numbers per text."""


class Tokenized(NamedTuple):
    """The tokens of some texts."""

    tokens: Tokens
    full_lengths: list[int]
    """Tokens of each text before it was truncated."""
    errors: dict[int, SampleError]
    """Row -> why the text has no tokens; its row is one masked token."""


class Tokenization:
    """A tokenizer, and how the config and the model ask to use it."""

    def __init__(self, config: TextData, model: ModelConfig | None) -> None:
        self.config = config
        self._source, revision = config.tokenizer_source(model)
        folder = read_sentence_folder(self._source, revision, "data.tokenizer")
        self._tokenizer = load_tokenizer(self._source, revision, folder)
        if config.chat and not self._tokenizer.chat_template:
            text = "the tokenizer has no chat template; remove chat, or set data.tokenizer"
            raise ConfigError(text, "data.chat")
        facts = text_model(model)
        self.limit, self._limit_origin = _limit(config, self._tokenizer, folder, facts)
        self.prompt = choose_prompt(folder, config.prompt, config.prompt_name)
        left = config.padding_side is None and facts.generates
        self._side = "left" if left else config.padding_side or self._tokenizer.padding_side
        self.generates = isinstance(model, HuggingFaceModel) and model.generate is not None
        # generate() counts positions itself.
        own_positions = facts.position_ids and not self.generates
        self._position_ids = self._side == "left" and own_positions and not config.inputs
        # A continuation follows the end of a prompt.
        self._cut = "left" if facts.new_tokens else self._tokenizer.truncation_side
        self._tokenizer.truncation_side = self._cut
        # A failed batch is read again while a thread may be prefetching.
        self._lock = Lock()

    def tokenize(self, texts: Sequence[Text]) -> Tokenized:
        """Tokenize texts, and truncate those that are longer than the limit."""
        if not texts:
            return Tokenized({"input_ids": []}, [], {})
        with self._lock:
            tokens = self._encode(texts)
            lengths = [len(row) for row in tokens["input_ids"]]
            long = [i for i, length in enumerate(lengths) if self.limit and length > self.limit]
            if long:
                cut = self._encode([texts[i] for i in long], truncation=True, max_length=self.limit)
                for name, rows in tokens.items():
                    for i, row in zip(long, cut[name], strict=True):
                        rows[i] = row
        errors = {i: error for i, text in enumerate(texts) if (error := _error(text, lengths[i]))}
        for name, rows in tokens.items():
            empty = self._tokenizer.pad_token_id if name == "input_ids" else 0
            for i in errors:
                rows[i] = [empty]
        return Tokenized(tokens, lengths, errors)

    def inputs(self, tokens: Tokens) -> list[str]:
        """Return the names of the inputs that the model gets.

        Raises:
            ConfigError: data.inputs names another one.
        """
        available = [name for name in self._tokenizer.model_input_names if name in tokens]
        if self.generates:
            available = [name for name in available if name != "token_type_ids"]
        for name in self.config.inputs:
            if name not in available:
                hint = suggest(name, available)
                raise ConfigError(f"the tokenizer has no output {name!r}; {hint}", "data.inputs")
        added = ["position_ids"] if self._position_ids else []
        return list(self.config.inputs) or [*available, *added]

    def pad(self, tokens: Tokens) -> dict[str, torch.Tensor]:
        """Return the inputs of the model for some texts, each [n, tokens]."""
        padded = self._tokenizer.pad(
            tokens,
            padding=self.config.padding,
            max_length=self.config.max_length,
            padding_side=self._side,
            return_tensors="pt",
        )
        if self._position_ids:
            # As in generation: the first token after the padding has position 0.
            padded["position_ids"] = (padded["attention_mask"].cumsum(1) - 1).clamp(min=0)
        return {name: padded[name] for name in self.inputs(tokens)}

    def statements(self) -> Iterator[Statement]:
        """Yield the tokenizer, its limit, the padding and the prompt."""
        limit = f"limit {self.limit} tokens ({self._limit_origin})" if self.limit else "no limit"
        name = getattr(self._source, "name", self._source)
        if self.limit and self._cut == "left":
            limit += "; longer texts lose their start"
        yield Statement(topic="tokenizer", text=f"{name}, {limit}")
        positions = ", with position_ids" if self._position_ids else ""
        token = f"{self._tokenizer.pad_token} ({self._tokenizer.pad_token_id})"
        yield Statement(topic="padding", text=f"{self._side}, token {token}{positions}")
        if self.config.chat:
            text = "the tokenizer's template, up to the start of the answer"
            yield Statement(topic="chat", text=text)
        if self.prompt:
            yield Statement(topic="prompt", text=f"{self.prompt!r} before every text")

    def _encode(self, texts: Sequence[Text], **truncation: Any) -> Tokens:
        if self.config.chat:
            rendered = [self._render(text) for text in texts]
            # The template contains the special tokens.
            options = {"add_special_tokens": False, "verbose": False, **truncation}
            return dict(self._tokenizer(rendered, **options))
        firsts = [self.prompt + text.parts[0] for text in texts]
        pairs = [text.parts[1] for text in texts] if len(texts[0].parts) > 1 else None
        return dict(self._tokenizer(firsts, pairs, verbose=False, **truncation))

    def _render(self, text: Text) -> str:
        """Return a conversation as the model was trained with it."""
        messages = text.messages or (("user", text.parts[0]),)
        conversation = [{"role": role, "content": content} for role, content in messages]
        try:
            rendered: str = self._tokenizer.apply_chat_template(
                conversation, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # a template may raise anything
            raise ConfigError(
                f"{text.place}  the chat template fails: {first_line(error)}", "data.chat"
            ) from error
        return rendered


def _error(text: Text, length: int) -> SampleError | None:
    if text.error or length:
        return text.error
    return SampleError(f"{text.place}  the text has no tokens")


def _limit(
    config: TextData, tokenizer: Any, folder: SentenceFolder | None, model: TextModel
) -> tuple[int | None, str]:
    """Return the greatest number of tokens of a text, if limited, and where the limit is set."""
    positions, new = model.positions, model.new_tokens or 0
    if positions and new >= positions:
        raise ConfigError(
            f"the model has positions for {positions} tokens, a prompt included; set fewer",
            "model.generate.max_new_tokens",
        )
    if config.max_length:
        if model.learned and positions and config.max_length > positions - new:
            left = f"; {new} of them are for new tokens" if new else ""
            raise ConfigError(
                f"the model has positions for {positions} tokens{left}; set at most "
                f"{positions - new}",
                "data.max_length",
            )
        return config.max_length, "data.max_length"
    less = f", less {new} new tokens" if new else ""
    limits: list[tuple[int, str]] = []
    if folder and folder.max_length:
        limits.append((folder.max_length, folder.limit_file))
    elif new < tokenizer.model_max_length < _NO_LIMIT:
        limits.append((tokenizer.model_max_length - new, f"the tokenizer's{less}"))
    if positions:
        limits.append((positions - new, f"the model's positions{less}"))
    return min(limits, key=lambda limit: limit[0], default=(None, ""))
