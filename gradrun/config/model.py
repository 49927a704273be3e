"""The `model` section."""

from __future__ import annotations

import re
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, ClassVar, Literal, get_args

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    JsonValue,
    PlainSerializer,
    ValidationInfo,
    model_validator,
)

from gradrun.config.base import FloatType, InputFile, InputFolder, Section, Target

_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def _folder_or_hub_name(name: Path | str, info: ValidationInfo) -> Path | str:
    """Return an existing folder as a Path, and a valid hub name as text."""
    if info.context is None:
        return name
    try:
        folder: Path = info.context.input_folder(Path(name))
    except ValueError:
        if _HUB_ID.fullmatch(str(name)):
            return str(name)
        raise
    return folder


Pretrained = Annotated[Path | str, AfterValidator(_folder_or_hub_name)]
"""A folder written by save_pretrained (a Path), or a name on the hub (text)."""


class CompileSection(Section):
    """How torch.compile compiles the model; a map, or true for the defaults."""

    example: ClassVar[str] = "{backend: inductor, freezing: true}"

    backend: str = Field(
        "inductor",
        description="a backend that is registered with torch; cudagraphs: the model's own kernels "
        "as one CUDA graph, for inputs of one shape on a CUDA device",
    )
    mode: (
        Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] | None
    ) = Field(
        None,
        description="optimization mode of inductor; reduce-overhead: with CUDA graphs, for inputs "
        "of one shape on a CUDA device; default: torch's",
    )
    freezing: bool = Field(
        False,
        description="inductor: make the weights constants of the program; needs run.mode no_grad "
        "or inference_mode",
    )
    dynamic: bool | None = Field(
        None,
        description="compile one program for all shapes (true) or one for each shape (false); "
        "default: true if batches differ in shape",
    )

    @property
    def cuda_graphs(self) -> str:
        """The option that asks for CUDA graphs, which need inputs of one shape; "" if none does."""
        if self.backend == "cudagraphs":
            return "backend: cudagraphs"
        return "mode: reduce-overhead" if self.mode == "reduce-overhead" else ""

    @model_validator(mode="after")
    def _check_backend_options(self) -> CompileSection:
        if self.cuda_graphs and self.dynamic:
            raise ValueError(
                f"dynamic: true cannot be combined with {self.cuda_graphs}, because a CUDA graph "
                "has one shape; remove dynamic"
            )
        set_keys = [key for key in ("mode", "freezing") if getattr(self, key)]
        if set_keys and self.backend != "inductor":
            raise ValueError(
                f"{set_keys[0]} is an option of the backend inductor, not of {self.backend}"
            )
        return self


def _expand_compile(given: object) -> object:
    if isinstance(given, bool) or given is None:
        return {} if given else None
    if isinstance(given, dict | CompileSection):
        return given
    example = CompileSection.example
    raise ValueError(f"{given!r:.60} is not true, false or a map, such as {example}")


Compile = Annotated[
    CompileSection | None,
    BeforeValidator(_expand_compile, json_schema_input_type=bool | CompileSection),
    PlainSerializer(lambda section: section.model_dump() if section else False),
]
"""A CompileSection, or None for an eager model; false in JSON."""


class _Model(Section):
    compile: Compile = Field(
        None, description="run the model through torch.compile: true, or a map of options"
    )


class EagerModel(_Model):
    """A model whose dtype, memory format and training mode can be chosen."""

    dtype: FloatType | None = Field(None, description="cast weights and float inputs to this type")
    channels_last: bool = Field(False, description="use the channels_last memory format (images)")
    training: bool = Field(False, description="leave dropout and batch norm in training mode")


class WeightedModel(EagerModel):
    """A model that is built in code and loads its weights from a file."""

    weights: InputFile | None = Field(
        None, description="a .safetensors file, or a checkpoint that weights_only can load"
    )
    weights_key: str | None = Field(
        None, description="key of the state dict in the checkpoint; default: detected"
    )


class ZooModel(WeightedModel):
    """A network that ships with gradrun, with trained weights where available."""

    source: Literal["zoo"]
    name: Literal["digits_cnn", "mlp", "resnet18", "transformer_encoder"]
    args: dict[str, JsonValue] = Field({}, description="keyword arguments of the network's build()")


def _check_layer(spec: JsonValue) -> JsonValue:
    if isinstance(spec, str) or (isinstance(spec, dict) and len(spec) == 1):
        return spec
    raise ValueError("a layer is a name (ReLU) or a name with its arguments ({Linear: [10, 5]})")


class LayersModel(WeightedModel):
    """A sequence of torch.nn layers by name; runs no user code."""

    source: Literal["layers"]
    layers: tuple[Annotated[JsonValue, AfterValidator(_check_layer)], ...] = Field(
        min_length=1, description="torch.nn names in order: {Linear: [10, 5]}, ReLU, ..."
    )


class PythonModel(WeightedModel):
    """A class, function or module in Python code; needs --trust-code."""

    source: Literal["python"]
    target: Target = Field(description="nets/mine.py:Net or package.module:build")
    root: InputFolder | None = Field(
        None, description="folder to import from; default: the file's folder, or the current one"
    )
    args: dict[str, JsonValue] = Field({}, description="keyword arguments of the target")


class TorchScriptModel(EagerModel):
    """A file written by torch.jit.save; needs --trust-code."""

    source: Literal["torchscript"]
    path: InputFile


class ExportedModel(_Model):
    """A file written by torch.export.save, which fixed dtype and mode; needs --trust-code."""

    source: Literal["exported"]
    path: InputFile


AutoClass = Literal[
    "AutoModel",
    "AutoModelForTextEncoding",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForCausalLM",
    "AutoModelForMaskedLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForSpeechSeq2Seq",
    "AutoModelForImageClassification",
    "AutoModelForAudioClassification",
]
_TYPO = 0.93
"""Similarity of a mistyped name with the intended one; other classes reach 0.89."""


def _reject_other_auto_class(name: object) -> object:
    """Explain a class of transformers that is not supported, instead of suggesting another."""
    known = get_args(AutoClass)
    if (
        not isinstance(name, str)
        or not name.startswith("AutoModelFor")
        or get_close_matches(name, known, cutoff=_TYPO)
    ):
        return name
    way = (
        "it generates text from images; write a python target whose forward calls generate()"
        if "ToText" in name
        else "write a python target that returns this model"
    )
    raise ValueError(f"{name} is not supported yet: {way} (allowed: {', '.join(known)})")


_NEEDS_GENERATE = {"AutoModelForSeq2SeqLM", "AutoModelForSpeechSeq2Seq"}
GENERATORS = {"AutoModelForCausalLM", *_NEEDS_GENERATE}
"""Classes that can generate text."""


class HuggingFaceModel(EagerModel):
    """A transformers model, from a folder or from the hub."""

    source: Literal["huggingface"]
    path: Pretrained = Field(description="a folder written by save_pretrained, or a hub name")
    revision: str | None = Field(None, description="the hub's branch, tag or commit; default: main")
    auto_class: Annotated[
        AutoClass, BeforeValidator(_reject_other_auto_class, json_schema_input_type=AutoClass)
    ] = Field("AutoModel", description="the transformers class, which decides the model's head")
    attention: Literal["eager", "sdpa", "flash_attention_2", "flex_attention"] | None = Field(
        None, description="attention implementation; default: chosen by transformers"
    )
    random_weights: bool = Field(
        False,
        description="initialize weights missing in the files from run.seed; default: an error",
    )
    generate: dict[str, JsonValue] | None = Field(
        None,
        description="generate text: {max_new_tokens: 64, do_sample: true, temperature: 0.7, "
        "stop_strings: [...]}, settings of transformers' GenerationConfig; {} for those of the "
        "model's generation_config.json; default: one forward pass",
    )

    @model_validator(mode="after")
    def _check_generate(self) -> HuggingFaceModel:
        if self.generate is None:
            if self.auto_class in _NEEDS_GENERATE:
                raise ValueError(
                    f"{self.auto_class} needs model.generate, because its decoder writes the "
                    "text step by step: set model.generate: {max_new_tokens: 64}. "
                    "AutoModelForTextEncoding runs the encoder alone"
                )
            return self
        if self.auto_class not in GENERATORS:
            raise ValueError(
                "model.generate needs a model that writes text; set model.auto_class to "
                f"{', '.join(sorted(GENERATORS))}"
            )
        if self.compile is not None:
            raise ValueError(
                "model.compile cannot be combined with model.generate; remove one of them"
            )
        return self


_WEIGHT_ARGUMENTS = {
    "cache_dir", "checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay",
    "weights", "weights_backbone",
}  # fmt: skip
"""Arguments that make the libraries download or unpickle files, which could run code."""


def _reject_weight_arguments(args: dict[str, JsonValue]) -> dict[str, JsonValue]:
    if rejected := sorted(_WEIGHT_ARGUMENTS & args.keys()):
        raise ValueError(
            f"{rejected[0]} is not allowed in args; set model.weights to a file of weights, or "
            "model.pretrained for the library's own"
        )
    return args


class _LibraryModel(WeightedModel):
    name: str = Field(pattern=r"^\w[\w.-]*$", description="the library's name: resnet18")
    pretrained: bool = Field(False, description="download the library's own weights")
    args: Annotated[dict[str, JsonValue], AfterValidator(_reject_weight_arguments)] = Field(
        {}, description="keyword arguments: {num_classes: 10}"
    )


class TimmModel(_LibraryModel):
    """A timm model by name."""

    source: Literal["timm"]


class TorchvisionModel(_LibraryModel):
    """A torchvision model by name."""

    source: Literal["torchvision"]


ModelConfig = Annotated[
    ZooModel
    | LayersModel
    | PythonModel
    | TorchScriptModel
    | ExportedModel
    | HuggingFaceModel
    | TimmModel
    | TorchvisionModel,
    Field(discriminator="source"),
]
