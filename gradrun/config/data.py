"""The `data` section."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    JsonValue,
    ValidationInfo,
    model_validator,
)

from gradrun.config.base import (
    DType,
    InputFiles,
    InputFolder,
    InputPath,
    Section,
    Shape,
    Size,
    Target,
)
from gradrun.config.columns import Columns
from gradrun.config.model import (
    HuggingFaceModel,
    ModelConfig,
    Pretrained,
    TimmModel,
    TorchvisionModel,
)
from gradrun.core.pretrained import has_processor
from gradrun.core.suggest import suggest

_TEXTS = 64
_CPU_TOKENS = 2048
"""Measured with MiniLM and 3,000 sentences: 1,024 to 2,048 tokens per batch are the fastest."""


class _DataSection(Section):
    location: ClassVar[str] = "data.path"
    """The key that names the data, for errors."""

    call: Literal["auto", "positional", "keyword", "dict", "list"] = Field(
        "auto",
        description="how inputs are passed; auto: one by position, several by keyword; dict: all "
        "in one dict; list: a list with one tensor per sample, as detectors expect, and images "
        "may differ in size",
    )

    def check_model(self, model: ModelConfig) -> None:
        """Raise ValueError if a key is missing that this model does not provide."""

    def with_defaults(self, model: ModelConfig | None, device: str) -> Self:
        """Set the keys whose defaults depend on the model or the type of the device."""
        return self

    def folders(self) -> Iterator[Path]:
        """Yield the folders below which all files of a format are data."""
        yield from ()

    def targets(self) -> dict[str, str]:
        """Return key -> target of the user's Python code, which needs trust."""
        return {}


class _Data(_DataSection):
    batch_size: Size = Field(64, description="samples per batch; the last batch may be shorter")


class _Input(Section):
    dtype: DType | None = Field(None, description="convert to this type; default: as stored")
    scale: float | None = Field(None, description="multiply by this after the conversion")
    permute: tuple[Annotated[int, Field(ge=0, lt=16)], ...] | None = Field(
        None,
        description="new order of a sample's axes, before `shape`; [2, 0, 1] moves channels first",
    )
    shape: Shape | None = Field(None, description="reshape one sample to this; default: as stored")


def _read_class_names(value: object, info: ValidationInfo) -> object:
    """Replace the name of a text file by its lines, and a map by its names."""
    if isinstance(value, dict):
        return _names_in_map(value)
    if not isinstance(value, str | Path):
        return tuple(value) if isinstance(value, list) else value
    path = info.context.input_file(Path(value)) if info.context else Path(value)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    names = tuple(line.strip() for line in lines)
    if "" in names:
        raise ValueError(
            f"line {names.index('') + 1} of {path} is empty; write one class name per line, in the "
            "order of the model's classes"
        )
    return names


def _names_in_map(value: dict[object, object]) -> tuple[object, ...]:
    """Return the names of a map {0: cat, 1: dog} or {cat: 0, dog: 1} by their numbers."""
    pairs = [*value.items()]
    if pairs and all(type(number) is int for number in value.values()):
        if all(str(key).isdecimal() for key in value):
            raise ValueError(
                "the map has numbers on both sides; write a list of names, such as ['3', '7'], in "
                "the order of the model's classes"
            )
        pairs = [(number, name) for name, number in pairs]
    numbered = {str(number): name for number, name in pairs}
    if {*numbered} != {*map(str, range(len(pairs)))}:
        raise ValueError("the numbers of the classes must be 0, 1, 2, ... without gaps, each once")
    return tuple(numbered[str(number)] for number in range(len(pairs)))


def _check_unique(names: tuple[str, ...] | None) -> tuple[str, ...] | None:
    if names and len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the class {twice!r} is listed twice")
    return names


Classes = Annotated[
    Annotated[tuple[str, ...], Field(min_length=2)] | None,
    BeforeValidator(_read_class_names, json_schema_input_type=str | tuple[str, ...] | None),
    AfterValidator(_check_unique),
    Field(
        description="class names in the order of the model's classes; a text file with one per "
        "line; or a map {0: cat, 1: dog} or {cat: 0, dog: 1}; default: the model's own",
    ),
]


_FILES = "a file, a folder, a glob pattern, or a list of them; in natural order: 2 before 10"


def _check_separator(separator: str) -> str:
    if separator in '"\r\n':
        raise ValueError(f"{separator!r} cannot separate columns, because it quotes or ends rows")
    return separator


def _folders(paths: Path | tuple[Path, ...] | None) -> Iterator[Path]:
    listed = (paths,) if isinstance(paths, Path) else paths or ()
    yield from (path for path in listed if path.is_dir())


class DatasetSection(Section):
    """A Hugging Face dataset; it is read as stored, by rows, in place of files."""

    example: ClassVar[str] = "{path: reviews, split: test}"

    path: Pretrained = Field(description="a folder written by save_to_disk, or a hub name")
    split: str | None = Field(None, description="such as test; not needed if there is only one")
    name: str | None = Field(None, description="the configuration of a dataset on the hub")
    revision: str | None = Field(None, description="the hub's branch, tag or commit")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if isinstance(self.path, str) and self.split is None:
            raise ValueError("split is missing: a dataset on the hub needs one, such as test")
        for key in ("name", "revision"):
            if isinstance(self.path, Path) and getattr(self, key):
                raise ValueError(f"{key} has no effect for a folder")
        return self


class _RowsData(_Data):
    """Data in files or in a dataset."""

    path: Any = None
    dataset: DatasetSection | None = Field(
        None, description="a Hugging Face dataset, in place of `path`"
    )

    @model_validator(mode="after")
    def _check_origin(self) -> Self:
        if self.path is None and self.dataset is None:
            raise ValueError("path is missing; set it to files, or set dataset")
        for key in ("path", *self._of_files):
            if self.dataset and getattr(self, key) is not None:
                raise ValueError(f"{key} and dataset cannot be combined")
        return self

    _of_files: ClassVar[tuple[str, ...]] = ()
    """Keys that apply to files only."""


class SyntheticInput(Section):
    """One random input."""

    example: ClassVar[str] = "{shape: [3, 8, 8]}"

    shape: Shape = Field(description="the shape of one sample, without the batch dimension")
    dtype: DType = "float32"
    distribution: Literal["normal", "uniform", "randint", "zeros", "ones"] = "normal"
    low: float = Field(0, description="lowest value of uniform and randint")
    high: float = Field(
        1, description="exclusive upper limit of uniform and randint, before rounding to dtype"
    )


class SyntheticData(_Data):
    """Seeded random inputs; sample i does not depend on the batch size."""

    location: ClassVar[str] = "data"

    source: Literal["synthetic"]
    inputs: dict[str, SyntheticInput] = Field(min_length=1)
    samples: Size


class ArrayLabels(Section):
    """An array with the true class or value of each sample."""

    example: ClassVar[str] = "{key: labels}"

    path: InputFiles | None = Field(None, description="separate files; default: data.path")
    key: str | None = Field(None, description="the array's name in an .npz or .safetensors file")


class ArrayInput(_Input, ArrayLabels):
    """One input from an array."""

    example: ClassVar[str] = "{key: images}"


class ArraysData(_Data):
    """Arrays whose first dimension counts the samples: .npy, .npz or .safetensors."""

    source: Literal["arrays"]
    path: InputFiles | None = Field(None, description=_FILES)
    inputs: dict[str, ArrayInput] = Field({}, description="default: the one array in data.path")
    labels: ArrayLabels | None = Field(None, description="true classes or values, for metrics")
    classes: Classes = None

    def folders(self) -> Iterator[Path]:
        for paths in (self.path, *(spec.path for spec in self.inputs.values())):
            yield from _folders(paths)


class RecordInput(_Input):
    """One input from one or several columns."""

    example: ClassVar[str] = "{columns: [a, b]}"

    columns: tuple[str, ...] = Field(
        min_length=1, description="numeric columns (or fields that contain lists), in order"
    )
    dtype: DType = "float32"
    pad: float | None = Field(
        None,
        description="for lists of different length: the value that fills them, at their end, to "
        "the longest of the batch; `shape` is then that of one item",
    )
    lengths: str | None = Field(
        None, description="name of a further input with the length of each list, for `pad`"
    )


class TableData(_RowsData):
    """Rows of files with columns, or of a dataset."""

    path: InputFiles | None = Field(None, description=_FILES)
    separator: (
        Annotated[str, Field(min_length=1, max_length=1), AfterValidator(_check_separator)] | None
    ) = Field(
        None,
        description="character between the columns of a csv; default: a comma, or tab for .tsv",
    )
    transform: Target | None = Field(
        None,
        description="prep.py:fn, a function of a row (a dict) that returns a row, applied before "
        "all other steps; needs --trust-code",
    )
    id: str | None = Field(None, description="column with sample ids, for the outputs")
    labels: str | None = Field(None, description="column with each row's true class or value")
    classes: Classes = None
    _of_files: ClassVar[tuple[str, ...]] = ("separator",)

    def folders(self) -> Iterator[Path]:
        return _folders(self.path)

    def targets(self) -> dict[str, str]:
        return {"transform": self.transform} if self.transform else {}

    def column_keys(self) -> Iterator[tuple[str, str]]:
        """Yield the config keys and the names of all columns that are read."""
        for key in ("id", "labels"):
            if (column := getattr(self, key)) is not None:
                yield f"data.{key}", column


class RecordsData(TableData):
    """Rows of a .csv, .jsonl or .parquet file with numeric columns."""

    source: Literal["records"]
    inputs: dict[str, RecordInput] = Field(min_length=1)
    columns: Columns = Field(
        {},
        description="column -> its fill, categories, mean and std; a .json or .npz file with them; "
        "or a list of both",
    )

    def column_keys(self) -> Iterator[tuple[str, str]]:
        for name, spec in self.inputs.items():
            yield from ((f"data.inputs.{name}.columns", column) for column in spec.columns)
        yield from super().column_keys()

    def check_model(self, model: ModelConfig) -> None:
        used = {column for spec in self.inputs.values() for column in spec.columns}
        if unused := sorted(self.columns.keys() - used):
            hint = suggest(unused[0], used)
            raise ValueError(f"{unused[0]!r} of data.columns is not a column of any input; {hint}")


class TextData(TableData):
    """Tokenized texts: the lines of a .txt file, or a field of .csv, .jsonl or .parquet."""

    source: Literal["text"]
    batch_size: Size | None = Field(  # type: ignore[assignment]  # see with_defaults
        None, description="most texts of a batch; default: 64, see batch_tokens"
    )
    field: str | tuple[str, str] | None = Field(
        None, description="column of the text, or [first, second] for pairs; not for .txt"
    )
    tokenizer: Pretrained | None = Field(
        None, description="a folder or a hub name; default: that of a huggingface model"
    )
    revision: str | None = Field(None, description="the tokenizer's branch, tag or commit")
    inputs: tuple[str, ...] = Field(
        (), description="tokenizer outputs to pass to the model; default: all"
    )
    max_length: Size | None = Field(
        None,
        description="truncate to this many tokens; default: the limit of the sentence-transformers "
        "folder or tokenizer, at most the model's positions",
    )
    prompt: str | None = Field(
        None,
        description="text put before every text; default: the default prompt of a "
        "sentence-transformers folder",
    )
    prompt_name: str | None = Field(
        None, description="a prompt of config_sentence_transformers.json, such as query"
    )
    chat: bool = Field(
        False,
        description="apply the tokenizer's chat template; the field has a text of the user, or a "
        "list of messages {role, content}",
    )
    padding: Literal["longest", "max_length"] = Field(
        "longest", description="pad to the longest text of the batch, or to max_length"
    )
    padding_side: Literal["left", "right"] | None = Field(
        None, description="default: left for AutoModelForCausalLM, otherwise the tokenizer's"
    )
    group_by_length: Literal["auto"] | bool = Field(
        "auto", description="batch texts of similar length; auto: if it saves 10 % of the tokens"
    )
    batch_tokens: Size | None = Field(
        None,
        description="most tokens of a batch, with padding: more short texts or fewer long ones, at "
        "most batch_size; texts are grouped by length; default: 2048 on a CPU without batch_size",
    )

    def with_defaults(self, model: ModelConfig | None, device: str) -> Self:
        """Limit batches by tokens on a CPU, whose caches do not hold a batch of many long texts.

        Generation is fastest with many texts, and a compiled model with batches of one size.
        """
        if self.batch_size is not None:
            return self
        fixed = self.group_by_length is False or self.padding == "max_length"
        fixed |= model is not None and model.compile is not None
        fixed |= isinstance(model, HuggingFaceModel) and model.generate is not None
        limit = None if fixed or device != "cpu" else _CPU_TOKENS
        return self.model_copy(
            update={"batch_size": _TEXTS, "batch_tokens": self.batch_tokens or limit}
        )

    @property
    def fields(self) -> tuple[str, ...]:
        """The columns of the text; () if none is set."""
        return (self.field,) if isinstance(self.field, str) else self.field or ()

    def column_keys(self) -> Iterator[tuple[str, str]]:
        yield from (("data.field", column) for column in self.fields)
        yield from super().column_keys()

    def check_model(self, model: ModelConfig) -> None:
        if self.batch_tokens is not None:
            self._check_batch_tokens(model)
        if isinstance(model, HuggingFaceModel) and model.generate is not None:
            self._check_generation(model)
        if self.padding == "max_length" and self.max_length is None:
            raise ValueError("padding: max_length needs data.max_length")
        if self.prompt is not None and self.prompt_name is not None:
            raise ValueError("set prompt or prompt_name, not both")
        if self.chat and (self.prompt or self.prompt_name or isinstance(self.field, tuple)):
            raise ValueError(
                "chat builds the prompt from the messages of one column; remove prompt, "
                "prompt_name or the second column"
            )
        if self.tokenizer is None and not isinstance(model, HuggingFaceModel):
            raise ValueError(
                "data.tokenizer is missing: set a folder or a hub name; only huggingface "
                "models include a tokenizer"
            )

    def _check_generation(self, model: HuggingFaceModel) -> None:
        if model.auto_class == "AutoModelForCausalLM" and self.padding_side == "right":
            raise ValueError(
                "model.generate continues the last token of a prompt, which padding on the "
                "right would separate from the text; remove data.padding_side"
            )
        if isinstance(self.field, tuple):
            raise ValueError("a prompt is one text: set data.field to one column")

    def _check_batch_tokens(self, model: ModelConfig) -> None:
        problems = {
            "group_by_length: false; batch_tokens groups texts by length": (
                self.group_by_length is False
            ),
            "padding: max_length, which gives all texts the same length; set batch_size": (
                self.padding == "max_length"
            ),
            "model.compile.dynamic: false, because batches differ in size": (
                model.compile is not None and model.compile.dynamic is False
            ),
        }
        for problem, found in problems.items():
            if found:
                raise ValueError(f"batch_tokens cannot be combined with {problem}")

    def tokenizer_source(self, model: ModelConfig | None) -> tuple[Path | str, str | None]:
        """Return the tokenizer's folder or hub name, and its revision.

        Raises:
            ValueError: no tokenizer is set and the model includes none.
        """
        if self.tokenizer is not None:
            return self.tokenizer, self.revision
        if isinstance(model, HuggingFaceModel):
            return model.path, model.revision
        raise ValueError("data.tokenizer is missing")


Pixels = Annotated[int, Field(gt=0, le=16_384)]

Preset = Literal["none", "imagenet", "timm", "torchvision", "processor"]
_PRESET_SOURCES: dict[str, tuple[str, type, str]] = {
    "timm": ("architecture", TimmModel, "name"),
    "torchvision": ("architecture", TorchvisionModel, "name"),
    "processor": ("processor", HuggingFaceModel, "path"),
}
"""Preset -> the key that names its source; the model section that implies one, and its key."""


def _check_level(level: int) -> int:
    if level == 0:
        raise ValueError("folders are counted from 1, or from -1 for the one that has the image")
    return level


class FolderLabels(Section):
    """The label of an image is the name of one of the folders in its path."""

    folder: Annotated[int, AfterValidator(_check_level)] = Field(
        description="which folder: 1 is the first below data.path, -1 the one that has the image"
    )


class FilesData(_RowsData):
    """Files below a folder, or those in a list, each one sample."""

    path: InputFiles | None = Field(
        None,
        description="a folder; a glob pattern, or a list of files, folders and patterns; a .txt, "
        ".csv or .tsv file that lists files; or .tar files",
    )
    pattern: str | None = Field(
        None, description='files of the folder: "*/*.jpg"; default: every readable file below it'
    )
    column: str | None = Field(
        None,
        description="column of a .csv or .tsv list with the paths (default: first), or of a "
        "dataset with the content (default: the only one)",
    )
    id: str | None = Field(
        None, description="column of a dataset with sample ids; default: row numbers"
    )
    decode_threads: Literal["auto"] | Annotated[int, Field(gt=0, le=4096)] = Field(
        "auto", description="threads that decode files ahead of the model; auto: one per CPU"
    )
    _of_files: ClassVar[tuple[str, ...]] = ("pattern",)

    labels: str | FolderLabels | None = Field(
        None,
        description="folder: the name of the first folder below data.path; {folder: N}: of another "
        "one; a column of a .csv list or dataset; or .cls: the text of the member with this suffix "
        "beside each file of a .tar",
    )
    classes: Classes = None


class ImagesData(FilesData):
    """Image files: those below a folder, or those in a list."""

    source: Literal["images"]
    input: str = Field("image", description="the input's name, if passed by keyword")
    page: Literal["all"] | Size = Field(
        1, description="which page of a TIFF, or frame of a GIF, PNG or WEBP; all: each is a sample"
    )
    exif: bool = Field(True, description="turn images upright by their EXIF orientation")
    background: str = Field(
        "white",
        description="color behind transparent pixels, as a name or #rrggbb; stored: the hidden "
        "color that the file has there",
    )
    value_range: tuple[float, float] | None = Field(
        None,
        description="values of black and white in images with more than 8 bits per channel; "
        "default: 0 and 65535 for 16 bits, an error for 32 bits",
    )
    max_pixels: Size = Field(
        200_000_000, description="reject larger images, which could exhaust the memory"
    )
    preprocess: Preset | None = Field(
        None,
        description="preset steps, which the keys below change; default: those of a timm, "
        "torchvision or huggingface model, none for other models",
    )
    architecture: str | None = Field(
        None,
        description="the timm or torchvision model of the preset, or torchvision weights such as "
        "ResNet50_Weights.IMAGENET1K_V1; default: the model's",
    )
    processor: InputPath | None = Field(
        None, description="a preprocessor_config.json, or its folder; default: the model's"
    )
    mode: Literal["RGB", "L"] | None = Field(None, description="RGB (default), or L: grayscale")
    resize: Pixels | tuple[Pixels, Pixels] | None = Field(
        None, description="the shorter side in pixels, or [height, width]"
    )
    crop: Pixels | tuple[Pixels, Pixels] | None = Field(
        None, description="size of the center crop in pixels"
    )
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] | None = None
    scale: float | None = Field(None, description="multiply pixels by this; default: 1/255")
    mean: tuple[float, ...] | None = Field(None, description="mean per channel, subtracted")
    std: tuple[float, ...] | None = Field(None, description="standard deviation per channel")

    def check_model(self, model: ModelConfig) -> None:
        self.preprocess_source(model)

    def preset(self, model: ModelConfig | None) -> Preset:
        """Return the preset, by default that of the model."""
        if self.preprocess is not None:
            return self.preprocess
        match model:
            case TimmModel():
                return "timm"
            case TorchvisionModel():
                return "torchvision"
            case HuggingFaceModel() if has_processor(model.path):
                return "processor"
        return "none"

    def preprocess_source(self, model: ModelConfig | None) -> str | Path | None:
        """Return the architecture or the processor's folder that the preset is read from.

        Raises:
            ValueError: neither the section nor the model provides one, or a key has no effect.
        """
        preset = self.preset(model)
        used, section, attribute = _PRESET_SOURCES.get(preset, ("", object, ""))
        for key in {"architecture", "processor"} - {used}:
            if getattr(self, key) is not None:
                presets = " or ".join(name for name, by in _PRESET_SOURCES.items() if key in by)
                raise ValueError(
                    f"data.{key} is not used by preprocess: {preset}; set preprocess: {presets}"
                )
        if not used:
            return None
        found = getattr(self, used) or (isinstance(model, section) and getattr(model, attribute))
        if not found:
            raise ValueError(f"preprocess: {preset} needs data.{used}, or a model that implies it")
        return found  # type: ignore[no-any-return]


class AudioData(FilesData):
    """Audio files: those below a folder, or those in a list."""

    source: Literal["audio"]
    input: str = Field("audio", description="the input's name, if passed by keyword")
    preprocess: Literal["none", "processor"] | None = Field(
        None,
        description="processor: the feature extractor of a huggingface model, which is the default "
        "if it has one; none: samples from -1 to 1",
    )
    processor: InputPath | None = Field(
        None, description="the folder of a feature extractor; default: the model's"
    )
    sample_rate: Annotated[int, Field(gt=0, le=1_000_000)] | None = Field(
        None,
        description="samples per second; other files are resampled; default: the processor's, or "
        "that of the files, which must have the same one",
    )
    channels: Literal["mean", "first", "all"] = Field(
        "mean", description="mean: one channel, the mean of all; first: only that; all: each"
    )
    channel_axis: bool = Field(
        False, description="[n, 1, samples] instead of [n, samples]; always with channels: all"
    )
    seconds: Annotated[float, Field(gt=0, le=86_400)] | None = Field(
        None, description="cut or pad every file to this length; default: padded to the longest"
    )
    lengths: str | None = Field(
        None, description="name of an input with the number of samples of each file"
    )

    def check_model(self, model: ModelConfig) -> None:
        self.processor_source(model)

    def processor_source(self, model: ModelConfig | None) -> str | Path | None:
        """Return the folder or the hub name of the feature extractor, if one is used.

        Raises:
            ValueError: neither the section nor the model has one, or a key has no effect.
        """
        found: str | Path | None = self.processor
        if found is None and isinstance(model, HuggingFaceModel) and has_processor(model.path):
            found = model.path
        uses = self.preprocess == "processor" or (self.preprocess is None and found is not None)
        if uses and found is None:
            raise ValueError("preprocess: processor needs data.processor, or a huggingface model")
        if self.processor and not uses:
            raise ValueError("data.processor is not used by preprocess: none")
        for key in ("channel_axis", "lengths"):
            if uses and getattr(self, key):
                raise ValueError(f"data.{key} is not used by preprocess: processor")
        if uses and self.channels == "all":
            raise ValueError("a processor takes one channel; set data.channels: mean or first")
        return found if uses else None


ItemKey = int | str
"""A position in a tuple or list, or a key of a dict."""


class PythonData(_DataSection):
    """A Dataset, DataLoader, iterable or sequence of your own code; needs --trust-code."""

    location: ClassVar[str] = "data.target"

    source: Literal["python"]
    target: Target = Field(
        description="data.py:make_dataset or package.module:name: a Dataset, DataLoader, iterable, "
        "array or list, or a function or class that returns one"
    )
    root: InputFolder | None = Field(
        None, description="folder to import from; default: the file's folder, or the current one"
    )
    args: dict[str, JsonValue] = Field({}, description="keyword arguments of the target")
    collate: Target | None = Field(
        None,
        description="data.py:fn: a list of items to a batch; default: that of a DataLoader, "
        "otherwise torch's default_collate",
    )
    batch_size: Size | None = Field(
        None,
        description="samples per batch; the last batch may be shorter; default: that of a "
        "DataLoader, otherwise 64",
    )
    workers: Annotated[int, Field(ge=0, le=1024)] | None = Field(
        None,
        description="processes that read items and collate them; 0: this one; default: that of a "
        "DataLoader, otherwise 0",
    )
    inputs: tuple[ItemKey, ...] | dict[str, ItemKey] | None = Field(
        None,
        description="positions or keys in an item: [0], or {series: x, lengths: n} with the "
        "names for the model; default: all but labels and id",
    )
    labels: ItemKey | None = Field(
        None, description="position or key of the true class or value, for metrics"
    )
    classes: Classes = None
    id: ItemKey | None = Field(None, description="position or key of the sample's id")

    def targets(self) -> dict[str, str]:
        return {"target": self.target} | ({"collate": self.collate} if self.collate else {})


DataConfig = Annotated[
    SyntheticData | ArraysData | RecordsData | TextData | ImagesData | AudioData | PythonData,
    Field(discriminator="source"),
]
