"""Fit a model to the tokenizer of its texts: the pad token, and the prompt that pooling skips."""

from __future__ import annotations

from typing import Any

from gradrun.config.data import TextData
from gradrun.config.model import ModelConfig
from gradrun.core.errors import ConfigError
from gradrun.core.pretrained import choose_prompt, load_tokenizer, read_sentence_folder
from gradrun.models.loaded import LoadedModel
from gradrun.models.sentence_embedding import SentenceEmbedding
from gradrun.results.result import Statement


def fit_to_tokenizer(model: LoadedModel, config: ModelConfig, data: TextData) -> LoadedModel:
    """Give a transformers model the pad token of the tokenizer, and its pooling the prompt.

    A causal classifier finds the last token of a text by the pad token in its config; with another
    one, predictions depend on the padding, and so on the other texts of the batch.

    Raises:
        ConfigError: the tokenizer cannot be loaded, or its pad token is not in the vocabulary.
    """
    model_config: Any = getattr(model.module, "config", None)
    if not hasattr(model_config, "pad_token_id"):
        return model
    source, revision = data.tokenizer_source(config)
    folder = read_sentence_folder(source, revision, "data.tokenizer")
    tokenizer = load_tokenizer(source, revision, folder)
    _check_vocabulary(model.module, tokenizer)
    if isinstance(model.embedding, SentenceEmbedding):
        prompt = choose_prompt(folder, data.prompt, data.prompt_name)
        model = model.replace(embedding=model.embedding.skipping(_tokens_of(tokenizer, prompt)))
    old = model_config.pad_token_id
    if old == tokenizer.pad_token_id:
        return model
    for section in (model_config, model_config.get_text_config()):
        section.pad_token_id = tokenizer.pad_token_id
    token = f"{tokenizer.pad_token} ({tokenizer.pad_token_id}) of the tokenizer"
    note = Statement(topic="pad token", text=f"{token}, instead of {old} in the model's config")
    return model.replace(notes=(*model.notes, note))


def _check_vocabulary(module: Any, tokenizer: Any) -> None:
    try:
        size = module.get_input_embeddings().num_embeddings
    except (AttributeError, NotImplementedError):
        return
    if tokenizer.pad_token_id >= size:
        raise ConfigError(
            f"the pad token {tokenizer.pad_token!r} of the tokenizer has the number "
            f"{tokenizer.pad_token_id}, but the model has {size} tokens; resize the model's "
            "embeddings, or set data.tokenizer to the tokenizer it was trained with",
            "data.tokenizer",
        )


def _tokens_of(tokenizer: Any, prompt: str) -> int:
    """Count the tokens of the prompt in a text, which a special token at the end is not."""
    if not prompt:
        return 0
    tokens = tokenizer(prompt)["input_ids"]
    return len(tokens) - (tokens[-1] in tokenizer.all_special_ids)
