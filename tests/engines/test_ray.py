"""Errors of the engine `ray` without a cluster; tests/soak/ray_cluster.py runs a real one."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest

import gradrun
from gradrun.config.engine import RayEngine as RaySection
from gradrun.core.errors import ConfigError
from gradrun.engines.engine import Lost, start_error
from gradrun.engines.messages import Failed, Open
from gradrun.engines.ray import RayEngine

pytest.importorskip("ray")


def _config(tmp_path: Path, **engine: Any) -> dict[str, Any]:
    return {
        "model": {"source": "layers", "layers": [{"Linear": [3, 2]}]},
        "data": {"source": "synthetic", "inputs": {"x": {"shape": [3]}}, "samples": 64},
        "run": {"threads": 1},
        "output": {"path": str(tmp_path / "out")},
        "engine": {"source": "ray", **engine},
    }


def test_without_an_address_the_workers_are_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    result = gradrun.infer(_config(tmp_path, workers=1))
    assert [s.text for s in result.interpretation if s.topic == "engine"] == [
        "1 process of 1 thread; no Ray address is set"
    ]


def test_a_missing_library_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"this needs Ray; pip install 'gradrun\[ray\]'"):
        gradrun.infer(_config(tmp_path, address="127.0.0.1:1"))


@pytest.mark.parametrize("address", ["127.0.0.1:9", "ray://127.0.0.1:9"])
def test_an_address_without_a_cluster_is_reported_at_once(address: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"no Ray cluster answers at {address} \(Connection"):
        gradrun.infer(_config(tmp_path, address=address))


class LostActor(Exception):
    """Stands for every error with which Ray reports a lost actor."""


class FakeRay:
    """Ray with one node whose actors never answer, or only with an error."""

    exceptions = types.SimpleNamespace(RayError=LostActor)

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.killed = 0

    def remote(self, worker: type) -> FakeRay:
        return self

    def options(self, **_: Any) -> Any:
        method = types.SimpleNamespace(remote=object)
        return types.SimpleNamespace(
            remote=lambda *_: types.SimpleNamespace(open=method, run=method)
        )

    def wait(self, references: list[object], **_: Any) -> tuple[list[object], list[object]]:
        return (references[:1], []) if self.error else ([], references)

    def get(self, reference: object) -> bytes:
        assert self.error
        raise self.error

    def kill(self, handle: object) -> None:
        self.killed += 1

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": {"CPU": 4.0}}]

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 4.0, "GPU": 1.0}

    def available_resources(self) -> dict[str, float]:
        return {"CPU": 1.0}


def _engine(ray: FakeRay, workers: int) -> RayEngine:
    section = RaySection(source="ray", workers=workers, cpus=2)
    opening = Open(config={"run": {"threads": 2}}, trust_code=False)
    engine = RayEngine(ray, opening, section, workers)
    engine.start(workers)
    return engine


def test_without_room_for_any_worker_the_run_ends_with_the_figures_of_the_cluster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = _engine(FakeRay(), 4)
    assert engine.next(0) is None, "it waits"
    monkeypatch.setattr("gradrun.engines.ray._ROOM_SECONDS", -1.0)
    event = engine.next(0)
    assert event
    assert isinstance(event[1], Failed)
    error = start_error(*event)
    assert error.resumable
    assert str(error).endswith(
        "0 of 4 workers; the cluster has 1 node, 1 of 4 CPUs free, 0 of 1 GPUs free"
    )


def test_an_error_of_ray_is_the_loss_of_the_worker_and_its_actor_is_killed() -> None:
    ray = FakeRay()
    engine = _engine(ray, 2)
    ray.error = LostActor("The node\n  died")
    assert engine.next(0) == (1, Lost("was lost (LostActor: The node died)"))
    assert ray.killed == 1


def test_a_node_that_does_not_answer_is_reported_without_internal_numbers() -> None:
    ray = FakeRay()
    engine = _engine(ray, 2)
    ray.error = type("ActorUnavailableError", (LostActor,), {})("The actor 64b82e is unavailable")
    assert engine.next(0) == (1, Lost("was lost (its node or process does not answer)"))


def test_superfluous_workers_are_killed() -> None:
    ray = FakeRay()
    assert set(_engine(ray, 5).keep(2)) == {1, 2}
    assert ray.killed == 3
