"""Hugging Face datasets: rows of a `save_to_disk` folder, or of a dataset on the hub."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gradrun.config.data import DatasetSection
from gradrun.core.errors import ConfigError, first_line
from gradrun.core.optional import import_optional
from gradrun.core.suggest import suggest

_KEY = "data.dataset"
_ROWS = 1024
_HUB_SECONDS = 10


class HFDataset:
    """The rows of one split, as Arrow stores them: images as bytes, classes as numbers."""

    def __init__(self, section: DatasetSection) -> None:
        """Load the split that a section names; rows stay on disk.

        Raises:
            ConfigError: the library is missing, or the dataset or the split does not exist.
        """
        self.section = section
        library = import_optional("datasets", _KEY)
        with _quiet(library):
            loaded = _load(section, library)
        self.split = section.split or ""
        if isinstance(loaded, dict):
            self.split = _choose_split(section, [*loaded])
            loaded = loaded[self.split]
        elif isinstance(section.path, Path) and self.split not in {"", str(loaded.split)}:
            raise ConfigError(
                f"{section.path} is one dataset without splits; remove the key", f"{_KEY}.split"
            )
        self._rows = loaded.with_format("arrow")
        self._features: Mapping[str, Any] = loaded.features
        self.columns: tuple[str, ...] = tuple(loaded.features)
        self._media = (library.Image, library.Audio)
        self._class_label = library.ClassLabel
        self.files = tuple(Path(file["filename"]) for file in loaded.cache_files)
        """The Arrow files on this machine."""

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def name(self) -> str:
        """The folder or hub name with the split, for messages."""
        name = getattr(self.section.path, "name", self.section.path)
        return f"{name}/{self.split}" if self.split else str(name)

    def class_names(self, column: str | None) -> tuple[str, ...]:
        """Return the names of the classes of a ClassLabel column, also of lists of them."""
        feature = self._features.get(column) if column else None
        feature = getattr(feature, "feature", feature)
        return tuple(feature.names or ()) if isinstance(feature, self._class_label) else ()

    def has_media(self, column: str) -> bool:
        """Return whether a column contains images or audio."""
        return isinstance(self._features[column], self._media)

    def check_columns(self, columns: Iterable[tuple[str, str]]) -> None:
        """Check that columns exist, given as pairs of config key and column.

        Raises:
            ConfigError: one of them does not.
        """
        for key, column in columns:
            if column not in self._features:
                hint = suggest(column, self.columns)
                raise ConfigError(f"{self.name} has no column {column!r}; {hint}", key)

    def rows(self, columns: Sequence[str], start: int = 0) -> Iterator[dict[str, Any]]:
        """Yield the rows from `start` on, with some columns."""
        selected = self._rows.select_columns([*columns])
        for first in range(start, len(self), _ROWS):
            yield from selected[first : min(first + _ROWS, len(self))].to_pylist()

    def value(self, column: str, row: int) -> Any:
        """Return one value."""
        return self._rows[row : row + 1].column(column)[0].as_py()

    def names_of_classes(self, column: str, value: Any) -> Any:
        """Return the names for the numbers of a ClassLabel column; None for missing ones."""
        names = self.class_names(column)
        if not names:
            return value
        if isinstance(value, list):
            return [self.names_of_classes(column, item) for item in value]
        known = isinstance(value, int) and 0 <= value < len(names)
        return names[value] if known else None


def _load(section: DatasetSection, library: Any) -> Any:
    """Return the dataset, or the splits of a folder as a dict."""
    path = section.path
    if isinstance(path, Path):
        try:
            return library.load_from_disk(str(path))
        except Exception as error:  # a damaged folder may raise anything
            raise ConfigError(
                f"{path} is not a folder of save_to_disk: {first_line(error)}", f"{_KEY}.path"
            ) from error
    try:
        _check_hub(path, section.revision)
        return library.load_dataset(
            path, section.name, split=section.split, revision=section.revision
        )
    except Exception as error:  # the hub, the network and the builders have their own errors
        raise ConfigError(
            f"{path!r} is neither a folder relative to the config nor a dataset that the hub or "
            f"its cache has: {first_line(error):.300}",
            f"{_KEY}.path",
        ) from error


def _check_hub(name: str, revision: str | None) -> None:
    """Ask the hub for a dataset once, because the library repeats requests for half a minute."""
    hub: Any = importlib.import_module("huggingface_hub")  # datasets requires it
    if not hub.constants.HF_HUB_OFFLINE:
        try:
            hub.HfApi().dataset_info(name, revision=revision, timeout=_HUB_SECONDS)
        except OSError:
            raise
        except Exception as error:
            raise OSError(
                f"the hub cannot be reached ({first_line(error)}); HF_HUB_OFFLINE=1 uses the cache"
            ) from error


def _choose_split(section: DatasetSection, splits: Sequence[str]) -> str:
    """Return the split of a folder with several ones, or the only one."""
    if section.split in splits or (len(splits) == 1 and section.split is None):
        return section.split or splits[0]
    wrong = f"no split {section.split!r}" if section.split else "several splits; choose one"
    raise ConfigError(
        f"{section.path} has {wrong}; {suggest(section.split or '', splits)}", f"{_KEY}.split"
    )


@contextmanager
def _quiet(library: Any) -> Iterator[None]:
    """Turn off the library's progress bars."""
    shown = not library.are_progress_bars_disabled()
    library.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            library.enable_progress_bars()
