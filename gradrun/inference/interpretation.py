"""State every interpretation of model, data and outputs that changes predictions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch

from gradrun.config.load import LoadedConfig, is_trusted
from gradrun.config.run import RunSection
from gradrun.config.schema import RunConfig
from gradrun.core.cpu import thread_variable
from gradrun.core.units import list_names, pluralize
from gradrun.data import open_data
from gradrun.data.source import BatchSource, read_one
from gradrun.inference.compilation import compile_model
from gradrun.inference.config_warnings import config_warnings
from gradrun.inference.device import device_context
from gradrun.models import load_model
from gradrun.models.loaded import LoadedModel
from gradrun.output.output_facts import planned_statements
from gradrun.output.transforms import resolve_output
from gradrun.results.result import Padding, Statement, Warning


class Explanation(NamedTuple):
    """How a config is interpreted, and what in it is probably not intended."""

    statements: tuple[Statement, ...]
    warnings: tuple[Warning, ...]


def interpret(
    model: LoadedModel,
    data: BatchSource,
    outputs: Iterable[Statement],
    texts: Padding | None,
    run: RunSection,
) -> tuple[Statement, ...]:
    """Return the statements of all parts of a run, in the order of the data flow.

    Each part states its own interpretations; call this after the run, so that counts are complete.
    `outputs` are the statements of the transforms, `texts` the counts of texts if the data consists
    of them.
    """
    threads = pluralize(torch.get_num_threads(), "thread")
    if run.threads == "auto" and (variable := thread_variable()):
        threads += f" ({variable})"
    return (
        *model.statements(),
        *data.statements(),
        *_numbers_as_labels(model, data),
        *(texts.statements() if texts else ()),
        *outputs,
        Statement(topic="threads", text=threads),
    )


def _numbers_as_labels(model: LoadedModel, data: BatchSource) -> Iterator[Statement]:
    """State that a model without class names is compared with the labels by number."""
    if not model.classes and data.classes:
        numbered = list_names([f"{i} is {name}" for i, name in enumerate(data.classes)])
        text = f"the model names none; numbered as the labels: {numbered}"
        yield Statement(topic="classes", text=text)


def explain(loaded: LoadedConfig, *, trust_code: bool = False) -> Explanation:
    """Open the model and the data of a config, and return the statements of all parts.

    Raises:
        ConfigError: the model or the data cannot be opened.
    """
    config = loaded.config
    with loaded.error_locations(), device_context(config.run) as device:
        model = load_model(
            config.model, device, data=config.data, trust_code=is_trusted(trust_code)
        )
        data = open_data(
            config.data,
            seed=config.run.seed,
            model=config.model,
            model_classes=model.classes,
            device=device,
            trust_code=is_trusted(trust_code),
            keep=config.kept_columns,
        )
        model = compile_model(model, config.model.compile, data, device)
        read_one(data, 0)  # counts the texts of the first chunk
        texts = data.padding(0, data.chunk_size) if data.of_texts else None
        statements = describe(config, model, data, texts)
        return Explanation(statements, tuple(config_warnings(config, model, data, statements)))


def describe(
    config: RunConfig, model: LoadedModel, data: BatchSource, texts: Padding | None = None
) -> tuple[Statement, ...]:
    """Return the statements of a config, with the counts of the batches read so far.

    Raises:
        ConfigError: a transform does not fit the model.
    """
    output = resolve_output(config.output, model)
    return interpret(model, data, planned_statements(output, model), texts, config.run)
