"""The engine `ray`: workers as actors on a Ray cluster."""

from __future__ import annotations

import itertools
import logging
import os
import socket
import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import replace
from typing import Any

from gradrun.config.engine import RayEngine as RaySection
from gradrun.core.errors import ConfigError, first_line
from gradrun.core.optional import import_optional
from gradrun.core.progress import Progress
from gradrun.core.units import pluralize
from gradrun.engines import processes
from gradrun.engines.engine import EngineRequest, Event, Lost, StartedEngine
from gradrun.engines.messages import Failed, Open, Task, decode_reply, decode_request, encode

_ROOM_SECONDS = 300.0
"""How long a run without any worker waits for room in the cluster."""

_CONNECT_SECONDS = 5.0

_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_BACKEND_LOG_LEVEL": "fatal"}
"""Defaults for environment variables that Ray reads when it is imported."""


_REASONS = {
    "ActorUnavailableError": "its node or process does not answer",
    "NodeDiedError": "its node ended",
}
"""Errors of Ray whose texts name internal numbers only."""


class RayWorker:
    """The code of an actor; requests and replies are encoded messages."""

    def __init__(self, opening: bytes, folder: str, environment: dict[str, str]) -> None:
        os.environ.update(environment)
        with suppress(OSError):  # the folder may not exist on this node
            os.chdir(folder)
        self._opening = opening
        self._runner: Any = None

    def open(self) -> bytes:
        """Open the run; return Ready or Failed."""
        from gradrun.engines.range_runner import RangeRunner, failed

        request = decode_request(self._opening)
        assert isinstance(request, Open)
        self._runner = RangeRunner(request)
        try:
            return encode(self._runner.prepare())
        except Exception as error:
            return encode(failed(error))

    def run(self, request: bytes) -> bytes:
        """Run a task; return Done."""
        task = decode_request(request)
        assert isinstance(task, Task)
        return encode(self._runner.run(task))


class RayEngine:
    """Actors that the driver restarts itself, because Ray's own retries wait for a lost node."""

    def __init__(self, ray: Any, opening: Open, section: RaySection, workers: int) -> None:
        self._ray, self._section, self._count = ray, section, workers
        self.name = f"{pluralize(workers, 'Ray worker')}"
        threads = str(opening.config["run"]["threads"])
        self._arguments = (
            encode(opening),
            os.getcwd(),  # noqa: PTH109 - a text for another machine
            {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
        )
        path = os.environ.get("PYTHONPATH")
        self._actor = ray.remote(RayWorker).options(
            num_cpus=section.cpus,
            num_gpus=section.gpus,
            max_restarts=0,
            max_task_retries=0,
            runtime_env={"env_vars": {"PYTHONPATH": path}} if path else None,
        )
        self._numbers = itertools.count(1)
        self._handles: dict[int, Any] = {}
        self._pending: dict[Any, int] = {}
        """Reference of each reply that is awaited -> worker."""
        self._opened: set[int] = set()
        self._without_worker_since = time.monotonic()

    def start(self, count: int) -> None:
        for _ in range(count):
            number = next(self._numbers)
            self._handles[number] = self._actor.remote(*self._arguments)
            self._pending[self._handles[number].open.remote()] = number

    def send(self, worker: int, task: Task) -> None:
        self._pending[self._handles[worker].run.remote(encode(task))] = worker

    def next(self, timeout: float) -> tuple[int, Event] | None:
        ready, _ = self._ray.wait(list(self._pending), num_returns=1, timeout=timeout)
        if not ready:
            return self._check_room()
        number = self._pending.pop(ready[0])
        try:
            reply = decode_reply(bytearray(self._ray.get(ready[0])))
        except self._ray.exceptions.RayError as error:
            self.stop(number)
            return number, Lost(f"was lost ({_reason(error)})")
        if isinstance(reply, Failed):
            self.stop(number)  # for its CPUs
        else:
            self._opened.add(number)
        return number, reply

    def _check_room(self) -> tuple[int, Event] | None:
        """Fail if no worker has found room in the cluster for a long time."""
        now = time.monotonic()
        if self._opened & self._handles.keys():
            self._without_worker_since = now
        elif now - self._without_worker_since > _ROOM_SECONDS and self._handles:
            text = f"no room for a worker in {_ROOM_SECONDS:g} s: 0 of {self._count} workers"
            return min(self._handles), Failed(error=f"{text}; {_offer(self._ray)}")
        return None

    def stop(self, worker: int) -> None:
        with suppress(Exception):  # the cluster may be gone
            self._ray.kill(self._handles[worker])
        self._handles.pop(worker, None)
        self._pending = {ref: number for ref, number in self._pending.items() if number != worker}

    def keep(self, count: int) -> Collection[int]:
        for number in sorted(self._handles)[count:]:
            self.stop(number)
        self._count = min(count, self._count)
        return self._handles.keys()

    def close(self) -> None:
        for number in list(self._handles):
            self.stop(number)
        self._ray.shutdown()


def start(request: EngineRequest) -> StartedEngine:
    """Connect to the cluster and request the workers.

    Raises:
        ConfigError: Ray is not installed, no cluster answers, or it has no room for a worker.
    """
    section: Any = request.config.engine
    address = section.address or os.environ.get("RAY_ADDRESS")
    if address is None:
        # Ray would listen on all interfaces, and runs the code of anyone who reaches it.
        local = request.config.replace(
            {
                "engine": {
                    "source": "processes",
                    "workers": section.workers,
                    "timeout": section.timeout,
                    "mixed": section.mixed,
                }
            }
        )
        started = processes.start(replace(request, config=local))
        return replace(started, text=f"{started.text}; no Ray address is set")
    request.progress(Progress(f"connecting to Ray at {address}"))
    ray = connect(address)
    try:
        room = workers_with_room(ray, section)
        workers = room if section.workers == "auto" else section.workers
        if not workers:
            raise ConfigError(
                f"the Ray cluster has no room for a worker of {_needs(section)}: {_offer(ray)}",
                "engine.workers",
            )
        config = request.config.replace({"run.threads": request.threads(section.cpus)})
        opening = Open(config=config.model_dump(mode="json"), trust_code=request.trust_code)
        engine = RayEngine(ray, opening, section, workers)
        engine.start(workers)
    except BaseException:
        ray.shutdown()
        raise
    text = f"{engine.name} of {_needs(section)} at {address}"
    return StartedEngine(engine, config, text, workers)


def offer(section: Any) -> str:
    """Describe what the cluster of the section offers.

    Raises:
        ConfigError: Ray is not installed, or no cluster answers.
    """
    address = section.address or os.environ.get("RAY_ADDRESS")
    if address is None:
        return processes.offer(section)
    ray = connect(address)
    try:
        room = pluralize(workers_with_room(ray, section), "worker")
        return f"room for {room} of {_needs(section)}; {_offer(ray)}"
    finally:
        ray.shutdown()


def connect(address: str) -> Any:
    """Connect to a cluster; return the ray module.

    Raises:
        ConfigError: Ray is not installed, or no cluster answers.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    ray = import_optional("ray", "engine.source")
    _check_reachable(address)
    internal = import_optional("ray", "engine.source", "_private.worker")
    if hasattr(internal, "print_to_stdstream"):
        # Ray prints the logs of a lost node to stdout, which no setting prevents; the result
        # reports the loss.
        internal.print_to_stdstream = _discard
    try:
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level=logging.CRITICAL,
            namespace="gradrun",
        )
    except Exception as error:  # Ray raises ConnectionError, ValueError, RuntimeError and others
        raise _no_answer(address, f"{first_line(error):.60}") from error
    return ray


def _no_answer(address: str, reason: str) -> ConfigError:
    return ConfigError(
        f"no Ray cluster answers at {address} ({reason}); start one with `ray start --head`, or "
        "set engine.source: processes",
        "engine.address",
    )


def _check_reachable(address: str) -> None:
    """Fail at once if nothing listens at host:port; Ray would try for over a minute."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isdecimal()):
        return  # for example "auto"
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        raise _no_answer(address, str(error.strerror or error)) from error


def _discard(*_: Any, **__: Any) -> None:
    """Print nothing."""


def workers_with_room(ray: Any, section: RaySection) -> int:
    """Return how many workers the nodes can run together, if nothing else runs on them."""
    count = 0
    for node in ray.nodes():
        resources = node["Resources"] if node["Alive"] else {}
        rooms = [int(resources.get("CPU", 0) // section.cpus)]
        if section.gpus:
            rooms.append(int(resources.get("GPU", 0) // section.gpus))
        count += min(rooms)
    return count


def _needs(section: RaySection) -> str:
    gpus = f" and {section.gpus:g} GPU" if section.gpus else ""
    return f"{pluralize(section.cpus, 'CPU')}{gpus}"


def _offer(ray: Any) -> str:
    """Describe the nodes and the free resources of a cluster."""
    with suppress(Exception):
        nodes = sum(node["Alive"] for node in ray.nodes())
        free, total = ray.available_resources(), ray.cluster_resources()
        shares = [
            f"{free.get(name, 0):g} of {total[name]:g} {name}s free"
            for name in ("CPU", "GPU")
            if name in total
        ]
        return f"the cluster has {pluralize(nodes, 'node')}, {', '.join(shares) or 'no CPUs'}"
    return "the cluster does not answer"


def _reason(error: Exception) -> str:
    name = type(error).__name__
    return _REASONS.get(name) or f"{name}: {' '.join(str(error).split()):.200}"
