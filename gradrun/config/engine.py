"""The `engine` section: how a run is spread over worker processes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from gradrun.config.base import Section

Workers = Literal["auto"] | Annotated[int, Field(gt=0, le=10_000)]


class _Engine(Section):
    timeout: Annotated[float, Field(gt=0, le=86_400)] | None = Field(
        None,
        description="seconds for one range of samples before its worker is killed; default: 20 "
        "times the usual, at least 60",
    )
    mixed: Literal["refuse", "allow"] = Field(
        "refuse", description="workers with other hardware or versions, which change last digits"
    )


class ProcessesEngine(_Engine):
    """Worker processes on this machine."""

    source: Literal["processes"]
    workers: Workers = Field(
        "auto",
        description="number of processes; auto: one per GPU, or on CPUs as many as a short "
        "measurement shows to pay",
    )


class RayEngine(_Engine):
    """Actors on a Ray cluster, which runs code of anyone who reaches its ports."""

    source: Literal["ray"]
    address: str | None = Field(
        None,
        description="head of the cluster, or auto; default: RAY_ADDRESS, else a local cluster",
    )
    workers: Workers = Field("auto", description="number of actors; auto: all that have room")
    cpus: Annotated[int, Field(gt=0, le=4096)] = Field(1, description="CPUs of each worker")
    gpus: Annotated[float, Field(ge=0, le=64)] = Field(0, description="GPUs of each worker")


EngineConfig = Annotated[ProcessesEngine | RayEngine, Field(discriminator="source")]
