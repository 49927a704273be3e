"""The allocator setting: applied, restored, stated, and without effect on predictions."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import gradrun
from gradrun.config.run import RunSection
from gradrun.inference import allocator
from gradrun.inference.device import device_context
from gradrun.inference.environment import current_environment

glibc = pytest.mark.skipif(
    bool(allocator.describe_obstacle()), reason="this process does not use glibc's malloc"
)

# Allocates and frees 8 MiB blocks, touching every page, and counts the pages that the kernel maps.
_FAULTS = """
import ctypes, resource, sys
from gradrun.inference.allocator import allocator_settings
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
def batch():
    blocks = [libc.malloc(ctypes.c_size_t(2**26)) for _ in range(2)]
    for block in blocks:
        ctypes.memset(block, 1, 2**26)
    for block in blocks:
        libc.free(ctypes.c_void_p(block))
with allocator_settings(sys.argv[1]):
    batch()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    batch()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    import psutil
    retained = psutil.Process().memory_info().rss
print(retained - psutil.Process().memory_info().rss)
"""


def _run(code: str, *args: str, **variables: str) -> list[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", code, *args],
        env=environment | variables, check=True, capture_output=True, text=True,
    )  # fmt: skip
    return done.stdout.split()


@glibc
def test_retained_memory_is_not_mapped_again_and_is_returned_at_the_end() -> None:
    faults, returned = map(int, _run(_FAULTS, "retain"))
    assert faults < 1_000
    assert returned > 2**26  # of the 2 x 64 MiB


@glibc
def test_the_system_allocator_maps_the_pages_again() -> None:
    faults, _ = map(int, _run(_FAULTS, "system"))
    # 128 MiB in pages of 4 KiB, or of 2 MiB where the kernel uses huge pages.
    assert faults >= 2**27 // 2**21


_DESCRIBE = """
from gradrun.inference.allocator import allocator_settings, current_allocator
with allocator_settings("retain"):
    print(current_allocator())
"""


@glibc
@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"])
def test_a_variable_of_the_user_wins(name: str) -> None:
    assert _run(_DESCRIBE, **{name: "131072"}) == ["system", f"({name})"]


@glibc
def test_tunables_of_malloc_win_over_the_config() -> None:
    tunables = "glibc.malloc.trim_threshold=131072"
    assert _run(_DESCRIBE, GLIBC_TUNABLES=tunables) == ["system", "(GLIBC_TUNABLES)"]


@glibc
def test_another_malloc_is_left_alone(tmp_path: Path) -> None:
    """A library whose malloc calls that of glibc stands for jemalloc or tcmalloc."""
    compiler = ["cc", "-shared", "-fPIC", "-o", str(tmp_path / "libother.so"), "-xc", "-"]
    code = "#include <stddef.h>\nvoid *__libc_malloc(size_t);\n"
    code += "void *malloc(size_t n) { return __libc_malloc(n); }\n"
    try:
        subprocess.run(compiler, input=code, text=True, check=True, capture_output=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        pytest.skip("no C compiler")
    assert _run(_DESCRIBE, LD_PRELOAD=str(tmp_path / "libother.so")) == ["system", "(libother.so)"]


def test_an_unknown_malloc_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr(allocator, "_malloc_library", lambda: "libjemalloc.so.2")
    monkeypatch.setattr(allocator, "_retain", lambda: called.append(1))
    monkeypatch.setattr(sys, "platform", "linux")
    with allocator.allocator_settings("retain"):
        assert allocator.current_allocator() == "system (libjemalloc.so.2)"
    assert not called


@glibc
def test_nested_settings_release_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(allocator, "_retain", lambda: calls.append("retain"))
    monkeypatch.setattr(allocator, "_release", lambda: calls.append("release"))
    with allocator.allocator_settings("retain"):
        with allocator.allocator_settings("retain"):
            pass
        assert calls == ["retain", "retain"]
        assert allocator.current_allocator() == "retain"
    assert calls == ["retain", "retain", "release"]
    assert allocator.current_allocator() == "system"


@glibc
def test_older_versions_of_glibc_get_the_largest_threshold_that_they_accept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    accepted: list[tuple[int, int]] = []

    class Process:
        def mallopt(self, parameter: int, value: int) -> int:
            if parameter == -3 and value > 2**25:
                return 0
            accepted.append((parameter, value))
            return 1

    monkeypatch.setattr(ctypes, "CDLL", lambda _: Process())
    allocator._retain()
    assert (-3, 2**25) in accepted


@glibc
def test_the_environment_states_the_allocator() -> None:
    for setting in ("retain", "system"):
        with device_context(RunSection(device="cpu", allocator=setting)) as device:
            assert current_environment(device).allocator == setting


def test_both_settings_give_the_same_bytes_and_a_resume_accepts_either(tmp_path: Path) -> None:
    config = {
        "model": {"source": "layers", "layers": [{"Linear": [16, 4]}]},
        "data": {
            "source": "synthetic", "inputs": {"x": {"shape": [16]}}, "samples": 64, "batch_size": 8,
        },
        "output": {"path": str(tmp_path / "out")},
    }  # fmt: skip
    gradrun.infer(config, run={"allocator": "retain"})
    retained = (tmp_path / "out" / "predictions.npy").read_bytes()
    again = gradrun.infer(config, resume=True, run={"allocator": "system"})
    assert again.predictions == 64
    gradrun.infer(config, overwrite=True, run={"allocator": "system"})
    assert (tmp_path / "out" / "predictions.npy").read_bytes() == retained
    saved = json.loads((tmp_path / "out" / "result.json").read_text())
    assert saved["environment"]["allocator"].startswith("system")
