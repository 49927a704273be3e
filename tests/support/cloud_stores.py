"""Servers of Google's, Microsoft's and Hugging Face's protocols on the loopback.

Google: gcp-storage-emulator behind a check of access tokens. Microsoft: azurite, which `make tools`
installs. Hugging Face: the part of the hub's API that reading needs. `FaultyProxy` is in front of
each of them.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import parse_qs, quote, unquote, urlsplit
from urllib.request import Request, urlopen

import huggingface_hub.constants
from azure.storage.blob import BlobServiceClient
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from gcp_storage_emulator.handlers.buckets import create_bucket
from gcp_storage_emulator.server import RequestHandler
from gcp_storage_emulator.storage import Storage

from gradrun.core import remote

AZURITE = (
    Path(sys.prefix) / "node" / "node_modules" / "azurite" / "dist" / "src" / "blob" / "main.js"
)
NO_AZURITE = (
    ""
    if shutil.which("node") and AZURITE.is_file()
    else "azurite is not installed; `make tools` installs it if npm is available"
)
"""Why az:// cannot be tested, if so."""

SECRET = b64encode(b"SECRET of the test").decode()
"""The access token or the key of each server."""


class FaultyProxy:
    """Forwards requests to a server; `faults` are taken one per request."""

    def __init__(self, target: str) -> None:
        self._target = target.removeprefix("http://")
        self.faults: list[str] = []
        """"503", "reset", "slow" or "ok" for each of the next requests; then all succeed."""
        self.refused = ""
        """Part of the addresses that cannot be written now."""
        self.requests: list[tuple[str, str, str]] = []
        """Method, address and range of each request."""
        self._server = _serve(partial(_Forwarder, self))
        self.endpoint = _address(self._server)

    def fault(self, method: str, path: str, span: str) -> str:
        """Note a request, and return its fault."""
        self.requests.append((method, path, span))
        if self.refused and method in {"PUT", "POST"} and self.refused in path:
            return "503"
        return self.faults.pop(0) if self.faults else "ok"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


Proxy = Callable[[str], FaultyProxy]
"""Makes the proxy in front of a server."""


class _Quiet(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content_Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


class _Forwarder(_Quiet):
    def __init__(self, proxy: FaultyProxy, *words: Any) -> None:
        self._proxy = proxy
        super().__init__(*words)

    def _forward(self) -> None:
        body = _body(self)
        span = self.headers.get("x-ms-range") or self.headers.get("Range", "")
        fault = self._proxy.fault(self.command, self.path, span)
        if fault == "reset":
            # Linger of 0 s: the client receives a reset, not an orderly end.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.shutdown(socket.SHUT_RDWR)
            self.connection.close()
            raise ConnectionResetError
        if fault == "503":
            self.answer(503, b"slow down")
            return
        if fault == "slow":
            time.sleep(0.3)
        server = http.client.HTTPConnection(self._proxy._target)
        try:
            server.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in {"transfer-encoding", "content-length", "connection"}:
                    server.putheader(name, value)
            server.putheader("Content-Length", str(len(body)))
            server.endheaders(body)
            response = server.getresponse()
            content = response.read()
            self.send_response(response.status, response.reason)
            left_out = {"transfer-encoding", "connection", "keep-alive", "date", "server"}
            for name, value in response.getheaders():
                if name.lower() not in left_out | {"content-length"}:
                    self.send_header(name, value)
            length = response.headers["Content-Length"] if self.command == "HEAD" else len(content)
            self.send_header("Content-Length", str(length or 0))
            self.end_headers()
            self.wfile.write(content)
        finally:
            server.close()

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do_PATCH = _forward  # noqa: N815


def _body(request: BaseHTTPRequestHandler) -> bytes:
    if request.headers.get("Transfer-Encoding", "").lower() != "chunked":
        return request.rfile.read(int(request.headers.get("Content-Length") or 0))
    parts = []
    while size := int(request.rfile.readline().strip(), 16):
        parts.append(request.rfile.read(size))
        request.rfile.readline()
    request.rfile.readline()
    return b"".join(parts)


class _Server(ThreadingHTTPServer):
    def handle_error(self, *_: Any) -> None:
        """Ignore that a client closed its connection."""


def _serve(handler: Any) -> ThreadingHTTPServer:
    server = _Server(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=[0.05], daemon=True).start()
    return server


def _address(server: ThreadingHTTPServer) -> str:
    return f"http://127.0.0.1:{server.server_port}"


class CloudStore(Protocol):
    """A server with a bucket, container or repository at `root`."""

    root: str
    """Such as gs://bucket."""
    proxy: FaultyProxy
    environment: dict[str, str]
    """Address and credentials."""
    denied: dict[str, str]
    """Changes of the environment, after which the server denies access."""
    absent: Callable[[str], dict[str, str]]
    """Changes of the environment for a server at another address, which does not exist."""

    def put(self, key: str, content: bytes) -> str: ...

    def get(self, key: str) -> bytes: ...

    def keys(self, prefix: str = "") -> list[str]: ...

    def close(self) -> None: ...


# --- Google ------------------------------------------------------------------------------------


class _Guarded(RequestHandler):
    """The emulator, with access tokens for service accounts."""

    def _denied(self) -> bool:
        if self.path == "/token":
            _body(self)
            token = {"access_token": SECRET, "expires_in": 3600, "token_type": "Bearer"}
            self._send(200, token)
            return True
        if self.headers.get("Authorization") != f"Bearer {SECRET}":
            _body(self)
            self._send(401, {"error": {"code": 401, "message": "Anonymous caller"}})
            return True
        return False

    def _send(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:  # noqa: N802
        if not self._denied():
            super().do_GET()

    def do_POST(self) -> None:  # noqa: N802
        if not self._denied():
            super().do_POST()

    def do_PUT(self) -> None:  # noqa: N802
        if not self._denied():
            super().do_PUT()

    def do_DELETE(self) -> None:  # noqa: N802
        if not self._denied():
            super().do_DELETE()


class GoogleStore:
    """gs://bucket"""

    root = "gs://bucket"

    def __init__(self, folder: Path, proxy: Proxy) -> None:
        storage = Storage(use_memory_fs=True)
        create_bucket("bucket", storage)
        self._server = _serve(partial(_Guarded, storage))
        self.proxy = proxy(_address(self._server))
        key = rsa.generate_private_key(public_exponent=65537, key_size=2048).private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        account = {
            "type": "service_account",
            "client_email": "test@example.com",
            "project_id": "test",
            "private_key": key.decode(),
            "token_uri": f"{_address(self._server)}/token",
        }
        self._account = folder / "account.json"
        self._account.write_text(json.dumps(account))
        self.environment = {
            "STORAGE_EMULATOR_HOST": self.proxy.endpoint,
            "GOOGLE_APPLICATION_CREDENTIALS": str(self._account),
            "NO_GCE_CHECK": "true",
        }
        self.denied = {"GOOGLE_APPLICATION_CREDENTIALS": ""}

    def absent(self, address: str) -> dict[str, str]:
        return {"STORAGE_EMULATOR_HOST": address}

    def _request(self, path: str, body: bytes | None = None) -> bytes:
        request = Request(
            _address(self._server) + path, body, {"Authorization": f"Bearer {SECRET}"}
        )
        with urlopen(request) as answer:
            content: bytes = answer.read()
        return content

    def put(self, key: str, content: bytes) -> str:
        name = quote(key, safe="")
        self._request(f"/upload/storage/v1/b/bucket/o?uploadType=media&name={name}", content)
        return f"{self.root}/{key}"

    def get(self, key: str) -> bytes:
        return self._request(f"/download/storage/v1/b/bucket/o/{quote(key, safe='')}?alt=media")

    def keys(self, prefix: str = "") -> list[str]:
        listed = json.loads(self._request(f"/storage/v1/b/bucket/o?prefix={quote(prefix)}"))
        return [item["name"] for item in listed.get("items", ())]

    def close(self) -> None:
        self.proxy.close()
        self._server.shutdown()
        self._server.server_close()


# --- Microsoft ---------------------------------------------------------------------------------


class AzureStore:
    """az://container"""

    root = "az://container"

    def __init__(self, folder: Path, proxy: Proxy) -> None:
        options = ["--inMemoryPersistence", "--skipApiVersionCheck", "--disableTelemetry"]
        self._process = subprocess.Popen(
            ["node", AZURITE, "--blobPort", "0", "--silent", *options],
            cwd=folder,
            env=os.environ | {"AZURITE_ACCOUNTS": f"test:{SECRET}"},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout
        line = next(line for line in self._process.stdout if "successfully listens" in line)
        server = line.split()[-1]
        self.proxy = proxy(server)
        self._client = BlobServiceClient.from_connection_string(_connection(server, SECRET))
        self._container = self._client.create_container("container")
        self.environment = {
            "AZURE_STORAGE_CONNECTION_STRING": _connection(self.proxy.endpoint, SECRET)
        }
        other = b64encode(b"another key").decode()
        self.denied = {"AZURE_STORAGE_CONNECTION_STRING": _connection(self.proxy.endpoint, other)}

    def absent(self, address: str) -> dict[str, str]:
        return {"AZURE_STORAGE_CONNECTION_STRING": _connection(address, SECRET)}

    def put(self, key: str, content: bytes) -> str:
        self._container.upload_blob(key, content, overwrite=True)
        return f"{self.root}/{key}"

    def get(self, key: str) -> bytes:
        content: bytes = self._container.download_blob(key).readall()
        return content

    def keys(self, prefix: str = "") -> list[str]:
        return [*self._container.list_blob_names(name_starts_with=prefix)]

    def close(self) -> None:
        self.proxy.close()
        self._client.close()
        self._process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        self._process.kill()
        self._process.wait()
        assert self._process.stdout
        self._process.stdout.close()


def _connection(address: str, key: str) -> str:
    return (
        f"DefaultEndpointsProtocol=http;AccountName=test;AccountKey={key};"
        f"BlobEndpoint={address}/test;"
    )


# --- Hugging Face ------------------------------------------------------------------------------


class _Hub(_Quiet):
    """Repository info, tree, paths-info and resolve, which redirects to a storage server."""

    def __init__(self, files: dict[str, bytes], *words: Any) -> None:
        self._files = files
        super().__init__(*words)

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        if path.startswith("/storage/"):
            self._send_range(self._files[path.removeprefix("/storage/")])
        elif self._allowed(path):
            query = {name: values[0] for name, values in parse_qs(url.query).items()}
            self._answer(path, query)

    def do_POST(self) -> None:
        body = _body(self)
        if not self._allowed(self.path):
            return
        if self.headers["Content-Type"].startswith("application/json"):
            paths = json.loads(body)["paths"]
        else:
            paths = parse_qs(body.decode())["paths"]
        entries = {entry["path"]: entry for entry in self._entries("", recursive=True)}
        paths = [paths] if isinstance(paths, str) else paths
        self._send_json([entries[path] for path in paths if path in entries])

    do_HEAD = do_GET  # noqa: N815

    def _allowed(self, path: str) -> bool:
        if "/datasets/user/name" not in path or (
            self.headers.get("Authorization") != f"Bearer {SECRET}"
        ):
            # The hub does not reveal whether a private repository exists.
            self.answer(401, b'{"error": "Invalid username"}', X_Error_Code="RepoNotFound")
            return False
        return True

    def _answer(self, path: str, query: dict[str, str]) -> None:
        root = "/api/datasets/user/name"
        if path.startswith(f"{root}/tree/main"):
            folder = path.removeprefix(f"{root}/tree/main").strip("/")
            entries = self._entries(folder, recursive=query.get("recursive") in {"True", "true"})
            if entries:
                self._send_json(entries)
            else:
                self.answer(404, b"{}", X_Error_Code="EntryNotFound")
        elif path in {root, f"{root}/revision/main"}:
            self._send_json({"id": "user/name", "sha": "0" * 40, "siblings": []})
        elif path.startswith("/datasets/user/name/resolve/main/"):
            key = path.removeprefix("/datasets/user/name/resolve/main/")
            if key in self._files:
                self.answer(302, Location=f"http://{self.headers['Host']}/storage/{quote(key)}")
            else:
                self.answer(404, b"{}", X_Error_Code="EntryNotFound")
        else:
            self.answer(404, b"{}", X_Error_Code="RevisionNotFound")

    def _entries(self, folder: str, *, recursive: bool) -> list[dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        for key, content in self._files.items():
            if folder and not key.startswith(f"{folder}/"):
                continue
            parts = key.removeprefix(f"{folder}/").split("/") if folder else key.split("/")
            for depth in range(1, len(parts) + 1):
                path = "/".join([*filter(None, [folder]), *parts[:depth]])
                oid = hashlib.sha1(content).hexdigest()
                entry = {"type": "directory", "path": path, "oid": oid, "size": 0}
                if depth == len(parts):
                    entry |= {"type": "file", "size": len(content)}
                found.setdefault(path, entry)
                if not recursive:
                    break
        return [*found.values()]

    def _send_json(self, content: Any) -> None:
        self.answer(200, json.dumps(content).encode(), Content_Type="application/json")

    def _send_range(self, content: bytes) -> None:
        span = self.headers.get("Range", "").removeprefix("bytes=")
        begin, _, end = span.partition("-")
        if not span:
            self.answer(200, content)
            return
        last = min(int(end), len(content) - 1)
        part = content[int(begin) : last + 1]
        self.answer(206, part, Content_Range=f"bytes {begin}-{last}/{len(content)}")


class HubStore:
    """hf://datasets/user/name"""

    root = "hf://datasets/user/name"

    def __init__(self, folder: Path, proxy: Proxy) -> None:
        self._files: dict[str, bytes] = {}
        self._server = _serve(partial(_Hub, self._files))
        self.proxy = proxy(_address(self._server))
        self.environment = {"HF_ENDPOINT": self.proxy.endpoint, "HF_TOKEN": SECRET}
        self.denied = {"HF_TOKEN": "another"}

    def absent(self, address: str) -> dict[str, str]:
        return {"HF_ENDPOINT": address}

    def put(self, key: str, content: bytes) -> str:
        self._files[key] = content
        return f"{self.root}/{key}"

    def get(self, key: str) -> bytes:
        return self._files[key]

    def keys(self, prefix: str = "") -> list[str]:
        return [key for key in self._files if key.startswith(prefix)]

    def close(self) -> None:
        self.proxy.close()
        self._server.shutdown()
        self._server.server_close()


STORES: dict[str, Callable[[Path, Proxy], CloudStore]] = {
    "gs": GoogleStore,
    "az": AzureStore,
    "hf": HubStore,
}


@contextmanager
def cloud_store(
    scheme: str, folder: Path, setenv: Callable[[str, str], Any], proxy: Proxy = FaultyProxy
) -> Iterator[CloudStore]:
    """Start a server, and let fsspec find it and its credentials in the environment."""
    store = STORES[scheme](folder, proxy)
    offline = huggingface_hub.constants.HF_HUB_OFFLINE
    huggingface_hub.constants.HF_HUB_OFFLINE = False
    for name, value in store.environment.items():
        setenv(name, value)
    remote._filesystem.cache_clear()  # it has the address of an earlier server
    try:
        yield store
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE = offline
        store.close()
