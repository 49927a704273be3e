"""A model of transformers, from a folder or from the hub."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch

from gradrun.config.model import HuggingFaceModel
from gradrun.core.errors import ConfigError
from gradrun.core.optional import hub_errors, import_transformers, needs_trust
from gradrun.core.pretrained import SentenceFolder, read_sentence_folder
from gradrun.core.units import first_names
from gradrun.models.initialization import describe_random
from gradrun.models.loaded import LoadedModel
from gradrun.models.sentence_embedding import build_embedding
from gradrun.results.result import Statement

_KEY = "model.path"
_MAX_LISTED = 4
_WEIGHT_FILES = (
    "model.safetensors",
    "model-*-of-*.safetensors",
    "pytorch_model.bin",
    "pytorch_model-*-of-*.bin",
)
_MULTI_LABEL = "multi_label_classification"
_ENCODERS = {"AutoModel", "AutoModelForTextEncoding"}
_CLASSIFIERS = {
    "AutoModelForSequenceClassification",
    "AutoModelForImageClassification",
    "AutoModelForAudioClassification",
}


def open_model(config: HuggingFaceModel, *, trust_code: bool) -> LoadedModel:
    """Load the model with the head that `auto_class` names.

    Without trust, code and pickles in the folder are refused.

    Raises:
        ConfigError: the folder needs trust, cannot be read, or lacks weights of the model.
    """
    transformers = import_transformers(_KEY)
    folder = read_sentence_folder(config.path, config.revision, _KEY)
    settings: dict[str, Any] = {
        "revision": config.revision or "main",
        "subfolder": folder.subfolder if folder else "",
        "trust_remote_code": trust_code,
    }
    with hub_errors(config.path, _KEY):
        model_config = transformers.AutoConfig.from_pretrained(config.path, **settings)
        if not trust_code and config.attention is None:
            _check_kernels(config, settings, transformers)
        auto, notes = _auto_class(config, folder, model_config, transformers)
        model, report = getattr(transformers, auto).from_pretrained(
            config.path,
            **settings,
            config=model_config,
            dtype=getattr(torch, config.dtype) if config.dtype else "auto",
            attn_implementation=config.attention,
            use_safetensors=None if trust_code else True,
            output_loading_info=True,
        )
    missing = sorted(report["missing_keys"])
    if missing and not config.random_weights:
        raise ConfigError(
            f"{config.path} has no weights for {first_names(missing, _MAX_LISTED)}; set "
            "model.auto_class to the class that was saved, or set model.random_weights: true to "
            "draw them from run.seed",
            "model.auto_class",
        )
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False  # a single forward pass does not reuse a cache
    classes = _class_names(model.config) if "Classification" in config.auto_class else ()
    embedding = None
    if folder and folder.embeds and auto in _ENCODERS:
        embedding = build_embedding(folder, config.path, config.revision)
    return LoadedModel(
        model,
        weights=_origin(config.path, model),
        files=_weight_files(config.path, folder.subfolder if folder else ""),
        random=describe_random(missing, model),
        classes=classes,
        embedding=embedding,
        probabilities=_probabilities(model.config) if auto in _CLASSIFIERS else "",
        notes=notes,
    )


def _origin(path: Path | str, model: Any) -> str:
    """Return the name of a folder, or a hub name with the commit that was loaded."""
    if isinstance(path, Path):
        return path.name
    commit = getattr(model.config, "_commit_hash", None)
    return f"{path} at commit {commit[:8]}" if commit else str(path)


def _weight_files(path: Path | str, subfolder: str) -> tuple[Path, ...]:
    """Return the weight files of a local folder in the order in which transformers looks for them.

    A model on the hub is identified by its commit.
    """
    if not isinstance(path, Path):
        return ()
    found = (sorted((path / subfolder).glob(pattern)) for pattern in _WEIGHT_FILES)
    return tuple(next(filter(None, found), ()))


def _auto_class(
    config: HuggingFaceModel, folder: SentenceFolder | None, model_config: Any, transformers: Any
) -> tuple[str, tuple[Statement, ...]]:
    """Return the auto class; for a T5 of which only the encoder is saved or needed, its encoder."""
    classes = transformers.AutoModelForTextEncoding._model_mapping
    kind = type(model_config)
    has_encoder = kind in classes and classes[kind].__name__.endswith("EncoderModel")
    saved_alone = any(name.endswith("EncoderModel") for name in model_config.architectures or ())
    needed_alone = folder is not None and folder.embeds
    if config.auto_class == "AutoModel" and has_encoder and (saved_alone or needed_alone):
        note = Statement(topic="model", text="only the encoder, as AutoModelForTextEncoding")
        return "AutoModelForTextEncoding", (note,)
    return config.auto_class, ()


def _probabilities(model_config: Any) -> Literal["softmax", "sigmoid", "none"]:
    """Return how logits become probabilities, as the pipelines of transformers decide it."""
    kind = getattr(model_config, "problem_type", None)
    if kind == "regression":
        return "none"
    return "sigmoid" if kind == _MULTI_LABEL or model_config.num_labels == 1 else "softmax"


def _class_names(model_config: Any) -> tuple[str, ...]:
    """Return the names of the classes in order; () if they are the generic LABEL_0, LABEL_1."""
    id2label = model_config.id2label or {}
    names = tuple(str(id2label.get(number, number)) for number in range(len(id2label)))
    return () if names == tuple(f"LABEL_{number}" for number in range(len(names))) else names


def _check_kernels(config: HuggingFaceModel, settings: dict[str, Any], transformers: Any) -> None:
    """Refuse attention kernels, which transformers would download from the hub as code."""
    raw, _ = transformers.PretrainedConfig.get_config_dict(
        config.path, revision=settings["revision"], subfolder=settings["subfolder"]
    )
    for name in _attention_names(raw):
        if "/" in name:
            raise ConfigError(
                f"{config.path} requires the kernel {name!r} from the hub, {needs_trust()}, or "
                "choose model.attention",
                _KEY,
            )


def _attention_names(raw: Any) -> Iterator[str]:
    """Yield every attention implementation in a model's config, including its sub-configs."""
    for key, value in raw.items() if isinstance(raw, dict) else ():
        if "attn_implementation" in str(key):
            yield str(value)
        yield from _attention_names(value)
