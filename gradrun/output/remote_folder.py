"""Run folders in object stores: written in a local folder, and uploaded during the run.

Objects cannot grow. Therefore files that grow are uploaded in parts, as `NAME.parts/0000-0`, the
number of a process and an offset, and whole at the end of the run. Other files are uploaded when
they change. The journal follows the files that it describes, so the store always has a state that
a resume can continue.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from gradrun.core import remote
from gradrun.core.errors import ConfigError, GradrunError, RunFailed
from gradrun.core.files import cache_folder
from gradrun.core.options import option
from gradrun.core.remote import RemotePath
from gradrun.output import journal, lock, verification
from gradrun.output.formats import ids_file
from gradrun.output.run_folder import RESULT, RunFolder, is_run_file, removes_input
from gradrun.results.result import InferResult, Verification

SECONDS = 10.0
"""Least time between two uploads."""

_TIME_SHARE = 0.1
"""Greatest share of the run's time for uploads, which a thread makes."""

_GROWING = ("predictions.jsonl", "predictions.csv", ids_file.FILE_NAME)
_PART = re.compile(r"(.+)\.parts/([0-9]{4})-([0-9]{15})")


class RemoteFolder:
    """The folder of one run in an object store."""

    def __init__(
        self,
        url: RemotePath,
        *,
        overwrite: bool = False,
        resume: bool = False,
        inputs: Iterable[Path] = (),
    ) -> None:
        """Inspect the folder, and copy an earlier run that is resumed.

        Raises:
            ConfigError: the store cannot be written, the folder may not be overwritten or cannot
                be resumed, an overwrite would remove one of `inputs`, or the cache cannot be
                written.
        """
        self.url = url
        self.local = cache_folder() / "runs" / hashlib.sha256(str(url).encode()).hexdigest()[:16]
        try:
            self.local.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            text = f"the cache {cache_folder()} cannot be written: {error.strerror}"
            raise ConfigError(f"{text}; set GRADRUN_CACHE to another folder") from error
        lock.check_unlocked(self.local)
        self._signatures: dict[str, tuple[int, int]] = {}
        self._sent: dict[str, int] = {}
        self._journal = b""
        self._version = ""
        """Version of the journal in the store after the last upload."""
        self._generation = 0
        self._stale: list[RemotePath] = []
        with self._key_errors():
            self._prepare(overwrite, resume, {*map(str, inputs)})

    @contextmanager
    def mirrored(self) -> Iterator[None]:
        """Upload what is written to `local` meanwhile, in a thread, and the rest at the end.

        Errors name the folder in the store. The local folder is removed when all is uploaded.

        Raises:
            RunFailed: the store does not accept the files, which stay in `local`.
        """
        stop = threading.Event()
        thread = threading.Thread(target=self._watch, args=[stop], name="gradrun-upload")
        thread.start()
        try:
            try:
                yield
            finally:
                stop.set()
                thread.join()
        except GradrunError as error:
            text = str(error).replace(str(self.local), str(self.url))
            try:
                self._upload()
            except OSError as problem:
                text += f"; {self._problem(problem)}"
            raise error.reworded(text, self._named(error.result)) from error.__cause__
        self._finish()

    def save(self, result: InferResult) -> InferResult:
        """Save and return a result that names the folder in the store.

        Raises:
            RunFailed: it cannot be written.
        """
        named = self._named(result)
        assert named
        if named != result or not self._signatures.get(RESULT):
            RunFolder(self.local, resume=True).save(named)
        return named

    def _named(self, result: InferResult | None) -> InferResult | None:
        if result is None:
            return None
        local, url = (json.dumps(str(path))[1:-1] for path in (self.local, self.url))
        return InferResult.from_json(result.to_json().replace(local, url))

    # --- before the run ------------------------------------------------------------------------

    def _prepare(self, overwrite: bool, resume: bool, inputs: set[str]) -> None:
        found = _files_of(self.url)
        ours = {name: file for name, file in found.items() if _is_run_object(name)}
        if needed := [file for file in ours.values() if str(file) in inputs]:
            raise removes_input(needed[0])
        if found and not ours and not overwrite and not resume:
            raise ConfigError(
                f"output folder {self.url} already exists; use {option('overwrite')} to add to it, "
                "or choose another output.path",
                "output.path",
            )
        with TemporaryDirectory(prefix="gradrun-") as name:
            if journal.FILE_NAME in ours and not overwrite:
                folder = Path(name)
                _copy(ours, folder, {journal.FILE_NAME, RESULT})
                self._inspect(folder, resume)
                self._journal = (folder / journal.FILE_NAME).read_bytes()
                self._version = ours[journal.FILE_NAME].stat().version
            else:
                self._stale = [*ours.values()]
            probe = self.url / lock.FILE_NAME
            remote.put_bytes(b"", probe)
            remote.remove(probe)
            if overwrite:
                shutil.rmtree(self.local, ignore_errors=True)
            elif self._journal and not self._is_ahead(Path(name)):
                shutil.rmtree(self.local, ignore_errors=True)
                _copy(ours, self.local)
                for file in [*self._files(), *self.local.glob(RESULT)]:
                    whole = file.name not in _GROWING
                    if whole or not any(n.startswith(f"{file.name}.parts/") for n in ours):
                        self._signatures[self._name(file)] = _signature(file)
        parts = [part for name in ours if (part := _PART.fullmatch(name))]
        self._generation = max((int(part[2]) for part in parts), default=-1) + 1
        if self._journal:
            self._stale = [file for name, file in ours.items() if _PART.fullmatch(name)]

    def _inspect(self, folder: Path, resume: bool) -> None:
        try:
            RunFolder(folder, resume=resume)
        except GradrunError as error:
            text = str(error).replace(str(folder), str(self.url))
            raise error.reworded(text, None) from error

    def _is_ahead(self, folder: Path) -> bool:
        """Whether the local folder has the same run with at least as many samples."""
        path = self.local / journal.FILE_NAME
        if not path.is_file():
            return False
        theirs, ours = journal.read(folder / journal.FILE_NAME), journal.read(path)
        return theirs.header == ours.header and ours.committed >= theirs.committed

    @contextmanager
    def _key_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            text = f"{self.url} cannot be written: {error.strerror or error}"
            raise ConfigError(text, "output.path") from error

    # --- during the run ------------------------------------------------------------------------

    def _watch(self, stop: threading.Event) -> None:
        pause = SECONDS
        while not stop.wait(pause):
            started = time.monotonic()
            with suppress(OSError):  # repeated; the last upload reports its error
                self._upload()
            pause = max(SECONDS, (time.monotonic() - started) / _TIME_SHARE)

    def _upload(self, *, finished: bool = False) -> None:
        """Upload what is new.

        Raises:
            OSError: the store did not accept it; the state in the store stays valid.
        """
        path = self.local / journal.FILE_NAME
        if not path.is_file():
            return
        content = path.read_bytes()
        header = content.partition(b"\n")[0] + b"\n"
        if not self._journal.startswith(header):
            # A new run. Without its journal, the files of an earlier one have no meaning.
            self._put_journal(header)
            self._remove_stale()
        for file in self._files():
            if file.name in _GROWING and not finished:
                self._append(file)
            else:
                self._put(file)
        if content != self._journal:
            self._put_journal(content)
        if (result := self.local / RESULT).is_file():
            self._put(result)
        self._remove_stale()

    def _files(self) -> list[Path]:
        """Return the files of the run besides the journal and the result."""
        files = [path for path in sorted(self.local.rglob("*")) if path.is_file()]
        left_out = {journal.FILE_NAME, RESULT}
        names = {path: self._name(path) for path in files if path.suffix != ".tmp"}
        return [path for path, n in names.items() if is_run_file(n) and n not in left_out]

    def _name(self, file: Path) -> str:
        return file.relative_to(self.local).as_posix()

    def _put(self, file: Path) -> None:
        name, signature = self._name(file), _signature(file)
        if self._signatures.get(name) != signature:
            remote.put_file(file, self.url / name)
            self._signatures[name] = signature

    def _append(self, file: Path) -> None:
        name, size = self._name(file), file.stat().st_size
        if self._signatures.get(name) == _signature(file):
            return
        sent = self._sent.get(name)
        if sent is not None and size < sent:
            self._generation, sent = self._generation + 1, None
        folder = self.url / f"{name}.parts"
        if sent is None:
            part = folder / f"{self._generation:04}-{0:015}"
            remote.put_file(file, part)
            self._sent[name] = part.stat().st_size
            return
        if size > sent:
            with file.open("rb") as opened:
                opened.seek(sent)
                data = opened.read(size - sent)
            remote.put_bytes(data, folder / f"{self._generation:04}-{sent:015}")
            self._sent[name] = size

    def _put_journal(self, content: bytes) -> None:
        path = self.url / journal.FILE_NAME
        if self._version and path.stat().version != self._version:
            raise OSError(None, f"another process writes to {self.url}")
        remote.put_bytes(content, path)
        self._journal, self._version = content, path.stat().version

    def _remove_stale(self) -> None:
        while self._stale:
            file = self._stale[-1]
            if file.name != journal.FILE_NAME:
                remote.remove(file)
            self._stale.pop()

    # --- after the run -------------------------------------------------------------------------

    def _finish(self) -> None:
        try:
            self._upload(finished=True)
            stored = _files_of(self.url)
            self._check_stored(stored)
            for name, file in stored.items():
                if _PART.fullmatch(name):
                    remote.remove(file)
        except OSError as error:
            raise RunFailed(self._problem(error), resumable=True) from error
        shutil.rmtree(self.local, ignore_errors=True)

    def _check_stored(self, stored: Mapping[str, RemotePath]) -> None:
        """Raise OSError if a file is not in the store, although an upload reported success."""
        for file in [*self._files(), *self.local.glob(journal.FILE_NAME), *self.local.glob(RESULT)]:
            name = self._name(file)
            if name not in stored or stored[name].size() != file.stat().st_size:
                raise OSError(None, f"its server accepted {name}, but does not have it")

    def _problem(self, error: OSError) -> str:
        reason = error.strerror or error
        return (
            f"the last predictions cannot be uploaded to {self.url}: {reason}; they are in "
            f"{self.local} on this machine, and {option('resume')} uploads them"
        )


def verify(folder: str | Path) -> Verification:
    """Compare all committed ranges of a run with their checksums.

    A run in an object store is downloaded to a temporary folder.

    Raises:
        ConfigError: the folder has no journal or cannot be read, or pyarrow is needed and missing.
        GradrunError: the journal cannot be read or is damaged.
    """
    try:
        url = remote.as_path(Path(folder))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if not isinstance(url, RemotePath):
        return verification.verify(url)
    with TemporaryDirectory(prefix="gradrun-") as name:
        try:
            _copy(_files_of(url), Path(name))
        except OSError as error:
            raise ConfigError(f"{url} cannot be read: {error.strerror or error}") from error
        try:
            found = verification.verify(name)
        except GradrunError as error:
            raise error.reworded(str(error).replace(name, str(url)), None) from error
        return found.replace(folder=url)


def _files_of(url: RemotePath) -> dict[str, RemotePath]:
    """Return the files below a folder of a store, by their names in it."""
    return {file.relative_to(url).as_posix(): file for file in url.files()}


def _is_run_object(name: str) -> bool:
    part = _PART.fullmatch(name)
    return part[1] in _GROWING if part else is_run_file(name)


def _copy(found: dict[str, RemotePath], folder: Path, names: set[str] | None = None) -> None:
    """Copy the files of a run to a local folder, and join parts."""
    parts: dict[str, dict[str, list[tuple[int, RemotePath]]]] = defaultdict(dict)
    for name, file in found.items():
        if not _is_run_object(name) or (names is not None and name not in names):
            continue
        if part := _PART.fullmatch(name):
            parts[part[1]].setdefault(part[2], []).append((int(part[3]), file))
            continue
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with file.open("rb") as source, (folder / name).open("wb") as target:
            shutil.copyfileobj(source, target)
    for name, generations in parts.items():
        for listed in generations.values():
            _join(sorted(listed), folder / name)


def _join(parts: list[tuple[int, RemotePath]], target: Path) -> None:
    """Join the parts of a file, unless the file is longer already."""
    draft = target.with_name(f"{target.name}.tmp")
    draft.parent.mkdir(parents=True, exist_ok=True)
    with draft.open("wb") as joined:
        for offset, part in parts:
            if offset != joined.tell():
                break  # the part before it is lost
            with part.open("rb") as source:
                shutil.copyfileobj(source, joined)
    if target.exists() and target.stat().st_size >= draft.stat().st_size:
        draft.unlink()
    else:
        draft.replace(target)


def _signature(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_mtime_ns, status.st_size
