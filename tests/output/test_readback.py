"""A run's files against its journal: whole files pass, and each kind of damage is found."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pyarrow import parquet

from gradrun.config.output import OutputSection
from gradrun.core.errors import ConfigError
from gradrun.output import journal
from gradrun.output.formats import WRITERS, open_writer, sharded_writer
from gradrun.output.journal import Journal, JournalHeader
from gradrun.output.readback import faults
from gradrun.output.transforms import DEFAULT_OUTPUT
from gradrun.output.verification import verify
from tests.conftest import ROOT, Command

SAMPLES, BATCH = 40, 4
FORMS = list(WRITERS)


def run(
    folder: Path, form: str, *, until: int = SAMPLES, close: bool = True, outputs: int = 1
) -> journal.JournalState:
    """A folder with a commit for every second batch, and its journal."""
    folder.mkdir(exist_ok=True)
    sink = open_writer(OutputSection(path=folder, format=form), SAMPLES)
    values = torch.randn(SAMPLES, 3)
    named = {DEFAULT_OUTPUT: values} if outputs == 1 else {"b": values, "a": values.long()}
    head = JournalHeader(gradrun="0", samples=SAMPLES, config={}, files={})
    lines = Journal(folder / "journal.jsonl", head)
    sink.open({name: tensor[:BATCH] for name, tensor in named.items()})
    for start in range(0, until, BATCH):
        sink.write(
            {name: tensor[start : start + BATCH] for name, tensor in named.items()},
            range(start, start + BATCH),
        )
        if start % (2 * BATCH):
            lines.add(sink.commit())
    if close:
        lines.add(sink.close())
    lines.close()
    return journal.read(folder / "journal.jsonl")


@pytest.fixture(params=["one part", "many parts"])
def _parts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "many parts":
        monkeypatch.setattr(sharded_writer, "PART_BYTES", 11 * 12)
        monkeypatch.setattr(sharded_writer, "ID_BYTES", 0)


@pytest.mark.usefixtures("_parts")
@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("until", [SAMPLES, 24, 8])
@pytest.mark.parametrize("close", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_what_was_committed_reads_back(
    tmp_path: Path, form: str, until: int, close: bool, outputs: int
) -> None:
    kept = run(tmp_path, form, until=until, close=close, outputs=outputs)
    assert kept.stop == until
    assert len(kept.commits) >= until // (2 * BATCH)
    assert list(faults(tmp_path, kept)) == []


@pytest.mark.parametrize("close", [True, False])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("at", [0.15, 0.5, 0.95])
def test_a_changed_byte_is_found_in_its_range(
    tmp_path: Path, form: str, close: bool, at: float
) -> None:
    kept = run(tmp_path, form, close=close)
    (file,) = tmp_path.glob("predictions*")
    data = bytearray(file.read_bytes())
    body = 128 if form == "npy" else len(data) - SAMPLES * 12 if form == "safetensors" else 0
    place = body + int(at * (len(data) - body))
    data[place] ^= 1
    file.write_bytes(data)
    if form == "parquet":  # packed: a byte may stand for many rows, or for none
        assert all(fault.what for fault in faults(tmp_path, kept))
        return
    (fault,) = faults(tmp_path, kept)
    assert fault.what == "its checksum differs"
    if form != "jsonl":
        assert fault.start <= at * SAMPLES < fault.stop


@pytest.mark.parametrize("form", FORMS)
def test_a_file_that_is_cut_off_or_gone_is_found(tmp_path: Path, form: str) -> None:
    kept = run(tmp_path, form)
    (file,) = tmp_path.glob("predictions*")
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * 0.8)])
    said = "the file is damaged" if form == "parquet" else "the file is cut off"
    assert {fault.what for fault in faults(tmp_path, kept)} == {said}
    file.unlink()
    gone = list(faults(tmp_path, kept))
    assert len(gone) == len(kept.commits)
    assert {fault.what for fault in gone} == {"No such file or directory"}


def test_where_pyarrow_is_missing_verify_says_so_and_nothing_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = run(tmp_path, "parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match="this needs pyarrow"):
        list(faults(tmp_path, kept))


def test_a_changed_row_of_parquet_is_found_in_its_range(tmp_path: Path) -> None:
    kept = run(tmp_path, "parquet")
    (file,) = tmp_path.glob("predictions*")
    table = parquet.read_table(file)
    ids = [-1 if i == 21 else i for i in range(SAMPLES)]
    parquet.write_table(table.set_column(0, "id", [ids]), file)
    (fault,) = faults(tmp_path, kept)
    assert fault.start <= 21 < fault.stop
    assert fault.what == "its checksum differs"


@pytest.mark.parametrize("form", ["npy", "safetensors", "parquet"])
@pytest.mark.parametrize("junk", [b"", b"junk", b"\xff" * 200])
def test_a_file_of_another_kind_is_a_fault_and_no_traceback(
    tmp_path: Path, form: str, junk: bytes
) -> None:
    kept = run(tmp_path, form)
    (file,) = tmp_path.glob("predictions*")
    file.write_bytes(junk)
    assert len(list(faults(tmp_path, kept))) == len(kept.commits)


# --- the command -------------------------------------------------------------------------------


def test_a_whole_run_passes(cli: Command, tmp_path: Path) -> None:
    run(tmp_path, "npy")
    answer = cli("verify", tmp_path, "--json", tmp_path / "v.json")
    assert (answer.code, answer.err) == (0, "")
    assert "40 of 40 samples are there and whole" in " ".join(answer.out.split())
    assert json.loads((tmp_path / "v.json").read_text())["complete"] is True


def test_an_unfinished_run_says_how_to_go_on(cli: Command, tmp_path: Path) -> None:
    run(tmp_path, "jsonl", until=16)
    answer = cli("verify", tmp_path)
    assert answer.code == 3
    text = " ".join(answer.out.split())
    assert "unfinished, 16 of 40 samples are there and whole; infer --resume goes on" in text


def test_damage_names_samples_and_file(cli: Command, tmp_path: Path) -> None:
    run(tmp_path, "npy")
    with (tmp_path / "predictions.npy").open("r+b") as file:
        file.seek(-5, 2)
        file.write(b"x")
    answer = cli("verify", tmp_path)
    assert answer.code == 3
    assert "samples 32 to 39 in predictions.npy: its checksum differs" in answer.out
    assert "1 range damaged" in " ".join(answer.out.split())  # a long path wraps the line
    assert verify(tmp_path).faults[0].start == 32


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]\n", b'{"journal": 2}\n'])
def test_without_a_journal_that_can_be_read_it_is_one_sentence(
    cli: Command, tmp_path: Path, content: Any
) -> None:
    if content is not None:
        (tmp_path / "journal.jsonl").write_bytes(content)
    answer = cli("verify", tmp_path)
    assert answer.code == (2 if content is None else 1)
    assert answer.err.startswith("error: ")
    assert "Traceback" not in answer.text


def test_it_needs_no_torch(tmp_path: Path) -> None:
    run(tmp_path / "run", "safetensors")
    code = (
        "import sys; from gradrun.output.verification import verify; "
        f"assert verify({str(tmp_path / 'run')!r}).complete; print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "False"
