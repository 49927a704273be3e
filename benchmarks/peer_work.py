"""The works of peers_bench.py: models, data and configs, written to a folder."""

from __future__ import annotations

import inspect
import os
import random
import re
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from pydoc_data import topics
from typing import Any, Literal, NamedTuple

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from pydantic import TypeAdapter

from gradrun.config.model import ModelConfig
from gradrun.models import load_model

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

_MODULES = (
    "argparse", "ast", "asyncio", "codecs", "collections", "configparser", "datetime", "decimal",
    "difflib", "email.message", "fractions", "inspect", "ipaddress", "logging", "mailbox",
    "pathlib", "random", "shutil", "statistics", "subprocess", "tarfile", "textwrap", "threading",
    "turtle", "typing", "unittest.mock", "zipfile",
)  # fmt: skip
"""Modules of the standard library with sentences in their documentation."""

Kind = Literal["arrays", "images", "embeddings", "classes"]


class Work(NamedTuple):
    """One model with one data set, which every peer runs."""

    kind: Kind
    """What peers have to read and to return."""
    title: str
    batch: int
    samples: int
    make: Callable[[Path, Work], None]
    """Writes the data, and the model if it is not of the zoo, into a folder."""
    model: dict[str, Any]
    """The model section; files are relative to the folder."""
    shape: tuple[int, ...] = ()
    """Shape of a sample of an array."""

    def config(self, folder: Path, output: Path) -> dict[str, Any]:
        """Return the config of gradrun: everything that can be left out is left out."""
        sections = _SECTIONS[self.kind]
        # Without a size, gradrun limits the tokens of a batch of texts.
        size = {} if self.kind in {"embeddings", "classes"} else {"batch_size": self.batch}
        data = {**size, **sections["data"]}
        data["path"] = str(folder / data["path"])
        files = {key: str(folder / self.model[key]) for key in _FILES if key in self.model}
        written = {"path": str(output), **sections.get("output", {})}
        return {"model": self.model | files, "data": data, "output": written}


_FILES = ("path", "weights")

_SECTIONS: dict[str, dict[str, Any]] = {
    "arrays": {"data": {"source": "arrays", "path": "x.npy"}},
    "images": {"data": {"source": "images", "path": "pictures", "preprocess": "imagenet"}},
    "embeddings": {"data": {"source": "text", "path": "sentences.txt"}},
    "classes": {
        "data": {"source": "text", "path": "sentences.txt"},
        "output": {"select": "logits", "transform": "softmax"},
    },
}


def _save_arrays(folder: Path, work: Work) -> None:
    drawn = np.random.default_rng(0)
    rows = drawn.standard_normal((work.samples, *work.shape), dtype=np.float32)
    np.save(folder / "x.npy", rows)
    _save_weights(folder, work)


def _save_weights(folder: Path, work: Work) -> None:
    """Save random weights, which all peers load."""
    torch.manual_seed(0)
    section = TypeAdapter(ModelConfig).validate_python(_zoo(work.model["name"], weights=None))
    network = load_model(section, torch.device("cpu")).module
    safetensors.torch.save_model(network, folder / work.model["weights"])


def _save_pictures(folder: Path, work: Work) -> None:
    """Save JPEGs that are crops of the sample photos of scikit-learn."""
    photos = [Image.fromarray(photo) for photo in _datasets().load_sample_images().images]
    drawn = random.Random(0)
    (folder / "pictures").mkdir()
    for number in range(work.samples):
        photo = photos[number % len(photos)]
        width, height = drawn.randint(300, photo.width), drawn.randint(280, photo.height)
        left, top = drawn.randint(0, photo.width - width), drawn.randint(0, photo.height - height)
        crop = photo.crop((left, top, left + width, top + height)).resize((500, 375))
        crop.save(folder / "pictures" / f"{number:03}.jpg", quality=90)
    _save_weights(folder, work)


def _datasets() -> Any:
    return import_module("sklearn.datasets")


def sentences(count: int) -> list[str]:
    """Return sentences of Python's own documentation, in random order."""
    texts = [*topics.topics.values(), *_docstrings()]
    paragraphs = [" ".join(part.split()) for text in texts for part in re.split(r"\n\s*\n", text)]
    found = dict.fromkeys(
        sentence
        for paragraph in paragraphs
        for sentence in re.split(r"(?<=[.!?]) (?=[A-Z])", paragraph)
        if re.match(r"[A-Z].* .* .*[.!?]$", sentence)
    )
    chosen = [*found]
    random.Random(0).shuffle(chosen)
    if len(chosen) < count:
        raise SystemExit(f"only {len(chosen)} sentences instead of {count} were found")
    return chosen[:count]


def _docstrings() -> Iterator[str]:
    for name in _MODULES:
        module = import_module(name)
        yield inspect.getdoc(module) or ""
        for _, member in inspect.getmembers(module):
            if inspect.isfunction(member) or inspect.isclass(member):
                yield inspect.getdoc(member) or ""
            if inspect.isclass(member):
                for _, method in inspect.getmembers(member, inspect.isfunction):
                    yield inspect.getdoc(method) or ""


def _save_texts(folder: Path, work: Work) -> None:
    lines = sentences(work.samples)
    (folder / "sentences.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if own := os.environ.get("SENTENCE_MODEL"):
        (folder / "minilm").symlink_to(Path(own).resolve())
    else:
        _save_minilm(folder / "minilm", lines, "BertModel")
        _save_modules(folder / "minilm")
    if work.kind == "classes":
        _save_minilm(folder / "classifier", lines, "BertForSequenceClassification")


def _save_minilm(folder: Path, lines: list[str], kind: str) -> None:
    """Save a BERT of 6 layers of 384 with random weights, and a tokenizer of the sentences."""
    import transformers
    from tokenizers import BertWordPieceTokenizer

    made = BertWordPieceTokenizer()
    made.train_from_iterator(lines, vocab_size=8000, show_progress=False)
    folder.mkdir()
    made.save_model(str(folder))
    tokenizer = transformers.BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=256)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=384, num_hidden_layers=6, num_attention_heads=12,
        intermediate_size=1536, num_labels=2, initializer_range=0.08,
    )  # fmt: skip
    getattr(transformers, kind)(config).save_pretrained(folder)


def _save_modules(folder: Path) -> None:
    """Make it a folder of sentence-transformers: mean pooling and normalization."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Normalize, Pooling, Transformer

    body = Transformer(str(folder), max_seq_length=256)
    SentenceTransformer(modules=[body, Pooling(384, "mean"), Normalize()]).save(str(folder))


def _zoo(name: str, weights: str | None = "weights.safetensors") -> dict[str, Any]:
    return {"source": "zoo", "name": name, "weights": weights}


def _huggingface(path: str, **keys: Any) -> dict[str, Any]:
    return {"source": "huggingface", "path": path, **keys}


_CLASSIFIER = _huggingface("classifier", auto_class="AutoModelForSequenceClassification")

WORKS: dict[str, Work] = {
    "mlp": Work(
        "arrays", "MLP of 8 layers of 64, batch 8", 8, 40_000, _save_arrays, _zoo("mlp"), (64,)
    ),
    "encoder": Work(
        "arrays", "encoder of 4 layers of 256, 128 tokens, batch 16",
        16, 320, _save_arrays, _zoo("transformer_encoder"), (128, 256),
    ),
    "resnet18": Work(
        "arrays", "ResNet-18, 224 x 224, batch 8",
        8, 160, _save_arrays, _zoo("resnet18"), (3, 224, 224),
    ),
    "embeddings": Work(
        "embeddings", "MiniLM, 3,000 sentences, batch 32",
        32, 3000, _save_texts, _huggingface("minilm"),
    ),
    "classes": Work(
        "classes", "MiniLM classifier, 3,000 sentences, batch 32",
        32, 3000, _save_texts, _CLASSIFIER,
    ),
    "images": Work(
        "images", "ResNet-18, 600 JPEGs, batch 8", 8, 600, _save_pictures, _zoo("resnet18")
    ),
}  # fmt: skip
