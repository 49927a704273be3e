"""Files of transformers and sentence-transformers that models and texts both need."""

from __future__ import annotations

import importlib
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec

from gradrun.core.errors import ConfigError
from gradrun.core.optional import hub_errors, import_optional, import_transformers
from gradrun.core.suggest import suggest

_SENTENCE_CONFIGS = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
"""Files in which transformers saves an image processor or a feature extractor."""


class SentenceModule(msgspec.Struct, frozen=True):
    """A line of modules.json, with the settings in its folder."""

    kind: str
    """Class name: Pooling, Dense, Normalize, ..."""
    path: str
    settings: dict[str, Any]


class SentenceFolder(msgspec.Struct, frozen=True):
    """The settings of a sentence-transformers folder."""

    subfolder: str
    """Folder of the transformer and its tokenizer; "" for the folder itself."""
    max_length: int | None
    """Limit of a text in tokens; None for the tokenizer's."""
    limit_file: str
    lower_case: bool
    embeds: bool
    """Whether the modules turn tokens into one vector per text, as a CrossEncoder does not."""
    prompts: dict[str, str]
    default_prompt: str
    """The name of the prompt of every text, or ""."""
    modules: tuple[SentenceModule, ...]
    """The modules after the transformer, in order."""


class _ModuleLine(msgspec.Struct):
    type: str
    path: str = ""


class _TransformerFile(msgspec.Struct):
    max_seq_length: int | None = None
    do_lower_case: bool = False
    transformer_task: str = "feature-extraction"


class _FolderFile(msgspec.Struct):
    prompts: dict[str, str | None] | None = None
    default_prompt_name: str | None = None


def read_sentence_folder(
    source: Path | str, revision: str | None, key: str
) -> SentenceFolder | None:
    """Read modules.json and the files it names; None if the folder has no modules.json.

    Raises:
        ConfigError: a file is damaged, or a path leaves the folder.
    """

    def read(name: str, kind: type[Any]) -> Any:
        path = pretrained_file(source, name, revision)
        try:
            return msgspec.json.decode(path.read_bytes(), type=kind) if path else None
        except (OSError, msgspec.DecodeError) as error:
            raise ConfigError(f"{path} cannot be read: {error}", key) from error

    lines = read("modules.json", list[_ModuleLine])
    if not lines:
        return None
    for line in lines:
        if line.path.startswith("/") or ".." in PurePosixPath(line.path).parts:
            raise ConfigError(f"modules.json of {source} has the path {line.path!r}", key)
    first, *others = lines
    names = [f"{first.path}/{name}".lstrip("/") for name in _SENTENCE_CONFIGS]
    found = next((name for name in names if pretrained_file(source, name, revision)), "")
    transformer = (found and read(found, _TransformerFile)) or _TransformerFile()
    folder = read("config_sentence_transformers.json", _FolderFile) or _FolderFile()
    return SentenceFolder(
        subfolder=first.path,
        max_length=transformer.max_seq_length,
        limit_file=PurePosixPath(found).name,
        lower_case=transformer.do_lower_case,
        embeds=transformer.transformer_task == "feature-extraction",
        prompts={name: text or "" for name, text in (folder.prompts or {}).items()},
        default_prompt=folder.default_prompt_name or "",
        modules=tuple(
            SentenceModule(
                line.type.rpartition(".")[2],
                line.path,
                read(f"{line.path}/config.json".lstrip("/"), dict[str, Any]) or {},
            )
            for line in others
        ),
    )


def pretrained_file(source: Path | str, name: str, revision: str | None) -> Path | None:
    """Return the path of a file of a folder or hub repository; None if it does not exist."""
    if isinstance(source, Path):
        return path if (path := source / name).is_file() else None
    import_transformers("model.path")
    cached = import_optional("transformers", "model.path", "utils").cached_file(
        source,
        name,
        revision=revision or "main",
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return Path(cached) if cached else None


def choose_prompt(folder: SentenceFolder | None, prompt: str | None, name: str | None) -> str:
    """Return the text to put before every text: `prompt`, the one called `name`, or the default.

    Raises:
        ConfigError: the folder has no prompt of this name.
    """
    if prompt is not None:
        return prompt
    name = name or (folder.default_prompt if folder else "")
    prompts = folder.prompts if folder else {}
    if name and name not in prompts:
        known = suggest(name, prompts) if prompts else "the tokenizer's folder has no prompts"
        raise ConfigError(f"unknown prompt {name!r}; {known}", "data.prompt_name")
    return prompts.get(name, "")


def has_processor(source: Path | str) -> bool:
    """Return whether a folder has a processor, as any name on the hub may have."""
    return isinstance(source, str) or any((source / name).is_file() for name in _PROCESSOR_FILES)


def processor_folder(source: Path | str, key: str) -> Path | str:
    """Return a folder or hub name as given, and for a processor's file its folder.

    Raises:
        ConfigError: transformers does not read a file of this name; for the config key `key`.
    """
    if isinstance(source, str) or not source.is_file():
        return source
    if source.name not in _PROCESSOR_FILES:
        names = " or ".join(_PROCESSOR_FILES)
        raise ConfigError(f"transformers reads a folder with {names}, not {source.name}", key)
    return source.parent


def load_tokenizer(
    source: Path | str, revision: str | None, folder: SentenceFolder | None = None
) -> Any:
    """Load a tokenizer, with the end token for padding if it has no pad token.

    Raises:
        ConfigError: the folder has no tokenizer, or one without a vocabulary or a pad token.
    """
    key = "data.tokenizer"
    auto = import_transformers(key).AutoTokenizer
    with hub_errors(source, key, "which tokenizers never run; choose another one"):
        tokenizer = auto.from_pretrained(
            source,
            revision=revision or "main",
            subfolder=folder.subfolder if folder else "",
            trust_remote_code=False,
        )
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        # For a folder without a tokenizer, transformers builds one to which every word is unknown.
        raise ConfigError(
            f"{source} contains no vocabulary; set data.tokenizer to a folder or hub name with one",
            key,
        )
    if tokenizer.pad_token is None:
        # GPT-2 and similar models have none. Padding is masked, so any token will do.
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ConfigError(
            f"the tokenizer {source} has no token for padding; save it with a pad_token", key
        )
    if folder and folder.lower_case:
        _lower_case(tokenizer)
    return tokenizer


def _lower_case(tokenizer: Any) -> None:
    """Let a tokenizer convert texts to lower case first, as do_lower_case asks."""
    if not tokenizer.is_fast:
        tokenizer.do_lower_case = True
        return
    normalizers = importlib.import_module("tokenizers.normalizers")  # transformers requires it
    backend = tokenizer.backend_tokenizer
    steps = [normalizers.Lowercase(), *([backend.normalizer] if backend.normalizer else [])]
    backend.normalizer = normalizers.Sequence(steps)
