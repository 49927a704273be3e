"""Files in object stores and on web servers: paths, reading by range and ahead, local copies.

Credentials come from the environment; an address must not contain any.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import random
import re
import shutil
import stat
import time
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path, PosixPath, PurePosixPath
from threading import Lock
from typing import Any, NamedTuple

from gradrun.core.errors import first_line
from gradrun.core.files import cache_folder
from gradrun.core.object_stores import SCHEMES, connect

_BLOCK = 4 * 1024 * 1024
_MAX_BLOCKS = 8
"""Blocks in memory, of all files together."""
_TRIES = 6
_FIRST_WAIT = 0.5
"""Seconds before the second try; doubled before each further one."""


class RemotePath(PosixPath):
    """A path such as s3://bucket/folder/file, for the parts of gradrun that read files.

    Operations that reach the store raise OSError with a sentence.
    """

    __slots__ = ()

    def __str__(self) -> str:
        text = super().__str__()
        scheme, _, rest = text.partition(":/")
        return f"{scheme}://{rest}" if f"{scheme}:" in SCHEMES else text  # or a relative path

    def __repr__(self) -> str:
        return f"RemotePath({str(self)!r})"

    __fspath__ = __str__

    @property
    def key(self) -> str:
        """The address for fsspec."""
        return str(self) if self.parts[0].startswith("http") else "/".join(self.parts[1:])

    def resolve(self, strict: bool = False) -> RemotePath:
        return self

    absolute = expanduser = resolve

    def is_symlink(self) -> bool:
        return False

    def stat(self, *, follow_symlinks: bool = True) -> Any:
        info = _info(self)
        if info is None:
            raise FileNotFoundError(errno.ENOENT, "it does not exist", str(self))
        return info

    lstat = stat

    def exists(self, *, follow_symlinks: bool = True) -> bool:
        return self.is_file() or self.is_dir()

    def is_file(self) -> bool:
        return str(self) in _listed or ((info := _info(self)) is not None and not info.folder)

    def is_dir(self) -> bool:
        if len(self.parts) < 2 or str(self) in _listed:
            return False
        return (info := _info(self)) is not None and info.folder

    def open(self, mode: str = "r", buffering: int = -1, encoding: Any = None, errors: Any = None,
             newline: Any = None) -> Any:  # fmt: skip
        if set(mode) - set("rbt"):
            raise OSError(errno.EROFS, "a remote file is opened for reading only", str(self))
        file = io.BufferedReader(_RangeReader(self), 256 * 1024)
        return file if "b" in mode else io.TextIOWrapper(file, encoding, errors, newline)

    def files(self) -> Iterator[RemotePath]:
        """Yield all files below a folder, in no order."""
        with_details = _call(self, lambda fs: fs.find(self.key, detail=True))
        for key, info in (with_details or {}).items():
            if info["type"] == "file" and not key.endswith("/"):
                yield self._found(key, info)

    def matches(self) -> list[RemotePath]:
        """Return the files that match the path, a glob pattern."""
        found = _call(self, lambda fs: fs.glob(self.key, detail=True))
        return [self._found(key, info) for key, info in (found or {}).items()
                if info["type"] == "file"]  # fmt: skip

    def glob(self, pattern: str) -> Generator[RemotePath, None, None]:
        yield from (self / pattern).matches()

    def version(self) -> str:
        """Return what identifies the content: size and entity tag, or time of modification."""
        return (_listed.get(str(self)) or self.stat()).version

    def size(self) -> int:
        """Return the number of bytes, without a request if the file was listed."""
        size: int = (_listed.get(str(self)) or self.stat()).st_size
        return size

    def note_version(self) -> None:
        """Look at the file; later reads must find this version."""
        _listed[str(self)] = self.stat()

    def _found(self, key: str, info: dict[str, Any]) -> RemotePath:
        scheme = self.parts[0]
        path = RemotePath(key if scheme.startswith("http") else f"{scheme}/{key}")
        _listed[str(path)] = _Info.of(info)
        return path


class RemoteError(OSError):
    """A request that failed for good, as a sentence."""

    def __init__(self, problem: str) -> None:
        super().__init__(errno.EIO, problem)

    def __str__(self) -> str:
        return str(self.strerror)


class _Info(NamedTuple):
    """The state of a file, with the attributes of os.stat_result that gradrun reads."""

    st_size: int
    st_mtime_ns: int
    version: str
    folder: bool = False

    @property
    def st_mode(self) -> int:
        return stat.S_IFDIR if self.folder else stat.S_IFREG

    @staticmethod
    def of(info: dict[str, Any]) -> _Info:
        keys = ("ETag", "etag", "md5Hash", "blob_id", "LastModified", "last_modified", "mtime")
        tag = next((str(info[key]) for key in keys if info.get(key)), "")
        size = -1 if info.get("size") is None else int(info["size"])
        digest = hashlib.sha256(tag.encode()).digest()
        time_ns = int.from_bytes(digest[:7], "big") if tag else 0
        return _Info(size, time_ns, f"{size} {tag}", info.get("type") == "directory")


_listed: dict[str, _Info] = {}
"""Files that were found below a folder, by a pattern or by their names, at their first look.

They need no request of their own, and reads must find the same version.
"""


def forget_versions() -> None:
    """Look at files again: a new run may read new versions."""
    _listed.clear()


def is_remote(path: Path) -> bool:
    """Return whether a path is in an object store or on a web server."""
    return isinstance(path, RemotePath)


def is_address(path: Path) -> bool:
    """Return whether a path starts with a scheme that gradrun reads, such as s3://."""
    return path.parts[:1] != () and path.parts[0] in SCHEMES


def as_path(path: Path) -> Path:
    """Return a RemotePath for a path that starts with a scheme such as s3://, else the path.

    Raises:
        ValueError: the address contains a credential, a query or no name.
    """
    scheme = path.parts[0] if path.parts else ""
    if isinstance(path, RemotePath) or not scheme.endswith(":") or not scheme[:-1].isalnum():
        return path
    if scheme not in SCHEMES:
        if len(path.parts) > 1 and scheme.islower() and len(scheme) > 2:
            known = ", ".join(f"{name}//" for name in SCHEMES)
            raise ValueError(f"{scheme}// is not supported; addresses start with {known}")
        return path
    if len(path.parts) < 2:
        raise ValueError(f"{scheme}// names no bucket or server")
    place = f"the address at {scheme}//{path.parts[1].rpartition('@')[2].partition('?')[0]}"
    if "@" in path.parts[1]:
        raise ValueError(
            f"{place} contains a credential or an account; accounts and credentials come from the "
            "environment"
        )
    if scheme.startswith("http") and "?" in str(path):
        raise ValueError(
            f"{place} contains a query, which may be a credential and would be stored in results; "
            "use an address without one, or s3://, gs:// or az:// with credentials from the "
            "environment"
        )
    if ".." in path.parts:
        raise ValueError(f"{place} contains '..', which stores do not resolve; write it without")
    return RemotePath(path)


_CREDENTIALS = re.compile(r"(?<=://)[^/\s'\"]*@|(?<=\?)(?<=[^\s]\?)[^\s'\"]+")


def hide_credentials(text: str) -> str:
    """Replace user names, passwords and queries of the addresses in a line."""
    return _CREDENTIALS.sub("***", text) if "://" in text else text


def check_writable(path: Path) -> None:
    """Raise ValueError if outputs cannot be written below a remote path."""
    if not SCHEMES[path.parts[0]].writable:
        stores = ", ".join(f"{name}//" for name, how in SCHEMES.items() if how.writable)
        raise ValueError(
            f"outputs cannot be written to {path.parts[0]}//; use {stores} or a folder"
        )
    if len(path.parts) < 3:
        raise ValueError(f"{path} is a bucket; name a folder in it, such as {path}/run")


# --- requests ----------------------------------------------------------------------------------


@cache
def _filesystem(scheme: str) -> Any:
    return connect(scheme)


def filesystem(path: RemotePath) -> Any:
    """Return fsspec's file system of a path.

    Raises:
        ConfigError: a library is missing, or rejects the settings in the environment.
    """
    return _filesystem(path.parts[0])


def _info(path: RemotePath) -> _Info | None:
    try:
        info: dict[str, Any] = _call(path, lambda fs: fs.info(path.key))
    except FileNotFoundError:
        return None
    return _Info.of(info)


def _call(path: RemotePath, request: Callable[[Any], Any]) -> Any:
    """Send a request; try again after errors that may pass.

    Raises:
        OSError: with a sentence. FileNotFoundError if the file does not exist.
    """
    fs = filesystem(path)
    for attempt in range(_TRIES):
        try:
            return request(fs)
        except RemoteError:
            raise
        except Exception as caught:  # each store has its own types of error
            error = _reason(caught)
            if isinstance(error, FileNotFoundError) or _status(error) in {404, 410}:
                raise FileNotFoundError(errno.ENOENT, "it does not exist", str(path)) from error
            problem, passes = _describe(path, error)
            if not passes or attempt == _TRIES - 1:
                _filesystem.cache_clear()  # the user may change the environment
                raise RemoteError(problem) from error
        time.sleep(_FIRST_WAIT * 2**attempt * random.uniform(0.5, 1))  # noqa: S311 - not security
    raise AssertionError


def _reason(error: Exception) -> Exception:
    """Return the cause of an error that only states that a file was not found."""
    cause = error.__cause__
    if isinstance(error, FileNotFoundError) and isinstance(cause, Exception):
        return cause
    return error


def _status(error: BaseException | None) -> int | None:
    """Return the status of HTTP in an error of any library, or in its cause."""
    if error is None:
        return None
    response = getattr(error, "response", None)
    found = [getattr(error, name, None) for name in ("status", "status_code", "code")]
    if isinstance(response, dict):
        found.append(response.get("ResponseMetadata", {}).get("HTTPStatusCode"))
    found.append(getattr(response, "status_code", None))
    known = next((status for status in found if isinstance(status, int)), None)
    return known or _status(error.__cause__)


_CHANGED = "its content changed during the run"

_UNREACHABLE = {
    "ClientConnectorDNSError", "ClientConnectorError", "ConnectError", "ConnectTimeout",
    "ConnectTimeoutError", "EndpointConnectionError", "ServiceRequestError",
}  # fmt: skip
"""Types of errors of servers without an answer."""

_SETTINGS = {
    "AzureSigningError", "EndpointResolutionError", "InvalidRegionError", "ProfileNotFound",
    "UnsupportedProtocol",
}  # fmt: skip
"""Types of errors of keys, addresses and names in the environment that libraries reject."""


def _place(path: RemotePath) -> str:
    """Return the address of the bucket, server or repository of a path."""
    parts = path.parts[1 : 1 + SCHEMES[path.parts[0]].depth]
    return f"{path.parts[0]}//{'/'.join(parts)}"


def _describe(path: RemotePath, error: Exception) -> tuple[str, bool]:
    """Return a sentence about an error, and whether it may pass.

    The text of the error itself may contain an address with a credential.
    """
    kind, text = type(error).__name__, first_line(error)
    place, variables = _place(path), SCHEMES[path.parts[0]].environment
    status = _status(error)
    if isinstance(error, PermissionError) or status in {401, 403} or text.startswith("Forbidden"):
        return (
            f"the store denies access to {place}: check the address, the credentials in the "
            f"environment ({variables}) and the permissions"
        ), False
    if "credential" in f"{kind} {text}".lower():
        return f"the environment has no credentials for {place}: set {variables}", False
    if "Offline" in kind:
        return f"HF_HUB_OFFLINE is set, so {place} cannot be read", False
    if kind in _UNREACHABLE:
        return f"the server of {place} does not answer", True
    if kind in _SETTINGS:
        return (
            f"the settings for {place} in the environment are not valid ({kind}): check "
            f"{variables} and, if set, the address of the server"
        ), False
    if status == 416:  # its end is before the requested range
        return _CHANGED, False
    if status and 400 <= status < 500 and status not in {408, 429}:
        return f"the server answered {status}", False
    if not status and isinstance(error, ValueError | TypeError | NotImplementedError):
        return (
            f"{place} is not a valid address, its server does not report sizes, or a proxy "
            f"answered in its place ({kind})"
        ), False
    busy = status or "SlowDown" in text or "reduce" in text.lower()
    return f"the store is busy or broken ({status or kind})" if busy else (
        f"the connection to {place} failed ({kind})"
    ), True  # fmt: skip


# --- reading -----------------------------------------------------------------------------------


class _Blocks:
    """The blocks of files that were read last, or are read ahead in threads."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._blocks: OrderedDict[tuple[str, str, int], Future[bytes]] = OrderedDict()
        self._threads = ThreadPoolExecutor(2, "gradrun-remote")

    def get(self, path: RemotePath, info: _Info, number: int, ahead: int = 1) -> bytes:
        """Return a block, and start to read those after it.

        Raises:
            OSError: it cannot be read, or the file changed.
        """
        last = max(0, info.st_size - 1) // _BLOCK
        with self._lock:
            for wanted in range(number, min(number + ahead, last) + 1):
                name = (str(path), info.version, wanted)
                known = self._blocks.get(name)
                if known is None or (known.done() and known.exception()):
                    self._blocks[name] = self._threads.submit(_read_block, path, info, wanted)
                self._blocks.move_to_end(name)
            block = self._blocks[str(path), info.version, number]
            while len(self._blocks) > _MAX_BLOCKS:
                self._blocks.popitem(last=False)
        return block.result()


def _read_block(path: RemotePath, info: _Info, number: int) -> bytes:
    begin = number * _BLOCK
    end = min(begin + _BLOCK, info.st_size)

    def request(fs: Any) -> bytes:
        data: bytes = fs.cat_file(path.key, start=begin, end=end)
        # After the read: a check before it would miss a change in between.
        if path.stat().version != info.version:
            raise RemoteError(_CHANGED)
        if len(data) < end - begin:
            raise ConnectionError("the answer is incomplete")
        return data

    data: bytes = _call(path, request)
    if len(data) > end - begin:
        raise RemoteError("its server cannot send a part of a file; download it first")
    return data


_blocks = _Blocks()


class _RangeReader(io.RawIOBase):
    """A remote file as a stream that can seek."""

    def __init__(self, path: RemotePath) -> None:
        super().__init__()
        self._path, self._at = path, 0
        self._info = _listed.get(str(path)) or path.stat()
        if self._info.folder:
            raise IsADirectoryError(errno.EISDIR, "it is a folder", str(path))
        if self._info.st_size < 0:
            raise RemoteError("its server does not report its size; download it first")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._info.st_size}[whence]
        self._at = max(0, origin + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        view, done = memoryview(buffer).cast("B"), 0
        if view and self._at < self._info.st_size:
            number, begin = divmod(self._at, _BLOCK)
            part = _blocks.get(self._path, self._info, number)[begin : begin + len(view)]
            done = len(part)
            view[:done] = part
            self._at += done
        return done


# --- writing -----------------------------------------------------------------------------------


def put_bytes(data: bytes, path: RemotePath) -> None:
    """Write an object, in one step.

    Raises:
        OSError: the store did not accept it.
    """
    _write(path, lambda fs: fs.pipe_file(path.key, data))


def put_file(file: Path, path: RemotePath) -> None:
    """Upload a file, which becomes visible in one step.

    Raises:
        OSError: the store did not accept it.
    """
    _write(path, lambda fs: fs.put_file(str(file), path.key))


def _write(path: RemotePath, request: Callable[[Any], Any]) -> None:
    _listed.pop(str(path), None)
    try:
        _call(path, request)
    except FileNotFoundError as error:
        raise RemoteError(f"{_place(path)} does not exist") from error


def remove(path: RemotePath) -> None:
    """Remove an object, if it exists.

    Raises:
        OSError: the store did not remove it.
    """
    _listed.pop(str(path), None)
    with suppress(FileNotFoundError):
        _call(path, lambda fs: fs.rm_file(path.key))


# --- local copies ------------------------------------------------------------------------------


def local_copy(path: Path) -> Path:
    """Return a local file or folder with the content of a remote one, for readers that need it.

    It is downloaded to the cache once per version. A local path is returned as it is.

    Raises:
        OSError: it cannot be read, or does not exist.
    """
    if not isinstance(path, RemotePath):
        return path
    if path.is_file():
        path.note_version()
        sources = [path]
    else:
        sources = _visible_files(path)
    if not sources:
        raise FileNotFoundError(errno.ENOENT, "it does not exist", str(path))
    identity = hashlib.sha256(str(path).encode())
    for source in sources:
        identity.update(f"\n{source} {source.version()}".encode())
    place = cache_folder() / "remote" / identity.hexdigest()[:16]
    target = place / path.name
    if target.exists():
        return target
    draft = place.with_name(f"{place.name}.{os.getpid()}.tmp")
    try:
        for source in sources:
            relative = source.relative_to(path) if source != path else PurePosixPath()
            copy = draft / path.name / relative
            copy.parent.mkdir(parents=True, exist_ok=True)
            with source.open("rb") as file, copy.open("wb") as opened:
                shutil.copyfileobj(file, opened, _BLOCK)
        draft.rename(place)
    except OSError:
        shutil.rmtree(draft, ignore_errors=True)
        if target.exists():  # another process was faster
            return target
        raise
    return target


def _visible_files(folder: RemotePath) -> list[RemotePath]:
    """Return the files, without hidden ones and names with `..`, which would leave a copy."""
    files = sorted(folder.files())
    return [f for f in files if not any(p.startswith(".") for p in f.relative_to(folder).parts)]
