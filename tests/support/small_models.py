"""Small transformers models with random weights, and tokenizers."""

from __future__ import annotations

import os
import random
import re
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before the import: tests do not use the network

import torch

from gradrun.core.optional import import_transformers

ROOT = Path(__file__).parents[2]
WIDTH = 32
CLASSES = ["good", "bad", "neither"]


def sentences(count: int) -> list[str]:
    """Return sentences of the documentation of this project."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    text = " ".join(page.read_text(encoding="utf-8") for page in pages)
    parts = re.split(r"(?<=[.:;!?])\s+", re.sub(r"\s+", " ", text))
    return [sentence for sentence in parts if sentence][:count]


def skewed(count: int, seed: int = 0) -> list[str]:
    """Return texts, a tenth of which are long."""
    draw = random.Random(seed)
    words = ["model", "data", "runs", "the", "a", "mode", "time", "memory"]
    return [
        " ".join(draw.choices(words, k=60 if draw.random() < 0.1 else draw.randint(1, 6)))
        for _ in range(count)
    ]


def save_tokenizer(folder: Path, **settings: Any) -> Any:
    """Save a BERT tokenizer with a vocabulary of letters and a few words."""
    letters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    words = ["the", "a", "of", "and", "model", "data", "runs", "mode", "time", "memory", "gradrun"]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters]
    tokens += [f"##{letter}" for letter in letters] + words
    folder.mkdir(parents=True, exist_ok=True)
    vocab = folder / "vocab.txt"
    vocab.write_text("\n".join(tokens))
    tokenizer = import_transformers("").BertTokenizerFast(
        str(vocab), **{"model_max_length": 64, **settings}
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def bert(kind: str = "BertModel", **settings: Any) -> Any:
    """Return a small BERT with random weights in eval mode."""
    torch.manual_seed(0)
    config = import_transformers("").BertConfig(
        **{
            "vocab_size": 250,
            "hidden_size": WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 64,
            "max_position_embeddings": 64,
            **settings,
        }
    )
    return getattr(import_transformers(""), kind)(config).eval()


def save_bert(folder: Path, kind: str = "BertModel", **settings: Any) -> Any:
    """Save a small BERT and its tokenizer to a folder."""
    save_tokenizer(folder)
    model = bert(kind, **settings)
    model.save_pretrained(folder)
    return model


def named_classes() -> dict[str, Any]:
    """Return settings of a model with class names."""
    return {"id2label": dict(enumerate(CLASSES)), "label2id": {n: i for i, n in enumerate(CLASSES)}}
