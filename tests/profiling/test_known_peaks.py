"""The cache of peaks, and the sentence of infer and compare that uses it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import gradrun
from gradrun.comparison import benchmark
from gradrun.inference.environment import current_machine
from gradrun.profiling import peaks as the_peaks
from gradrun.profiling.peaks import kept_peaks, measure_peaks, thread_counts
from gradrun.results.peaks_cache import cache_path, cached_peaks, load_peaks, save_peaks
from gradrun.results.result import SystemNoise
from gradrun.results.work import MachinePeaks
from tests.comparison.test_benchmark import job
from tests.conftest import Command
from tests.support.profile_results import PEAKS
from tests.support.workers import keep_gc_unfrozen

CPU = torch.device("cpu")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRADRUN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Replace the measurement of peaks; return its calls and the noise that it reports."""

    class Stub:
        calls: list[int] = []  # noqa: RUF012 - one list per fixture
        noise = SystemNoise()

    def measure(device: torch.device, threads: int, progress: Any) -> Any:
        Stub.calls.append(threads)
        return PEAKS.replace(threads=threads), Stub.noise

    monkeypatch.setattr(the_peaks, "measure_peaks", measure)
    return Stub


def ignore(_: Any) -> None:
    pass


def test_peaks_are_measured_once_and_read_from_the_cache(cache: Path, stub: Any) -> None:
    assert kept_peaks(CPU, 2, ignore) == (PEAKS, [])
    assert kept_peaks(CPU, 1, ignore)[0].threads == 1
    assert kept_peaks(CPU, 2, ignore) == (PEAKS, [])
    assert stub.calls == [2, 1]
    assert kept_peaks(CPU, 2, ignore, again=True) == (PEAKS, [])
    assert stub.calls == [2, 1, 2]
    assert [one.threads for one in load_peaks(current_machine(CPU))] == [1, 2]


def test_peaks_measured_beside_other_programs_are_not_kept(cache: Path, stub: Any) -> None:
    stub.noise = SystemNoise(others=0.5)
    found, warnings = kept_peaks(CPU, 2, ignore)
    assert found == PEAKS
    assert [w.code for w in warnings] == ["noisy_peaks"]
    assert not cache.exists()


def test_a_cache_that_cannot_be_written_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stub: Any
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GRADRUN_CACHE", str(tmp_path / "file" / "cache"))
    _, warnings = kept_peaks(CPU, 2, ignore)
    assert [w.code for w in warnings] == ["peaks_not_kept"]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"format": 2}', '{"format": 1, "machine": {}, "peaks": []}', "\x00"]
)
def test_a_damaged_cache_counts_as_empty(cache: Path, text: str) -> None:
    machine = current_machine(CPU)
    cache.mkdir()
    cache_path(machine).write_text(text)
    assert load_peaks(machine) == ()
    assert save_peaks(machine, PEAKS)
    assert cached_peaks(machine, 2) == PEAKS
    assert cached_peaks(machine, 3) is None


def test_impossible_peaks_in_the_cache_are_ignored(cache: Path) -> None:
    machine = current_machine(CPU)
    save_peaks(machine, PEAKS)
    path = cache_path(machine)
    path.write_text(path.read_text().replace("21400000000.0", "-1.0"))
    assert load_peaks(machine) == ()


def test_another_processor_or_version_has_another_file(cache: Path) -> None:
    machine = current_machine(CPU)
    others = [machine.replace(**{name: "x"}) for name in ("cpu", "torch", "instructions")]
    assert len({cache_path(one) for one in (machine, *others)}) == 4


def test_the_cache_is_below_the_users_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = current_machine(CPU)
    monkeypatch.delenv("GRADRUN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/tmp/some")
    assert cache_path(machine).parent == Path("/tmp/some/gradrun")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_path(machine).parent == Path.home() / ".cache" / "gradrun"


def test_thread_counts_are_powers_of_two_up_to_the_processors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for cpus, expected in ((1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])):
        monkeypatch.setattr(the_peaks, "available_cpus", lambda cpus=cpus: cpus)
        assert thread_counts() == expected


def test_measured_peaks_are_the_rates_of_products_and_copies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in {
        "_SIZES": (16, 32),
        "_SECONDS": 0.001,
        "_TRIAL_SECONDS": 0.001,
        "_COPY_BYTES": 1 << 16,
        "DTYPES": (torch.float32, torch.bfloat16),
    }.items():
        monkeypatch.setattr(the_peaks, name, value)
    threads = torch.get_num_threads()
    found, _ = measure_peaks(CPU, 1)
    assert [peak.dtype for peak in found.products] == ["float32", "bfloat16"]
    assert all(0 < peak.rate < 1e15 for peak in found.products)
    assert all(peak.size in (16, 32) for peak in found.products)
    assert found.copy > 0
    assert torch.get_num_threads() == threads


def test_a_type_that_the_device_lacks_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"_SIZES": (4,), "_SECONDS": 0.0, "_COPY_BYTES": 1 << 12}.items():
        monkeypatch.setattr(the_peaks, name, value)
    monkeypatch.setattr(the_peaks, "DTYPES", (torch.float32, torch.quint8))
    found, _ = measure_peaks(CPU, 1)
    assert [peak.dtype for peak in found.products] == ["float32"]


# --- infer and compare -------------------------------------------------------------------------


def mlp(tmp_path: Path, **data: Any) -> dict[str, Any]:
    return {
        "model": {"source": "zoo", "name": "mlp", "args": {"width": 16, "depth": 2}},
        "data": {
            "source": "synthetic",
            "inputs": {"x": {"shape": [16]}},
            "samples": 42,
            "batch_size": 4,
            **data,
        },
        "run": {"threads": 1, "warmup": 1},
        "output": {"path": str(tmp_path / "run")},
    }


def keep(threads: int = 1) -> MachinePeaks:
    peaks = PEAKS.replace(threads=threads)
    assert save_peaks(current_machine(CPU), peaks)
    return peaks


def test_infer_states_the_share_of_the_peak_if_it_is_cached(tmp_path: Path, cache: Path) -> None:
    peaks = keep()
    (measured,) = gradrun.infer(mlp(tmp_path)).measurements
    assert measured.work is not None
    assert measured.work.total_flops == 2 * (2 * 4 * 16 * 16)
    assert measured.peaks == peaks
    full = [s for s, n in zip(measured.batch_seconds, measured.batch_sizes, strict=True) if n == 4]
    assert len(full) == 10, "the last batch of two samples does less work"
    rate = 2 * (2 * 4 * 16 * 16) / sorted(full)[4:6][0]
    assert measured.reach.startswith(
        f"forward reaches {rate / 212e9:.0%} of this machine's float32"
    )
    report = (tmp_path / "run" / "result.json").read_text()
    assert '"peaks": {' in report


def test_infer_without_cached_peaks_counts_nothing(tmp_path: Path, cache: Path) -> None:
    keep(threads=2)
    (measured,) = gradrun.infer(mlp(tmp_path)).measurements
    assert (measured.work, measured.peaks, measured.reach) == (None, None, "")
    assert not [one for one in cache.iterdir() if "tmp" in one.name]


def test_infer_prints_the_sentence_below_its_times(
    tmp_path: Path, cache: Path, cli: Command
) -> None:
    import yaml

    keep()
    path = tmp_path / "mlp.yaml"
    path.write_text(yaml.safe_dump(mlp(tmp_path)))
    answer = cli("infer", path)
    assert "of this machine's float32 peak" in " ".join(answer.out.split())


def test_a_model_that_cannot_be_counted_runs_all_the_same(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep()

    def fails(*_: Any) -> Any:
        raise TypeError("no")

    monkeypatch.setattr("gradrun.inference.meters.work.forward_work", fails)
    result = gradrun.infer(mlp(tmp_path))
    assert result.measurements[0].work is None
    assert result.predictions == 42


def test_compare_states_the_share_of_its_fastest_variant(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_gc_unfrozen(monkeypatch)
    keep()
    found = benchmark.run_task(job(tmp_path, "grad", "no_grad")).measurements
    assert [m.work.total_flops for m in found if m.work] == [2 * 8 * 4 * 4] * 2
    assert all(m.reach for m in found)


# --- the command -------------------------------------------------------------------------------


def test_machine_measures_each_number_of_threads_and_shows_them(
    cache: Path, stub: Any, cli: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(the_peaks, "available_cpus", lambda: 2)
    answer = cli("profile", "--machine", "--json", "-")
    assert answer.code == 0, answer.text
    assert '"rate": 212000000000.0' in answer.out
    assert stub.calls == [1, 2]
    shown = cli("profile", "--machine").out
    for text in ("1 thread ", "2 threads", "float32", "bfloat16", "212", "21.4", "kept in"):
        assert text in shown
