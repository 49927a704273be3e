"""A real S3 server on the loopback, which can be told to fail."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import boto3
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

from gradrun.core import remote

BUCKET = "bucket"


class _Quiet(WSGIRequestHandler):
    protocol_version = "HTTP/1.1"

    def log(self, *_: Any) -> None:
        pass


class ObjectStore:
    """moto's S3 server; `faults` are taken one per request that carries data."""

    def __init__(self) -> None:
        self._app = DomainDispatcherApplication(create_backend_app)
        self.faults: list[str] = []
        """"503", "reset", "slow" or "ok" for each of the next requests; then all succeed."""
        self.broken_from: int | None = None
        """Offset in a file from which on reads fail."""
        self.refused = ""
        """Part of the keys that cannot be written now."""
        self.forbidden = False
        """Whether all requests are denied."""
        self.requests: list[tuple[str, str, str]] = []
        """Method, path and range of each request."""
        self._server = make_server("127.0.0.1", 0, self, threaded=True, request_handler=_Quiet)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.client = boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name="us-east-1",
            aws_access_key_id="testing",
            aws_secret_access_key="testing",
        )
        self.client.create_bucket(Bucket=BUCKET)

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        path = environ["PATH_INFO"]
        self.requests.append((environ["REQUEST_METHOD"], path, environ.get("HTTP_RANGE", "")))
        fault = self.faults.pop(0) if self.faults else "ok"
        begin = environ.get("HTTP_RANGE", "bytes=-").removeprefix("bytes=").partition("-")[0]
        if self.broken_from is not None and begin and int(begin) >= self.broken_from:
            fault = "503"
        if self.refused and environ["REQUEST_METHOD"] == "PUT" and self.refused in path:
            fault = "503"
        if self.forbidden:
            body = b"<Error><Code>AccessDenied</Code><Message>no</Message></Error>"
            start_response("403 Forbidden", [("Content-Length", str(len(body)))])
            return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]
        if fault == "reset":
            # Linger of 0 s: the client receives a reset, not an orderly end.
            connection = environ["werkzeug.socket"]
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.shutdown(socket.SHUT_RDWR)
            connection.close()
            raise ConnectionResetError
        if fault == "503":
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            body = b"<Error><Code>SlowDown</Code><Message>Reduce your rate</Message></Error>"
            start_response("503 Slow Down", [("Content-Length", str(len(body)))])
            return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]
        if fault == "slow":
            time.sleep(0.3)
        return self._app(environ, start_response)

    def put(self, key: str, content: bytes, *, public: bool = False) -> str:
        access = "public-read" if public else "private"
        self.client.put_object(Bucket=BUCKET, Key=key, Body=content, ACL=access)
        return f"s3://{BUCKET}/{key}"

    def get(self, key: str) -> bytes:
        content: bytes = self.client.get_object(Bucket=BUCKET, Key=key)["Body"].read()
        return content

    def keys(self, prefix: str = "") -> list[str]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        return [item["Key"] for page in pages for item in page.get("Contents", ())]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@contextmanager
def object_store(
    setenv: Callable[[str, str], Any], store: ObjectStore | None = None
) -> Iterator[ObjectStore]:
    """Start the server, and let fsspec find it and its credentials in the environment."""
    store = store or ObjectStore()
    for name, value in {
        "AWS_ENDPOINT_URL": store.endpoint,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "SECRET-of-the-test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        setenv(name, value)
    remote._filesystem.cache_clear()  # it has the address of an earlier server
    try:
        yield store
    finally:
        store.close()
