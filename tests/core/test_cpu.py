"""The number of processors that a process may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gradrun.core import cpu
from gradrun.core.cpu import available_cpus


@pytest.fixture
def cgroup(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Files below /sys/fs/cgroup, by name, on 8 processors; the process is in slice/job."""
    files: dict[str, str] = {}

    def read(path: Path) -> str:
        if path == Path("/proc/self/cgroup"):
            return "0::/slice/job\n"
        try:
            return files[str(path.relative_to("/sys/fs/cgroup"))]
        except KeyError:
            raise FileNotFoundError(path) from None

    monkeypatch.setattr(Path, "read_text", read)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    return files


V1_QUOTA, V1_PERIOD = "cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({}, 8),
        ({"cpu.max": "max 100000\n"}, 8),
        ({"cpu.max": "200000 100000\n"}, 2),
        ({"cpu.max": "150000 100000\n"}, 1),
        ({"slice/job/cpu.max": "400000 100000\n", "cpu.max": "max 100000\n"}, 4),
        ({"slice/job/cpu.max": "400000 100000\n", "slice/cpu.max": "300000 100000\n"}, 3),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "1600000 100000\n"}, 8),
        ({"cpu.max": "garbage\n"}, 8),
        ({"cpu.max": "\n"}, 8),
        ({V1_QUOTA: "-1\n", V1_PERIOD: "100000\n"}, 8),
        ({V1_QUOTA: "300000\n", V1_PERIOD: "100000\n"}, 3),
        ({V1_QUOTA: "300000\n"}, 8),
    ],
)
def test_a_cgroup_quota_limits_the_processors(
    cgroup: dict[str, str], files: dict[str, str], cpus: int
) -> None:
    cgroup.update(files)
    assert available_cpus() == cpus


@pytest.mark.parametrize(
    ("variables", "threads", "reason"),
    [
        ({}, 6, ""),
        ({"OMP_NUM_THREADS": "3"}, 3, "OMP_NUM_THREADS"),
        ({"OMP_NUM_THREADS": "3,2"}, 3, "OMP_NUM_THREADS"),
        ({"MKL_NUM_THREADS": " 2 "}, 2, "MKL_NUM_THREADS"),
        ({"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "2"}, 1, "OMP_NUM_THREADS"),
        ({"OMP_NUM_THREADS": "many", "MKL_NUM_THREADS": "2"}, 2, "MKL_NUM_THREADS"),
        ({"OMP_NUM_THREADS": "0"}, 6, ""),
        ({"OMP_NUM_THREADS": "-1"}, 6, ""),
        ({"OMP_NUM_THREADS": ""}, 6, ""),
        ({"OMP_NUM_THREADS": "100000"}, 6, ""),
    ],
)
def test_variables_of_openmp_and_mkl_set_the_automatic_number_of_threads(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], threads: int, reason: str
) -> None:
    monkeypatch.setattr(cpu, "available_cpus", lambda: 6)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert (cpu.thread_count("auto"), cpu.thread_variable()) == (threads, reason)
    assert cpu.thread_count(5) == 5
