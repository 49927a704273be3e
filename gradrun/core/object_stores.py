"""Object stores and web servers as file systems of fsspec: one line per scheme.

The file systems report changes at once, and repeat a failed request at most a few times, within
seconds: remote.py repeats requests. Credentials come from the environment.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable
from typing import Any, NamedTuple

from gradrun.core.errors import ConfigError
from gradrun.core.optional import check_version, import_optional

_FRESH = {"skip_instance_cache": True, "use_listings_cache": False}

_LOGGERS = ("gcsfs", "adlfs", "azure", "s3fs")
"""They log errors with a traceback, to stderr where the application has not set up logging."""


class Scheme(NamedTuple):
    """How addresses with one scheme are read and written."""

    package: str
    """The package that fsspec needs."""
    install: str
    """The argument of pip install."""
    module: str
    connect: Callable[[Any], Any]
    """Makes the file system, from the imported module."""
    environment: str
    """Variables with credentials and addresses, for messages."""
    depth: int = 1
    """Number of path components that name the bucket, server or repository."""
    writable: bool = False


def _s3(module: Any) -> Any:
    retries = {"total_max_attempts": 1}  # repeated by s3fs
    settings = {"retries": retries, "connect_timeout": 10, "read_timeout": 60}
    return module.S3FileSystem(config_kwargs=settings, **_FRESH)


def _google(module: Any) -> Any:
    # Not the default class of gcsfs: for each bucket, that calls another API by gRPC first, and
    # waits a minute where it does not answer.
    base = module.core.GCSFileSystem

    class GoogleStorage(base):  # type: ignore[misc, valid-type]
        # 2 attempts instead of 6, between which half a minute passes
        _request = module.retry.retry_request(retries=2)(base._request.__wrapped__)

    return GoogleStorage(**_FRESH)


def _azure(module: Any) -> Any:
    class AzureStorage(module.AzureBlobFileSystem):  # type: ignore[misc]
        def do_connect(self) -> None:
            super().do_connect()
            # 2 attempts with about 1 s between them, instead of 4 within a minute
            policy = self.service_client._config.retry_policy
            policy.total_retries = policy.initial_backoff = policy.random_jitter_range = 1
            policy.increment_base = 0

        async def _find(self, path: str, *words: Any, **options: Any) -> Any:
            found = await super()._find(path, *words, **options)
            if isinstance(found, list) and options.get("detail"):  # of a file
                return {name: await self._info(name) for name in found}
            return found

    return AzureStorage(**_FRESH)


def _hub(module: Any) -> Any:
    tools = importlib.import_module("huggingface_hub.utils")

    class Hub(module.HfFileSystem):  # type: ignore[misc]
        def info(self, path: str, *words: Any, **options: Any) -> Any:
            try:
                # A file needs the details, which include its hash, a repository does not.
                fresh = {"refresh": True, "expand_info": bool(self.resolve_path(path).path)}
                return super().info(path, *words, **options | fresh)
            except FileNotFoundError:
                self.invalidate_cache()
                raise

        def find(self, path: str, *words: Any, **options: Any) -> Any:
            return super().find(path, *words, **options | {"refresh": True})

        def cat_file(self, path: str, start: int, end: int, **_: Any) -> bytes:
            # The file object of fsspec reads further than required.
            headers = tools.build_hf_headers() | {"Range": f"bytes={start}-{end - 1}"}
            response = tools.get_session().get(self.url(path), headers=headers, timeout=60)
            tools.hf_raise_for_status(response)
            content: bytes = response.content
            return content

        def isdir(self, path: str) -> bool:
            return False  # only url() asks, for files

    return Hub(endpoint=os.environ.get("HF_ENDPOINT"), **_FRESH)


def _web(module: Any) -> Any:
    return module.HTTPFileSystem(**_FRESH)


_REMOTE = "'gradrun[remote]'"
_WEB = Scheme("aiohttp", _REMOTE, "fsspec.implementations.http", _web, "https:// uses none")
_AZURE = Scheme(
    "adlfs",
    "'gradrun[azure]'",
    "adlfs",
    _azure,
    "AZURE_STORAGE_CONNECTION_STRING or AZURE_STORAGE_ACCOUNT_NAME",
    writable=True,
)

SCHEMES = {
    "s3:": Scheme("s3fs", _REMOTE, "s3fs", _s3, "AWS_ACCESS_KEY_ID or AWS_PROFILE", writable=True),
    "gs:": Scheme(
        "gcsfs", "'gradrun[gcs]'", "gcsfs", _google, "GOOGLE_APPLICATION_CREDENTIALS", writable=True
    ),
    "az:": _AZURE,
    "abfs:": _AZURE,
    "hf:": Scheme(
        "huggingface_hub", "huggingface_hub", "huggingface_hub", _hub, "HF_TOKEN", depth=3
    ),
    "https:": _WEB,
    "http:": _WEB,
}
"""First part of a path -> how it is read."""


def connect(scheme: str) -> Any:
    """Return the file system for a scheme.

    Raises:
        ConfigError: a library is missing or too old, or rejects the settings in the environment.
    """
    how = SCHEMES[scheme]
    import_optional("fsspec", "")
    check_version(how.package, how.install)
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        if not logger.handlers:
            logger.addHandler(logging.NullHandler())
    try:
        module = importlib.import_module(how.module)
    except ImportError as error:
        raise ConfigError(f"{scheme}// needs {how.package}; pip install {how.install}") from error
    try:
        return how.connect(module)
    except Exception as error:  # each library has its own types; the text may be a credential
        raise ConfigError(
            f"{how.package} cannot connect to {scheme}// with the settings in the environment "
            f"({type(error).__name__}): check {how.environment}"
        ) from error
