"""Warnings about a config that follow from its model and data, before any prediction."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from gradrun.config.data import SyntheticData
from gradrun.config.model import WeightedModel
from gradrun.config.schema import RunConfig
from gradrun.data.image_presets import NOT_APPLIED
from gradrun.data.source import BatchSource
from gradrun.models.class_names import same_names, shorten
from gradrun.models.loaded import LoadedModel
from gradrun.output.output_facts import other_pooling
from gradrun.results.result import Statement, Warning


def config_warnings(
    config: RunConfig, model: LoadedModel, data: BatchSource, statements: Iterable[Statement]
) -> list[Warning]:
    """Warn about settings that run, and probably give other predictions than intended."""
    return [
        *_model_warnings(model, config),
        *label_name_warnings(data.classes, model.classes),
        *_preprocessing_warnings(statements),
    ]


def _model_warnings(model: LoadedModel, config: RunConfig) -> Iterator[Warning]:
    if own := other_pooling(config.output, model):
        text = (
            f"the folder's own embedding is {own}; remove output.transform and output.select to "
            "use it"
        )
        yield Warning(code="other_pooling", text=text)
    if not model.random or isinstance(config.data, SyntheticData):
        return
    text = f"weights: {model.random}, so the predictions are not those of a trained model"
    if isinstance(config.model, WeightedModel):
        text += "; set model.weights to a file"
    if hasattr(config.model, "pretrained"):
        text += ", or model.pretrained: true"
    yield Warning(code="random_weights", text=text)


def label_name_warnings(names: Sequence[str], own: Sequence[str]) -> Iterator[Warning]:
    """Warn about labels that are compared with classes of other names."""
    if not names or len(names) != len(own) or same_names(names, own):
        return
    text = (
        f"the labels are {shorten(names)}, and the model's classes are {shorten(own)}: they are "
        "matched by position; set data.classes to the names of the labels, in the order of the "
        "model's classes"
    )
    yield Warning(code="label_names", text=text)


def _preprocessing_warnings(statements: Iterable[Statement]) -> Iterator[Warning]:
    """Warn if the config replaces the preprocessing that the model was trained with."""
    for statement in statements:
        if statement.topic == NOT_APPLIED:
            text = f"the config replaces {statement.text}; remove its keys to use that"
            yield Warning(code="other_preprocessing", text=text)
