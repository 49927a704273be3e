"""What can be asked for: RunConfig and its sections, with their names, defaults and meaning.

Does no I/O and probes no device: paths are resolved and files looked for by the context that
yamlfile.py hands to the validators.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, Protocol, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    PlainSerializer,
    PrivateAttr,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from gradrun.config import limits
from gradrun.core.grad_mode import GradMode as GradMode


class PathResolver(Protocol):
    """How a config's paths are read; given to validation as its context."""

    def input_file(self, path: Path) -> Path:
        """The absolute path of a file that exists; ValueError says what is wrong otherwise."""

    def input_folder(self, path: Path) -> Path:
        """The absolute path of a folder that exists; ValueError says what is wrong otherwise."""

    def output_folder(self, path: Path) -> Path:
        """The absolute path of what is to be written; ValueError says what is wrong otherwise."""


def _input_file(path: Path, info: ValidationInfo) -> Path:
    return info.context.input_file(path) if info.context else path


def _input_path(path: Path, info: ValidationInfo) -> Path:
    if info.context is None:
        return path
    try:
        return info.context.input_folder(path)  # type: ignore[no-any-return]
    except ValueError:
        return _input_file(path, info)


def _output_folder(path: Path, info: ValidationInfo) -> Path:
    return info.context.output_folder(path) if info.context else path


def _expected_file(path: Path, info: ValidationInfo) -> Path:
    if path.suffix != ".safetensors":
        raise PydanticCustomError("expected", "golden outputs are a .safetensors file")
    return info.context.output_folder(path) if info.context else path


ExpectedFile = Annotated[Path, AfterValidator(_expected_file)]


def _input_folder(path: Path, info: ValidationInfo) -> Path:
    return info.context.input_folder(path) if info.context else path


InputFolder = Annotated[Path, AfterValidator(_input_folder)]


_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def _pretrained(name: Path | str, info: ValidationInfo) -> Path | str:
    """A folder where there is one; else the name on the hub that the text can be."""
    if info.context is None:
        return name
    try:
        folder: Path = info.context.input_folder(Path(name))
    except ValueError:
        if _HUB_ID.fullmatch(str(name)):
            return str(name)
        raise
    return folder


InputFile = Annotated[Path, AfterValidator(_input_file)]
InputPath = Annotated[Path, AfterValidator(_input_path)]
"""A file or a folder."""
OutputFolder = Annotated[Path, AfterValidator(_output_folder)]
Pretrained = Annotated[Path | str, AfterValidator(_pretrained)]
"""A folder of save_pretrained (a Path), or a name on the hub (text)."""
Size = Annotated[int, Field(gt=0, le=2**40)]
Shape = Annotated[tuple[Size, ...], Field(max_length=16)]
FloatType = Literal["float32", "float64", "float16", "bfloat16"]
DType = Literal[FloatType, "int8", "int16", "int32", "int64", "uint8", "bool"]


class Section(BaseModel):
    """Frozen, strict (a text is no number) and closed (an unknown key is an error)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


# --- model -------------------------------------------------------------------------------------


class _Model(Section):
    compile: bool = Field(False, description="run the model through torch.compile")


class EagerModel(_Model):
    """A model whose type, memory format and training flag can still be chosen."""

    dtype: FloatType | None = Field(None, description="cast weights and float inputs to this type")
    channels_last: bool = Field(False, description="use the channels_last memory format (images)")
    training: bool = Field(False, description="leave dropout and batch norm in training mode")


class WeightedModel(EagerModel):
    """A model that is built first and given its weights from a file."""

    weights: InputFile | None = Field(
        None, description="a .safetensors file, or a checkpoint that weights_only can load"
    )
    weights_key: str | None = Field(
        None, description="where the state dict lies in the checkpoint, if not where it usually is"
    )


class ZooModel(WeightedModel):
    """A network that ships with gradrun; trained weights come with it where they exist."""

    source: Literal["zoo"]
    name: Literal["digits_cnn", "mlp", "resnet18", "transformer_encoder"]
    args: dict[str, JsonValue] = Field({}, description="keyword arguments of the network's build()")


def _layer(spec: JsonValue) -> JsonValue:
    if isinstance(spec, str) or (isinstance(spec, dict) and len(spec) == 1):
        return spec
    raise PydanticCustomError(
        "layer", "a layer is a name (ReLU) or one name with its arguments ({{Linear: [10, 5]}})"
    )


class LayersModel(WeightedModel):
    """A chain of torch.nn layers by name; needs no code."""

    source: Literal["layers"]
    layers: tuple[Annotated[JsonValue, AfterValidator(_layer)], ...] = Field(
        min_length=1, description="torch.nn names in order: {Linear: [10, 5]}, ReLU, ..."
    )


def _target(target: str, info: ValidationInfo) -> str:
    place, colon, name = target.rpartition(":")
    if not colon or not place or not name.isidentifier():
        raise PydanticCustomError(
            "target", "a target is file.py:Name or package.module:name, such as nets/mine.py:Net"
        )
    return f"{_input_file(Path(place), info)}:{name}" if place.endswith(".py") else target


class PythonModel(WeightedModel):
    """A class, function or module of the user's own; runs code, so it needs --trust-code."""

    source: Literal["python"]
    target: Annotated[str, AfterValidator(_target)] = Field(
        description="nets/mine.py:Net or package.module:build"
    )
    root: InputFolder | None = Field(
        None, description="where imports start; default: the file's folder, or the current one"
    )
    args: dict[str, JsonValue] = Field({}, description="keyword arguments of the target")


class TorchScriptModel(EagerModel):
    """A file from torch.jit.save."""

    source: Literal["torchscript"]
    path: InputFile


class ExportedModel(_Model):
    """A file from torch.export.save; its dtype and mode were fixed when it was exported."""

    source: Literal["exported"]
    path: InputFile


class HuggingFaceModel(EagerModel):
    """A model of transformers, from a folder or from the hub."""

    source: Literal["huggingface"]
    path: Pretrained = Field(description="a folder of save_pretrained, or a name on the hub")
    revision: str | None = Field(None, description="the hub's branch, tag or commit; default: main")
    auto_class: Literal[
        "AutoModel",
        "AutoModelForSequenceClassification",
        "AutoModelForTokenClassification",
        "AutoModelForCausalLM",
        "AutoModelForMaskedLM",
        "AutoModelForImageClassification",
    ] = Field("AutoModel", description="which head the model has")
    attention: Literal["eager", "sdpa", "flash_attention_2", "flex_attention"] | None = Field(
        None, description="how attention is computed; default: what transformers chooses"
    )
    random_weights: bool = Field(
        False, description="draw weights that the files lack from run.seed; default: an error"
    )


_WEIGHTS_BY = {
    "cache_dir",
    "checkpoint_path",
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "weights",
    "weights_backbone",
}
"""Arguments by which the libraries fetch or unpickle files, which could run code."""


def _no_weights(args: dict[str, JsonValue]) -> dict[str, JsonValue]:
    if found := sorted(_WEIGHTS_BY & args.keys()):
        raise PydanticCustomError(
            "weights_in_args",
            "{key} is no argument to give: model.weights names a file of weights, and "
            "model.pretrained asks for the library's own",
            {"key": found[0]},
        )
    return args


class _LibraryModel(WeightedModel):
    """An architecture by its name in a library of image models."""

    name: str = Field(pattern=r"^\w[\w.-]*$", description="resnet18, as the library calls it")
    pretrained: bool = Field(False, description="download the library's own weights")
    args: Annotated[dict[str, JsonValue], AfterValidator(_no_weights)] = Field(
        {}, description="keyword arguments: {num_classes: 10}"
    )


class TimmModel(_LibraryModel):
    """A model of timm, by name."""

    source: Literal["timm"]


class TorchvisionModel(_LibraryModel):
    """A model of torchvision, by name."""

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


# --- data --------------------------------------------------------------------------------------


class _Data(Section):
    batch_size: Size = Field(64, description="samples a batch; the last batch may be shorter")
    call: Literal["auto", "positional", "keyword"] = Field(
        "auto", description="how the model gets its inputs; auto: one by position, several by name"
    )

    def resolve_defaults(self, model: Any) -> Self:
        """The section with what it takes from the model's; PydanticCustomError where it lacks."""
        return self


class _Input(Section):
    dtype: DType | None = Field(None, description="convert to this type; default: as stored")
    scale: float | None = Field(None, description="multiply by this after the conversion")
    shape: Shape | None = Field(None, description="the shape of one sample; default: as stored")


Classes = Annotated[
    tuple[str, ...] | None,
    Field(description="what labels are called, in the order of the model's classes", min_length=2),
]


class SyntheticInput(Section):
    """One random input."""

    shape: Shape = Field(description="the shape of one sample, without the batch dimension")
    dtype: DType = "float32"
    distribution: Literal["normal", "uniform", "randint", "zeros", "ones"] = "normal"
    low: float = Field(0, description="lowest value of uniform and randint")
    high: float = Field(
        1, description="uniform and randint stay below this value, before rounding to dtype"
    )


class SyntheticData(_Data):
    """Seeded random inputs; sample i is the same whatever the batch size."""

    source: Literal["synthetic"]
    inputs: dict[str, SyntheticInput] = Field(min_length=1)
    samples: Size


class ArrayInput(_Input):
    """One input from an array."""

    path: InputFile | None = Field(None, description="a file of its own; default: data.path")
    key: str | None = Field(None, description="the array's name in an .npz or .safetensors file")


class ArrayLabels(Section):
    """An array with the true class or value of each sample."""

    path: InputFile | None = Field(None, description="a file of its own; default: data.path")
    key: str | None = Field(None, description="the array's name in an .npz or .safetensors file")


class ArraysData(_Data):
    """Arrays whose first dimension counts the samples: .npy, .npz or .safetensors."""

    source: Literal["arrays"]
    path: InputFile | None = None
    inputs: dict[str, ArrayInput] = Field({}, description="default: the one array in data.path")
    labels: ArrayLabels | None = Field(None, description="what metrics hold predictions against")


class RecordInput(_Input):
    """One input from columns, side by side."""

    columns: tuple[str, ...] = Field(
        min_length=1, description="numeric columns (or fields that hold lists), in order"
    )
    dtype: DType = "float32"


class RecordsData(_Data):
    """Rows of a .csv, .jsonl or .parquet file with numeric columns."""

    source: Literal["records"]
    path: InputFile
    inputs: dict[str, RecordInput] = Field(min_length=1)
    id: str | None = Field(None, description="the column that names each sample in .jsonl outputs")
    labels: str | None = Field(None, description="the column with each row's true class or value")
    classes: Classes = None


class TextData(_Data):
    """Texts through a tokenizer: the lines of a .txt file, or a field of .csv or .jsonl."""

    source: Literal["text"]
    path: InputFile
    field: str | None = Field(None, description="the column that holds the text; .txt has none")
    id: str | None = Field(None, description="the column that names each sample in the outputs")
    labels: str | None = Field(None, description="the column with each text's true class or value")
    classes: Classes = None
    tokenizer: Pretrained | None = Field(
        None, description="a folder or a name on the hub; default: the huggingface model's own"
    )
    revision: str | None = Field(None, description="the tokenizer's branch, tag or commit")
    inputs: tuple[str, ...] = Field(
        (), description="which of the tokenizer's outputs the model gets; default: all"
    )
    max_length: Size | None = Field(
        None, description="longer texts are cut to so many tokens; default: the tokenizer's limit"
    )
    padding: Literal["longest", "max_length"] = Field(
        "longest", description="fill up to the longest text of the batch, or always to max_length"
    )
    group_by_length: Literal["auto"] | bool = Field(
        "auto", description="run texts of like length together; auto: where it saves a tenth"
    )

    _of_model: tuple[Path | str, str | None] | None = PrivateAttr(None)

    @property
    def vocabulary(self) -> tuple[Path | str, str | None]:
        """Where the tokenizer comes from, and its revision; needs `beside`."""
        return self._of_model if self.tokenizer is None else (self.tokenizer, self.revision)  # type: ignore[return-value]

    def resolve_defaults(self, model: Any) -> Self:
        if self.padding == "max_length" and self.max_length is None:
            raise PydanticCustomError("max_length", "padding: max_length needs data.max_length")
        if self.tokenizer is not None:
            return self
        if not isinstance(model, HuggingFaceModel):
            raise PydanticCustomError(
                "tokenizer",
                "data.tokenizer is missing: a folder or a name on the hub; only a huggingface "
                "model brings its own",
            )
        # Apart from what was asked for: another model.path brings another tokenizer.
        copy = self.model_copy()
        copy._of_model = (model.path, model.revision)
        return copy


ComparableModel = Annotated[int, Field(gt=0, le=16_384)]


class ImagesData(_Data):
    """Pictures in files: those below a folder, or those that a list names."""

    source: Literal["images"]
    path: InputPath = Field(description="a folder; or a .txt or .csv file that lists pictures")
    pattern: str | None = Field(
        None, description='which files of the folder: "*/*.jpg"; default: every picture below it'
    )
    column: str | None = Field(
        None, description="of a .csv list: that of the files; default: first"
    )
    labels: str | None = Field(
        None,
        description="folder: the name of the one a picture lies in; or a column of a .csv list",
    )
    classes: Classes = None
    input: str = Field("image", description="the input's name, where the model gets it by name")
    preprocess: Literal["none", "imagenet", "timm", "processor"] = Field(
        "none", description="steps by name, which the keys below change; none: only those"
    )
    architecture: str | None = Field(None, description="timm: whose steps; default: the model's")
    processor: InputPath | None = Field(
        None, description="a preprocessor_config.json, or its folder; default: the model's"
    )
    mode: Literal["RGB", "L"] | None = Field(None, description="colours (default), or grey")
    resize: ComparableModel | tuple[ComparableModel, ComparableModel] | None = Field(
        None, description="the shorter side in pixels, or [height, width]"
    )
    crop: ComparableModel | tuple[ComparableModel, ComparableModel] | None = Field(
        None, description="the middle of it that is kept"
    )
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] | None = None
    scale: float | None = Field(None, description="multiply pixels by this; default: 1/255")
    mean: tuple[float, ...] | None = Field(None, description="of each channel, which is taken off")
    std: tuple[float, ...] | None = Field(None, description="of each channel, divided by")

    _of_model: str | Path | None = PrivateAttr(None)

    @property
    def steps_of(self) -> str | Path | None:
        """Whose steps `preprocess` means: an architecture of timm, or a processor's place."""
        own = self.architecture if self.preprocess == "timm" else self.processor
        return own or self._of_model

    def resolve_defaults(self, model: Any) -> Self:
        if self.preprocess not in {"timm", "processor"} or self.steps_of:
            return self
        wanted, key = {"timm": ("timm", "architecture"), "processor": ("huggingface", "processor")}[
            self.preprocess
        ]
        if model.source != wanted:
            raise PydanticCustomError(
                "steps_of",
                "preprocess: {name} needs data.{key}; only a {wanted} model brings its own",
                {"name": self.preprocess, "key": key, "wanted": wanted},
            )
        # Apart from what was asked for: another model brings other steps.
        copy = self.model_copy()
        copy._of_model = model.name if wanted == "timm" else model.path
        return copy


DataConfig = Annotated[
    SyntheticData | ArraysData | RecordsData | TextData | ImagesData, Field(discriminator="source")
]


# --- run, measure, output ----------------------------------------------------------------------


class RunSection(Section):
    """How the model is run."""

    mode: GradMode = Field(GradMode.INFERENCE_MODE, description="the gradient mode of the run")
    device: str = Field(
        "auto", pattern=r"^(auto|cpu|cuda(:\d{1,3})?|mps)$", description="where the model runs"
    )
    threads: Literal["auto"] | Annotated[int, Field(gt=0, le=4096)] = Field(
        "auto", description="processor threads; auto: what affinity and cgroup quota allow"
    )
    seed: int = Field(0, ge=0, lt=2**63, description="of random weights, data and dropout")
    autocast: Literal["float16", "bfloat16"] | None = Field(
        None, description="run the forward under torch.autocast with this type"
    )
    warmup: Literal["auto"] | Annotated[int, Field(ge=0, le=100_000)] = Field(
        "auto", description="untimed batches before the run; auto: until the time is steady"
    )
    deterministic: bool = Field(False, description="use torch's deterministic algorithms")
    on_error: Literal["stop", "quarantine"] = Field(
        "stop", description="a sample that fails ends the run, or is set apart in quarantine.jsonl"
    )
    max_errors: Annotated[int, Field(ge=0)] | None = Field(
        None, description="end the run after more samples set apart than this; default: never"
    )
    on_nonfinite: Literal["warn", "quarantine", "stop"] = Field(
        "warn", description="what to do about a prediction that is NaN or infinite"
    )


class MeasureSection(Section):
    """What is measured, and how well."""

    memory: bool = Field(True, description="count tensor memory in one extra, untimed batch")
    processes: Annotated[int, Field(ge=2, le=1000)] = Field(
        5, description="compare: fresh processes, at least"
    )
    precision: Annotated[float, Field(gt=0, le=1)] = Field(
        0.01, description="compare: measure until intervals are this narrow (0.01: +-1 %)"
    )
    budget: Annotated[float, Field(gt=0, le=86_400)] = Field(
        60.0, description="compare: seconds to spend on that, about"
    )
    timeout: Annotated[float, Field(gt=0, le=86_400)] = Field(
        300.0, description="compare: seconds after which a process that says nothing is ended"
    )
    rtol: Annotated[float, Field(ge=0)] = Field(
        1.3e-6, description="compare: relative difference that outputs may have"
    )
    atol: Annotated[float, Field(ge=0)] = Field(
        1e-5, description="compare: absolute difference that outputs may have"
    )


def _selected(name: str) -> str:
    if name != PurePosixPath(name).name or name in {"", ".", ".."} or "\\" in name:
        raise PydanticCustomError(
            "output_name",
            "an output is selected by its name or position, which is no path: "
            "what gradrun writes stays below output.path",
        )
    return name


def _listed(names: object) -> object:
    """One name or position for a list of one; positions are names too ("0")."""
    if isinstance(names, list):
        return tuple(str(name) if type(name) is int else name for name in names)
    return (str(names),) if isinstance(names, str) or type(names) is int else names


def _word(transforms: tuple[str, ...]) -> str | list[str]:
    """One transform as the word that it was written as."""
    return transforms[0] if len(transforms) == 1 else list(transforms)


Transform = Literal[
    "none", "softmax", "argmax", "classify", "topk", "mean_pool", "cls", "normalize"
]
OutputName = Annotated[str, AfterValidator(_selected)]


class OutputSection(Section):
    """Which outputs are kept, how, and where."""

    path: OutputFolder = Field(description="the run's folder; must not exist yet")
    format: Literal["npy", "safetensors", "jsonl", "csv", "parquet"] = "npy"
    select: Annotated[
        tuple[OutputName, ...],
        BeforeValidator(_listed, json_schema_input_type=str | int | tuple[str | int, ...]),
    ] = Field((), description="names (or positions) of the outputs to keep; default: all")
    transform: Annotated[
        tuple[Transform, ...],
        BeforeValidator(_listed, json_schema_input_type=Transform | tuple[Transform, ...]),
        PlainSerializer(_word),
    ] = Field(("none",), description="one or several in order: [mean_pool, normalize]")
    dim: int = Field(-1, description="the dimension that holds the classes; default: the last")
    k: Size = Field(5, description="how many classes topk keeps")


# --- check -------------------------------------------------------------------------------------


def _bound(text: str) -> str:
    limits.number_bound(text)
    return text


def _byte_bound(text: str) -> str:
    limits.bytes_bound(text)
    return text


def _share(text: str) -> str:
    limits.percentage(text)
    return text


def _as_text(value: object) -> object:
    """A number in YAML, such as a count of bytes, is written as a limit too."""
    return str(value) if type(value) in {int, float} else value


_Text = Annotated[str, BeforeValidator(_as_text, json_schema_input_type=str | int | float)]
ByteBound = Annotated[_Text, AfterValidator(_byte_bound)]
Limit = Annotated[_Text, AfterValidator(_bound)]
Share = Annotated[_Text, AfterValidator(_share)]


class LimitsSection(Section):
    """What a model may take or must reach on any machine; memory is of one batch.

    Metrics are limited by their names: `accuracy: ">= 0.97"`.
    """

    model_config = ConfigDict(frozen=True, extra="allow", strict=True)
    __pydantic_extra__: dict[str, _Text]

    weights: ByteBound | None = Field(None, description="bytes of the weights, such as 60 MiB")
    forward_peak: ByteBound | None = Field(None, description="bytes of tensors in the forward")
    retained: ByteBound | None = Field(None, description="bytes that live on after the forward")
    process_peak: ByteBound | None = Field(None, description="the process's peak resident set")
    device_allocated: ByteBound | None = Field(None, description="peak allocated on the device")
    device_reserved: ByteBound | None = Field(None, description="peak reserved on the device")
    speedup_over_grad: Limit | None = Field(None, description="time in grad / time, as '>= 1.0'")
    speedup_over_no_grad: Limit | None = Field(None, description="the same over no_grad")
    speedup_over_inference_mode: Limit | None = Field(None, description="the same over this mode")

    def of_metrics(self) -> list[str]:
        """The metrics that are limited."""
        return list(self.model_extra or {})


class RegressionSection(Section):
    """How much worse than the baseline's a figure may be."""

    time: Share | None = Field("5%", description="of a batch; null leaves it out")
    forward_peak: Share | None = Field("1%", description="of tensor memory in the forward")
    retained: Share | None = Field(None, description="of tensor memory after the forward")
    process_peak: Share | None = Field(None, description="of the process's peak resident set")
    outputs: bool = Field(True, description="whether outputs must be the same, within tolerance")


class CheckSection(Section):
    """What `gradrun check` asks of a model."""

    mode: GradMode | None = Field(None, description="the mode to check; default: run.mode")
    smoke: bool = Field(True, description="it runs, finite, whole, without graph, modes agree")
    limits: LimitsSection = LimitsSection()
    regression: RegressionSection = RegressionSection()
    expected: ExpectedFile | None = Field(
        None, description="golden outputs (.safetensors), which --update-expected writes"
    )
    rtol: Annotated[float, Field(ge=0)] = Field(
        1e-4, description="relative difference from golden outputs and from a baseline's"
    )
    atol: Annotated[float, Field(ge=0)] = Field(1e-5, description="absolute difference, the same")


# --- metrics -----------------------------------------------------------------------------------

_ARGUMENTS = {
    "accuracy": {"top_k", "average", "threshold"},
    "f1": {"average", "threshold"},
    "auroc": {"average", "thresholds"},
    "mse": set[str](),
}


class MetricSection(Section):
    """How well predictions agree with data.labels, by one measure."""

    name: Literal["accuracy", "f1", "auroc", "mse"]
    called: Annotated[str, Field(pattern=r"^[A-Za-z_]\w{0,63}$")] | None = Field(
        None, description="its name in tables and in result.json; default: its name"
    )
    output: OutputName | None = Field(None, description="of which output, where several are kept")
    top_k: Size | None = Field(
        None, description="accuracy: right where it is among the k likeliest"
    )
    average: Literal["micro", "macro", "weighted"] | None = Field(
        None, description="over classes; default: micro for accuracy, else macro"
    )
    threshold: float | None = Field(
        None, description="of two classes by one score: above it is class 1; default: 0.5"
    )
    thresholds: Annotated[int, Field(ge=2, le=100_000)] | None = Field(
        None, description="auroc: so many steps, in little memory; default: exact, every score kept"
    )

    @property
    def title(self) -> str:
        """What tables and result.json call it."""
        return self.called or (f"{self.name}_top{self.top_k}" if self.top_k else self.name)

    @model_validator(mode="after")
    def _own_arguments(self) -> MetricSection:
        own = _ARGUMENTS[self.name]
        for argument in set[str]().union(*_ARGUMENTS.values()) - own:
            if getattr(self, argument) is not None:
                takes = ", ".join(sorted(own)) or "no arguments"
                raise PydanticCustomError(
                    "metric_argument",
                    "{name} has no {argument}; it takes {takes}",
                    {"name": self.name, "argument": argument, "takes": takes},
                )
        return self


def _named_metric(metric: object) -> object:
    """A name alone for a metric without arguments."""
    return {"name": metric} if isinstance(metric, str) else metric


Metrics = tuple[
    Annotated[
        MetricSection,
        BeforeValidator(_named_metric, json_schema_input_type=str | MetricSection),
    ],
    ...,
]


def _told_apart(metrics: Metrics) -> Metrics:
    titles = [metric.title for metric in metrics]
    if twice := [title for title in titles if titles.count(title) > 1]:
        raise PydanticCustomError(
            "metric_twice",
            "two metrics are called {title}; give one of them a name by `called`",
            {"title": twice[0]},
        )
    return metrics


class RunConfig(Section):
    """One run: a model, its data, how to run it, what to measure and where the output goes."""

    model: ModelConfig
    data: DataConfig
    run: RunSection = RunSection()
    measure: MeasureSection = MeasureSection()
    output: OutputSection
    metrics: Annotated[Metrics, AfterValidator(_told_apart)] = Field(
        (), description="accuracy, f1, auroc, mse: predictions against data.labels"
    )
    check: CheckSection = CheckSection()

    @field_validator("check")
    @classmethod
    def _limits_of_metrics(cls, check: CheckSection, info: ValidationInfo) -> CheckSection:
        known = {*_ARGUMENTS, *(metric.title for metric in info.data.get("metrics", ()))}
        for name, limit in (check.limits.model_extra or {}).items():
            if name not in known:
                allowed = [*LimitsSection.model_fields, *sorted(known)]
                context = {"name": name, "allowed": allowed}
                raise PydanticCustomError("unknown_limit", "unknown limit {name}", context)
            try:
                limits.number_bound(limit)
            except ValueError as error:
                context = {"name": name, "problem": str(error)}
                raise PydanticCustomError("limit", "{problem}", context) from error
        return check

    @field_validator("data")
    @classmethod
    def _beside_the_model(cls, data: Any, info: ValidationInfo) -> Any:
        return data.resolve_defaults(info.data["model"]) if "model" in info.data else data

    def input_files(self) -> list[Path]:
        """Every file that the run reads, and every folder."""
        found: list[Path] = []
        pending: list[Any] = [self.model.model_dump(exclude={"root"}), self.data.model_dump()]
        while pending:
            value = pending.pop()
            if isinstance(value, dict):
                pending += value.values()
            elif isinstance(value, Path):
                found.append(value)
        return found

    _origin: Any = PrivateAttr(None)
    """The yamlfile.Origin that knows where each key was written; None for a config made in code."""
