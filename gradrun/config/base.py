"""The base class of all sections, and the field types that several sections share."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
)

from gradrun.core.errors import ConfigError
from gradrun.core.input_files import is_pattern
from gradrun.core.remote import as_path, check_writable, is_remote, local_copy


class Section(BaseModel):
    """A part of the config: immutable, strictly typed, without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    example: ClassVar[str] = ""
    """A short section in YAML, for error messages."""


class PathResolver:
    """Resolve a config's relative paths and check that inputs exist.

    An instance is the context of the validation; without one, paths stay as written.

    Args:
        base: the folder where input paths start.
        output_base: the folder where `output.path` starts.
    """

    def __init__(self, base: Path, output_base: Path) -> None:
        self._base, self._output_base = base, output_base

    def input_file(self, path: Path) -> Path:
        """Return the absolute path of an existing file; raise ValueError otherwise.

        A remote file is downloaded to the cache.
        """
        resolved = self._local(path)
        if not resolved.exists():
            raise ValueError(f"file {resolved} does not exist")
        if not resolved.is_file():
            kind = "a folder" if resolved.is_dir() else "not a regular file"
            raise ValueError(f"{resolved} is {kind}")
        return resolved

    def input_folder(self, path: Path) -> Path:
        """Return the absolute path of an existing folder; raise ValueError otherwise.

        A remote folder is downloaded to the cache.
        """
        resolved = self._local(path)
        if not resolved.is_dir():
            problem = "is a file, not a folder" if resolved.exists() else "does not exist"
            raise ValueError(f"{resolved} {problem}")
        return resolved

    def input_path(self, path: Path) -> Path:
        """Return the absolute path of an existing file or folder; raise ValueError otherwise."""
        resolved = self._local(path)
        return resolved if resolved.is_dir() else self.input_file(resolved)

    def input_files(self, paths: Path | tuple[Path, ...]) -> Path | tuple[Path, ...]:
        """Return the absolute paths of existing files, folders and glob patterns.

        Raises:
            ValueError: one of them names no file.
        """
        if isinstance(paths, tuple):
            return tuple(map(self._input_files, paths))
        return self._input_files(paths)

    def _input_files(self, path: Path) -> Path:
        if path == Path("-"):  # standard input
            return path
        if is_remote(path := as_path(path)):
            with _remote_errors(path):
                if is_pattern(path) or path.exists():
                    return path
            raise ValueError(f"{path} does not exist")
        resolved = _join(self._base, path)
        return resolved if is_pattern(resolved) else self.input_path(path)

    def _local(self, path: Path) -> Path:
        """Return the absolute path of a file or folder; a remote one is downloaded."""
        if is_remote(path := as_path(path)):
            with _remote_errors(path):
                path = local_copy(path)
        return _join(self._base, path)

    def output_path(self, path: Path) -> Path:
        """Return the absolute path of an output; raise ValueError if it contains `..`."""
        if ".." in path.parts:
            raise ValueError(
                f"{str(path)!r} contains '..'; use a path below the config's folder or an absolute "
                "path"
            )
        if is_remote(path := as_path(path)):
            check_writable(path)
            return path
        return _join(self._output_base, path)


def resolve_target(target: str, info: ValidationInfo) -> str:
    """Return "file.py:name" with the absolute path, or "package.module:name".

    Raises:
        ValueError: the target has another form, or the file does not exist.
    """
    module, colon, name = target.rpartition(":")
    if not colon or not module or not name.isidentifier():
        raise ValueError(
            "a target is file.py:Name or package.module:name, such as nets/mine.py:Net"
        )
    if module.endswith(".py") and info.context:
        return f"{info.context.input_file(Path(module))}:{name}"
    return target


Target = Annotated[str, AfterValidator(resolve_target)]
"""Python code: file.py:name or package.module:name."""


@contextmanager
def _remote_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ConfigError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{path} cannot be read: {reason}") from error


def _join(base: Path, path: Path) -> Path:
    """Join and expand `~`; raise ValueError if the system cannot have a file of this name."""
    try:
        joined = base / path.expanduser()
        joined.lstat()
    except FileNotFoundError:
        return joined
    except (OSError, RuntimeError, ValueError) as error:
        if isinstance(error, OSError) and error.errno != errno.ENAMETOOLONG:
            return joined
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{str(path)!r:.60} is not a valid path: {reason}") from error
    return joined


def resolved_by(resolve: Callable[[PathResolver, Any], Any]) -> AfterValidator:
    """Return a validator that applies a PathResolver method if the validation has a resolver."""

    def validate(path: Any, info: ValidationInfo) -> Any:
        path = tuple(map(as_path, path)) if isinstance(path, tuple) else as_path(path)
        return resolve(info.context, path) if info.context else path

    return AfterValidator(validate)


InputFile = Annotated[Path, resolved_by(PathResolver.input_file)]
InputFiles = Annotated[
    Annotated[Path, Tag("file")] | Annotated[tuple[Path, ...], Field(min_length=1), Tag("files")],
    # One branch, so that an error is about that branch alone.
    Discriminator(lambda value: "files" if isinstance(value, list | tuple) else "file"),
    resolved_by(PathResolver.input_files),
]
InputFolder = Annotated[Path, resolved_by(PathResolver.input_folder)]
InputPath = Annotated[Path, resolved_by(PathResolver.input_path)]
OutputPath = Annotated[Path, resolved_by(PathResolver.output_path)]
Size = Annotated[int, Field(gt=0, le=2**40)]
Shape = Annotated[tuple[Size, ...], Field(max_length=16)]
FloatType = Literal["float32", "float64", "float16", "bfloat16"]
DType = Literal[FloatType, "int8", "int16", "int32", "int64", "uint8", "bool"]
