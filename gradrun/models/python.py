"""A model of the user's own: a class, function or module in a Python file or package.

The one source that runs code which the config names, so it asks for trust before it imports.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import sysconfig
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from gradrun.config.model import PythonModel
from gradrun.core.errors import ConfigError
from gradrun.core.suggest import suggest

_KEY = "model.target"


def open_model(config: PythonModel, *, trust_code: bool) -> nn.Module:
    """The module that the target is, or builds when it is called with model.args."""
    if not trust_code:
        raise ConfigError(
            f"{config.target} is code, which would run with your rights, and nothing was "
            "imported; if you trust it, run with --trust-code or GRADRUN_TRUST_CODE=1",
            _KEY,
        )
    place, _, name = config.target.rpartition(":")
    is_file = place.endswith(".py")
    root = config.root or (Path(place).parent if is_file else Path.cwd())
    try:
        with _imports_from(root.resolve(), anew=is_file, before_all=config.root is not None):
            module = import_file(Path(place)) if is_file else importlib.import_module(place)
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        raise ConfigError(f"importing {place} failed: {_user_error(error)}", _KEY) from error
    public = [known for known in vars(module) if not known.startswith("_")]
    if not hasattr(module, name):
        raise ConfigError(f"{place} has no {name!r}; {suggest(name, public)}", _KEY)
    return build(getattr(module, name), config.args, config.target)


def build(target: Any, args: Mapping[str, Any], name: str) -> nn.Module:
    """`target` itself where it is a module, else what it returns when called with `args`."""
    if isinstance(target, nn.Module):
        return target
    if not callable(target):
        raise ConfigError(f"{name} is {_a(target)}, where a torch.nn.Module is wanted", _KEY)
    try:
        module = target(**args)
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        raise ConfigError(f"building {name} failed: {_user_error(error)}", "model") from error
    if not isinstance(module, nn.Module):
        raise ConfigError(f"{name} gives {_a(module)}, where a torch.nn.Module is wanted", _KEY)
    return module


def import_file(path: Path) -> ModuleType:
    """Import a Python file anew."""
    name = f"gradrun_file_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses, pickles and torch.compile look a class's module up by its name.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


_imported: dict[Path, set[str]] = {}
"""Root to the modules of the user's own that were imported from there."""

_added: set[Path] = set()
"""The roots that are in sys.path because of us."""


@contextmanager
def _imports_from(root: Path, *, anew: bool, before_all: bool) -> Iterator[None]:
    """Let imports find what lies in a folder: at last, or before what is installed.

    What came from another root is forgotten: two revisions of one model may stand in one process,
    and neither must get the other's helpers. A file's own helpers are read anew, as the file is.
    Modules already in use stay alive in their users.
    """
    for other, names in _imported.items():
        if other != root and other in _added:
            sys.path[:] = [place for place in sys.path if place != str(other)]
        if other != root or anew:
            for name in names:
                sys.modules.pop(name, None)
            names.clear()
    if str(root) not in sys.path:
        sys.path.insert(0 if before_all else len(sys.path), str(root))
        _added.add(root)
    importlib.invalidate_caches()
    known = set(sys.modules)
    own = _imported.setdefault(root, set())
    try:
        yield
    finally:
        own |= {name for name in sys.modules.keys() - known if _is_own(sys.modules[name])}


class ImportSpace:
    """The user's own modules of one side of a comparison, apart from those of the other.

    Two revisions of a model have modules of the same names, and import some of them late: inside
    a constructor or a forward. What a side imports is found where its folder lies, and is in
    sys.modules only while that side is at work.
    """

    def __init__(self, moved: tuple[str, str] | None, apart: bool) -> None:
        """Make one.

        Args:
            moved: a folder, and the one that stands in its place for this side.
            apart: whether there are others; a side that is alone keeps its modules where they are.
        """
        self.moved, self.apart = moved, apart
        self._modules: dict[str, ModuleType] = {}
        self._path: list[str] | None = None

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Let imports be this side's."""
        if not self.apart:
            yield
            return
        path, known = list(sys.path), set(sys.modules)
        sys.path[:] = [self._place(entry) for entry in path] if self._path is None else self._path
        sys.modules.update(self._modules)
        importlib.invalidate_caches()
        try:
            yield
        finally:
            self._path = list(sys.path)
            for name in sys.modules.keys() - known:
                if name in self._modules or _is_own(sys.modules[name]):
                    self._modules[name] = sys.modules.pop(name)
            sys.path[:] = path

    def _place(self, entry: str) -> str:
        if self.moved is None:
            return entry
        top, tree = map(Path, self.moved)
        held = Path(entry).resolve()  # "" is the current folder
        return str(tree / held.relative_to(top)) if held.is_relative_to(top) else entry

    def check(self) -> None:
        """See that this side has nothing of the folder in whose place another stands.

        Raises:
            ConfigError: it has, so that a comparison would be with itself.
        """
        if self.moved is None:
            return
        top, tree = map(Path, self.moved)
        with self.entered():  # where a package has no file, its place follows sys.path
            places = {name: _place(module) for name, module in self._modules.items()}
        for name, place in places.items():
            if place and place.resolve().is_relative_to(top) and not place.is_relative_to(tree):
                raise ConfigError(
                    f"the other side imports {name} from {place}, which is this side's; install "
                    "the package in no way that names the folder, or set model.root",
                    _KEY,
                )


def _is_own(module: ModuleType) -> bool:
    """Whether it is the user's, and not of Python's or a library's that is installed."""
    place = _place(module)
    kinds = ("stdlib", "platstdlib", "purelib", "platlib")
    return place is not None and not any(
        place.is_relative_to(sysconfig.get_path(kind)) for kind in kinds
    )


def _place(module: ModuleType) -> Path | None:
    """Where it lies; of a package without a file of its own, its folder."""
    file = getattr(module, "__file__", None)
    if file is None and hasattr(module, "__path__"):
        file = next(iter(module.__path__), None)
    return Path(file) if file else None


def _user_error(error: BaseException) -> str:
    """The error with the last line of the user's code that led to it."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "importlib" not in frame.filename and frame.lineno]
    where = f" ({own[-1].filename}:{own[-1].lineno})" if len(own) > 1 else ""
    return f"{type(error).__name__}: {error}{where}"


def _a(value: Any) -> str:
    return f"the {type(value).__name__} {value!r:.60}"
