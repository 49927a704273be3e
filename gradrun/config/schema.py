"""RunConfig, the whole config of a run; each section has a module of its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from gradrun.config import limits
from gradrun.config.base import Section
from gradrun.config.check import CheckSection
from gradrun.config.data import DataConfig, TableData
from gradrun.config.engine import EngineConfig
from gradrun.config.model import ModelConfig, PythonModel
from gradrun.config.output import OutputSection
from gradrun.config.run import METRIC_NAMES, MeasureSection, Metrics, RunSection
from gradrun.config.tune import TuneSection
from gradrun.core.errors import ConfigError
from gradrun.core.grad_mode import GradMode
from gradrun.core.input_files import is_pattern, list_files

_FILES = {"model": "net", "data": "data"}
"""Section -> name of a Python file, for examples."""


_PROMPTS = {
    "AutoModelForCausalLM": "text",
    "AutoModelForSeq2SeqLM": "text",
    "AutoModelForSpeechSeq2Seq": "audio",
}
"""Class of a model that generates text -> data.source of its prompts."""


def _check_prompts(model: Any, data: Any) -> None:
    """Check that the data are prompts, if the model generates text."""
    if getattr(model, "generate", None) is None:
        return
    source = _PROMPTS[model.auto_class]
    if data.source != source:
        raise ValueError(f"model.generate with {model.auto_class} needs data.source: {source}")
    if data.call not in {"auto", "keyword"}:
        raise ValueError("model.generate passes its inputs by keyword; remove data.call")


class RunConfig(Section):
    """The config of a run."""

    model: ModelConfig
    data: DataConfig
    run: RunSection = RunSection()
    engine: EngineConfig | None = Field(
        None, description="worker processes that share the run; default: one process"
    )
    measure: MeasureSection = MeasureSection()
    output: OutputSection
    metrics: Metrics = Field(
        (), description="accuracy, f1, iou, ...: the model's outputs compared with data.labels"
    )
    check: CheckSection = CheckSection()
    tune: TuneSection = TuneSection()

    @field_validator("check")
    @classmethod
    def _check_metric_limits(cls, check: CheckSection, info: ValidationInfo) -> CheckSection:
        known = {*METRIC_NAMES, *(metric.title for metric in info.data.get("metrics", ()))}
        parsers = {"limits": limits.number_limit, "regression": limits.percentage}
        for key, parse in parsers.items():
            section = getattr(check, key)
            for name, limit in section.of_metrics().items():
                if name not in known:
                    allowed = [*type(section).model_fields, *sorted(known)]
                    context = {"section": key, "name": name, "allowed": allowed}
                    raise PydanticCustomError("unknown_limit", "unknown limit {name}", context)
                try:
                    parse(limit)
                except ValueError as error:
                    context = {"section": key, "name": name, "problem": str(error)}
                    raise PydanticCustomError("limit", "{problem}", context) from error
        return check

    @field_validator("output")
    @classmethod
    def _check_kept_columns(cls, output: OutputSection, info: ValidationInfo) -> OutputSection:
        data = info.data.get("data")
        if not output.keep or data is None:
            return output
        has_columns = isinstance(data, TableData)
        allowed = ("csv", "jsonl", "parquet", "files")
        problem = ""
        if not has_columns:
            problem = f"data of source {data.source} have no columns to keep"
        elif output.format not in allowed:
            problem = f"format {output.format} cannot store columns of the input; set output.format"
            problem += ": csv, jsonl, parquet or files"
        elif len({*output.keep}) < len(output.keep):
            problem = "a column is listed twice"
        elif "id" in output.keep and getattr(data, "id", None) != "id":
            problem = "the predictions have a column id of their own; set data.id: id, which is "
            problem += "written to it"
        if problem:
            raise ValueError(f"keep: {problem}")
        return output

    @property
    def kept_columns(self) -> tuple[str, ...]:
        """The columns of output.keep, without the ids, which are written anyway."""
        return tuple(name for name in self.output.keep if name != "id")

    @field_validator("data")
    @classmethod
    def _check_data_for_model(cls, data: Any, info: ValidationInfo) -> Any:
        if "model" in info.data:
            model = info.data["model"]
            data.check_model(model)
            _check_prompts(model, data)
        return data

    @field_validator("output")
    @classmethod
    def _check_output_outside_of_data(
        cls, output: OutputSection, info: ValidationInfo
    ) -> OutputSection:
        for folder in info.data["data"].folders() if "data" in info.data else ():
            if output.path.is_relative_to(folder):
                raise ValueError(
                    f"{output.path} is inside of data.path, {folder}, so that the next run would "
                    "read its files as data; choose another folder, or a pattern for data.path"
                )
            if folder.is_relative_to(output.path):
                raise ValueError(
                    f"{output.path} contains data.path, {folder}, which an overwrite could remove; "
                    "choose another folder"
                )
        return output

    @field_validator("output")
    @classmethod
    def _check_perplexity(cls, output: OutputSection, info: ValidationInfo) -> OutputSection:
        kind = getattr(info.data.get("model"), "auto_class", "AutoModelForCausalLM")
        every = output.transform
        steps = every.values() if isinstance(every, dict) else [every]
        if kind != "AutoModelForCausalLM" and any("perplexity" in some for some in steps):
            raise ValueError(
                "the transform perplexity needs a model that predicts the next token; set "
                "model.auto_class to AutoModelForCausalLM"
            )
        return output

    @field_validator("run")
    @classmethod
    def _check_mode_for_freezing(cls, run: RunSection, info: ValidationInfo) -> RunSection:
        compiled = info.data["model"].compile if "model" in info.data else None
        if compiled and compiled.freezing and run.mode is GradMode.GRAD:
            raise ValueError(
                "mode grad cannot be combined with model.compile.freezing, which makes "
                "constants of the weights; use no_grad or inference_mode"
            )
        return run

    def replace(self, changes: Mapping[str, Any]) -> Self:
        """Return a validated copy with changed sections or keys, such as {"run.mode": "grad"}."""
        sections = dict(self)
        for key, value in changes.items():
            section, _, name = key.partition(".")
            if name:
                old = sections[section]
                sections[section] = type(old).model_validate(dict(old) | {name: value})
            else:
                sections[section] = value
        return self.model_validate(sections)

    def targets(self) -> dict[str, str]:
        """Return config key -> target of the user's Python code."""
        model = {"target": self.model.target} if isinstance(self.model, PythonModel) else {}
        return {
            f"{section}.{key}": target
            for section, targets in (("model", model), ("data", self.data.targets()))
            for key, target in targets.items()
        }

    def check_importable(self) -> None:
        """Check that another process can import the user's code.

        Raises:
            ConfigError: it is defined in the running program itself.
        """
        for key, target in self.targets().items():
            if target.startswith("__main__:"):
                name, file = target.removeprefix("__main__:"), _FILES[key.partition(".")[0]]
                raise ConfigError(
                    f"{target} exists only in the running program, and this command starts other "
                    f"processes; define it in a separate file and set {key} to {file}.py:{name}",
                    key,
                )

    def input_files(self) -> list[Path]:
        """Return all files and folders that the run reads."""
        paths: list[Path] = []
        pending = [section.model_dump(exclude={"root"}) for section in (self.model, self.data)]
        while pending:
            value = pending.pop()
            if isinstance(value, dict):
                pending += value.values()
            elif isinstance(value, tuple):
                pending += value
            elif isinstance(value, Path):
                if is_pattern(value):
                    paths += list_files(value, "data.path", one_format=False).files
                else:
                    paths.append(value)
        return paths
