"""Facts of a transformers model on which the preparation of texts depends."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import nn

from gradrun.config.model import HuggingFaceModel, ModelConfig
from gradrun.core.optional import import_transformers
from gradrun.core.pretrained import read_sentence_folder


class TextModel(NamedTuple):
    """The facts; the defaults apply to models that are not of transformers."""

    positions: int | None = None
    """Tokens of the longest text for which the model has positions."""
    learned: bool = False
    """Whether positions are learned vectors, so that the model fails on a longer text."""
    generates: bool = False
    """Whether it predicts the next token, which padding on the right would separate."""
    position_ids: bool = False
    """Whether its forward accepts position_ids that count from 0."""
    new_tokens: int | None = None
    """Greatest number of tokens that it appends to a text; None if it generates none."""


def text_model(model: ModelConfig | None) -> TextModel:
    """Return the facts of a `huggingface` model, from its class without weights."""
    if not isinstance(model, HuggingFaceModel):
        return TextModel()
    generates = model.auto_class == "AutoModelForCausalLM"
    new_tokens = _new_tokens(model) if generates and model.generate is not None else None
    try:
        module = _without_weights(model)
    except Exception:  # code of the hub, or a class that cannot be built this way
        return TextModel(generates=generates, new_tokens=new_tokens)
    positions = getattr(module.config.get_text_config(), "max_position_embeddings", None) or 0
    tables = [
        table
        for name, table in module.named_modules()
        if isinstance(table, nn.Embedding)
        and ("position" in name or name.endswith("wpe"))
        and table.num_embeddings >= positions > 0
    ]
    # RoBERTa and its relatives count positions from the padding index on.
    offset = max(
        (table.padding_idx + 1 for table in tables if table.padding_idx is not None), default=0
    )
    accepted = inspect.signature(module.forward).parameters
    return TextModel(
        positions=positions - offset if positions > offset else None,
        learned=bool(tables),
        generates=generates,
        position_ids="position_ids" in accepted and not offset,
        new_tokens=new_tokens,
    )


def _new_tokens(model: HuggingFaceModel) -> int | None:
    """Return model.generate.max_new_tokens, or that of the folder's generation_config.json."""
    given = (model.generate or {}).get("max_new_tokens")
    if isinstance(given, int):
        return given
    kind = import_transformers("model.generate").GenerationConfig
    try:
        own = kind.from_pretrained(model.path, revision=model.revision or "main")
    except OSError:
        return None
    return own.max_new_tokens if isinstance(own.max_new_tokens, int) else None


def _without_weights(model: HuggingFaceModel) -> Any:
    transformers = import_transformers("data.tokenizer")
    folder = read_sentence_folder(model.path, model.revision, "model.path")
    config = transformers.AutoConfig.from_pretrained(
        model.path,
        revision=model.revision or "main",
        subfolder=folder.subfolder if folder else "",
        trust_remote_code=False,
    )
    with torch.device("meta"):
        # Another attention than the config's, which could name a kernel to download.
        return getattr(transformers, model.auto_class).from_config(
            config, attn_implementation="eager", trust_remote_code=False
        )
