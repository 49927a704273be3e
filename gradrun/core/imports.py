"""Import the user's Python code: files, packages, and two revisions of them in one process."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import sysconfig
import traceback
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from gradrun.core.errors import ConfigError
from gradrun.core.options import option
from gradrun.core.suggest import suggest


def target_root(target: str, root: Path | None) -> Path:
    """Return the absolute path of the folder that a target is imported from.

    Args:
        root: the folder in the config, if any; default: the file's, or the current one.
    """
    location = target.rpartition(":")[0]
    is_file = location.endswith(".py")
    return (root or (Path(location).parent if is_file else Path.cwd())).resolve()


def import_target(
    target: str, root: Path | None, key: str, *, beside: Collection[Path] = ()
) -> Any:
    """Import the object that a target names; the caller has checked the trust in it.

    Args:
        beside: root folders of other code in use, which is neither forgotten nor read again.

    Raises:
        ConfigError: the import fails, or there is no such name.
    """
    location, _, name = target.rpartition(":")
    is_file, folder = location.endswith(".py"), target_root(target, root)
    reload = is_file and folder not in beside
    with imports_from(folder, reload=reload, first=root is not None, beside=beside):
        module = _import_module(location, key, again=reload)
    if not hasattr(module, name):
        public = [known for known in vars(module) if not known.startswith("_")]
        raise ConfigError(f"{location} has no {name!r}; {suggest(name, public)}", key)
    return getattr(module, name)


def _import_module(location: str, key: str, *, again: bool) -> ModuleType:
    """Import a file or a module; a file also if it was imported before, if `again` is set."""
    try:
        if not location.endswith(".py"):
            return importlib.import_module(location)
        path = Path(location)
        return (None if again else _imported_file(path)) or import_file(path)
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        raise ConfigError(
            f"importing {location} failed: {describe_user_error(error)}", key
        ) from error


def _imported_file(path: Path) -> ModuleType | None:
    """Return the module of a file, unless the file has changed since its import."""
    module = sys.modules.get(f"{_FILE_PREFIX}{path.stem}")
    if module is None or _location(module) != path:
        return None
    return module if _times.get(module.__name__) == path.stat().st_mtime_ns else None


def require_trust(trust_code: bool, source: str, key: str) -> None:
    """Raise a ConfigError about `key` unless the user allows the config to run code.

    Args:
        source: subject and verb of the message, for example "net.py:Net is Python code".
    """
    if not trust_code:
        raise ConfigError(
            f"{source} and was not loaded, because it could run anything with your rights; if you "
            f"trust it, pass {option('trust_code')} or set GRADRUN_TRUST_CODE=1",
            key,
        )


def import_file(path: Path) -> ModuleType:
    """Import a .py file, again if it was imported before; errors of its code are not changed."""
    name = f"{_FILE_PREFIX}{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    # Dataclasses, pickles and torch.compile look up a class's module by its name.
    sys.modules[name] = module
    try:
        _times[name] = path.stat().st_mtime_ns
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


_FILE_PREFIX = "gradrun_file_"
"""Of the module names of imported files."""

_times: dict[str, int] = {}
"""Module name of an imported file -> the modification time of the file."""

_OTHERS = {"gradrun", "__main__", "__mp_main__"}
"""Packages and modules that are not part of a user's model."""

_imported: dict[Path, set[str]] = {}
"""Root folder -> names of the user's modules that were imported from it."""

_added: set[Path] = set()
"""Root folders that this module added to sys.path."""


@contextmanager
def imports_from(
    root: Path, *, reload: bool, first: bool, beside: Collection[Path] = ()
) -> Iterator[None]:
    """Add a folder to sys.path and forget modules that were imported from other roots.

    Two revisions of one model can be loaded in one process; neither may get the helper modules of
    the other. Modules that are in use stay alive in their users.

    Args:
        reload: also forget modules from `root`, so that they are read again.
        first: put the folder before installed packages instead of after them.
        beside: other roots whose modules stay.
    """
    for other, names in _imported.items():
        if other != root and other in beside:
            continue
        if other != root and other in _added:
            sys.path[:] = [entry for entry in sys.path if entry != str(other)]
        if other != root or reload:
            for name in names:
                sys.modules.pop(name, None)
            names.clear()
    if str(root) not in sys.path:
        sys.path.insert(0 if first else len(sys.path), str(root))
        _added.add(root)
    importlib.invalidate_caches()
    before = set(sys.modules)
    imported = _imported.setdefault(root, set())
    try:
        yield
    finally:
        imported |= {
            name for name in sys.modules.keys() - before if _is_user_module(sys.modules[name])
        }


def imported_files(root: Path) -> dict[str, Path]:
    """Return the files of the user's modules below a folder, or imported for a target there.

    Returns:
        Path relative to `root` (or the module's name, if the file is elsewhere) to the file.
    """
    files = {}
    for name, module in sorted(sys.modules.items()):
        path = _location(module)
        if path is None or name.partition(".")[0] in _OTHERS:
            continue
        below = path.is_relative_to(root)
        if (
            (below or name in _imported.get(root, ()))
            and path.is_file()
            and _is_user_module(module)
        ):
            elsewhere = path.name if name.startswith(_FILE_PREFIX) else name
            files[path.relative_to(root).as_posix() if below else elsewhere] = path
    return files


class ImportSpace:
    """The user's modules of one side of a comparison, isolated from those of the other side.

    Two revisions of a model have modules of the same names, and may import some of them late: in a
    constructor or a forward. The modules of a side are in sys.modules only while it runs, and it
    imports from its own folder.
    """

    def __init__(self, moved: tuple[str, str] | None, isolated: bool) -> None:
        """Create an empty space.

        Args:
            moved: a folder, and the folder that replaces it for this side.
            isolated: whether there are other sides; otherwise modules stay in sys.modules.
        """
        self.moved, self.isolated = moved, isolated
        self._modules: dict[str, ModuleType] = {}
        self._path: list[str] | None = None

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Make imports use this side's modules and folders."""
        if not self.isolated:
            yield
            return
        path, before = list(sys.path), set(sys.modules)
        sys.path[:] = (
            [self._moved_path(entry) for entry in path] if self._path is None else (self._path)
        )
        sys.modules.update(self._modules)
        importlib.invalidate_caches()
        try:
            yield
        finally:
            self._path = list(sys.path)
            for name in sys.modules.keys() - before:
                if name in self._modules or _is_user_module(sys.modules[name]):
                    self._modules[name] = sys.modules.pop(name)
            sys.path[:] = path

    def _moved_path(self, entry: str) -> str:
        if self.moved is None:
            return entry
        old, new = map(Path, self.moved)
        resolved = Path(entry).resolve()  # "" is the current folder
        return str(new / resolved.relative_to(old)) if resolved.is_relative_to(old) else entry

    def check(self) -> None:
        """Check that no module of this side comes from the folder that was replaced.

        Raises:
            ConfigError: one does, so both sides would run the same code.
        """
        if self.moved is None:
            return
        old, new = map(Path, self.moved)
        with self.entered():  # the location of a namespace package follows sys.path
            locations = {name: _location(module) for name, module in self._modules.items()}
        for name, path in locations.items():
            if path and path.resolve().is_relative_to(old) and not path.is_relative_to(new):
                raise ConfigError(
                    f"the other revision imports {name} from {path}, a file of the working tree; "
                    "install the package without a link to that folder, or set model.root",
                    "model.target",
                )


def describe_user_error(error: BaseException) -> str:
    """Return the error's type and message, with the last line of the user's code that led to it."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "importlib" not in frame.filename and frame.lineno]
    where = f" ({own[-1].filename}:{own[-1].lineno})" if len(own) > 1 else ""
    return f"{type(error).__name__}: {error}{where}"


def _is_user_module(module: ModuleType) -> bool:
    """Return whether a module is neither Python's nor an installed library's."""
    path = _location(module)
    return path is not None and not any(map(path.is_relative_to, _library_folders()))


@functools.cache
def _library_folders() -> tuple[str, ...]:
    kinds = ("stdlib", "platstdlib", "purelib", "platlib")
    return tuple(sysconfig.get_path(kind) for kind in kinds)


def _location(module: ModuleType) -> Path | None:
    """Return the file of a module, or the folder of a namespace package."""
    file = getattr(module, "__file__", None)
    if file is None and hasattr(module, "__path__"):
        file = next(iter(module.__path__), None)
    return Path(file) if file else None
