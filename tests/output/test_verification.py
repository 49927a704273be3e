"""Verification passes undamaged files and reports each kind of damage."""

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
from gradrun.output.class_labels import DEFAULT_OUTPUT
from gradrun.output.formats import FORMATS, open_writer, sharded_writer
from gradrun.output.journal import CommittedRange, Journal, JournalHeader
from gradrun.output.verification import damaged_ranges, verify
from tests.conftest import ROOT, Command

SAMPLES, BATCH = 40, 4
FORMS = [form for form in FORMATS if form != "files"]
SHARDED = {"safetensors", "parquet"}


def run(
    folder: Path, form: str, *, until: int = SAMPLES, close: bool = True, outputs: int = 1
) -> journal.JournalState:
    """A folder with a commit for every second batch, and its journal."""
    folder.mkdir(exist_ok=True)
    writer = open_writer(OutputSection(path=folder, format=form), SAMPLES)
    values = torch.randn(SAMPLES, 3)
    named = {DEFAULT_OUTPUT: values} if outputs == 1 else {"b": values, "a": values.long()}
    head = JournalHeader(gradrun="0", samples=SAMPLES, config={}, files={})
    lines = Journal(folder / "journal.jsonl", head)
    writer.open({name: tensor[:BATCH] for name, tensor in named.items()})
    for start in range(0, until, BATCH):
        writer.write(
            {name: tensor[start : start + BATCH] for name, tensor in named.items()},
            range(start, start + BATCH),
        )
        if start % (2 * BATCH):
            record(lines, writer.commit())
    if close:
        record(lines, writer.close())
    lines.close()
    return journal.read(folder / "journal.jsonl")


def record(lines: Journal, ranges: list[CommittedRange]) -> None:
    for committed in ranges:
        lines.append(committed)


@pytest.fixture(params=["one part", "many parts"])
def _parts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "many parts":
        monkeypatch.setattr(sharded_writer, "SHARD_BYTES", 11 * 12)
        monkeypatch.setattr(sharded_writer, "ID_BYTES", 0)


@pytest.mark.usefixtures("_parts")
@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("until", [SAMPLES, 24, 8])
@pytest.mark.parametrize("close", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_undamaged_ranges_are_verified(
    tmp_path: Path, form: str, until: int, close: bool, outputs: int
) -> None:
    state = run(tmp_path, form, until=until, close=close, outputs=outputs)
    if close or form not in SHARDED:
        assert state.committed == until
        assert form in SHARDED or len(state.ranges) >= until // (2 * BATCH)
    assert list(damaged_ranges(tmp_path, state)) == []


@pytest.mark.parametrize(
    ("form", "close"), [(f, c) for f in FORMS for c in (True, False) if c or f not in SHARDED]
)
@pytest.mark.parametrize("at", [0.15, 0.5, 0.95])
def test_a_changed_byte_is_reported_with_its_range(
    tmp_path: Path, form: str, close: bool, at: float
) -> None:
    state = run(tmp_path, form, close=close)
    (file,) = (path for path in tmp_path.rglob("predictions*") if path.is_file())
    data = bytearray(file.read_bytes())
    body = 128 if form == "npy" else len(data) - SAMPLES * 12 if form == "safetensors" else 0
    offset = body + int(at * (len(data) - body))
    data[offset] ^= 1
    file.write_bytes(data)
    if form == "parquet":  # compressed: a byte may affect many rows, or none
        assert all(damage.problem for damage in damaged_ranges(tmp_path, state))
        return
    (damage,) = damaged_ranges(tmp_path, state)
    assert damage.problem == "the checksum differs"
    if form != "jsonl":
        assert damage.start <= at * SAMPLES < damage.stop


@pytest.mark.parametrize("form", FORMS)
def test_a_truncated_or_missing_file_is_reported(tmp_path: Path, form: str) -> None:
    state = run(tmp_path, form)
    (file,) = (path for path in tmp_path.rglob("predictions*") if path.is_file())
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * 0.8)])
    problem = (
        "the file is damaged"
        if form == "parquet"
        else "the file is shorter than its committed range"
    )
    assert {damage.problem for damage in damaged_ranges(tmp_path, state)} == {problem}
    file.unlink()
    gone = list(damaged_ranges(tmp_path, state))
    assert len(gone) == len(state.ranges)
    assert {damage.problem for damage in gone} == {"No such file or directory"}


def test_missing_pyarrow_is_an_error_and_not_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = run(tmp_path, "parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match="this needs pyarrow"):
        list(damaged_ranges(tmp_path, state))


def test_a_changed_parquet_row_is_reported_with_its_range(tmp_path: Path) -> None:
    state = run(tmp_path, "parquet")
    (file,) = (path for path in tmp_path.rglob("predictions*") if path.is_file())
    table = parquet.read_table(file)
    ids = [-1 if i == 21 else i for i in range(SAMPLES)]
    parquet.write_table(table.set_column(0, "id", [ids]), file)
    (damage,) = damaged_ranges(tmp_path, state)
    assert damage.start <= 21 < damage.stop
    assert damage.problem == "the checksum differs"


@pytest.mark.parametrize("form", ["npy", "safetensors", "parquet"])
@pytest.mark.parametrize("junk", [b"", b"junk", b"\xff" * 200])
def test_a_file_of_another_format_is_reported_as_damaged(
    tmp_path: Path, form: str, junk: bytes
) -> None:
    state = run(tmp_path, form)
    (file,) = (path for path in tmp_path.rglob("predictions*") if path.is_file())
    file.write_bytes(junk)
    assert len(list(damaged_ranges(tmp_path, state))) == len(state.ranges)


# --- the command -------------------------------------------------------------------------------


def test_a_complete_run_passes(cli: Command, tmp_path: Path) -> None:
    run(tmp_path, "npy")
    answer = cli("verify", tmp_path, "--json", tmp_path / "v.json")
    assert (answer.code, answer.err) == (0, "")
    assert "40 of 40 samples verified" in " ".join(answer.out.split())
    assert json.loads((tmp_path / "v.json").read_text())["complete"] is True


def test_an_unfinished_run_suggests_a_resume(cli: Command, tmp_path: Path) -> None:
    run(tmp_path, "jsonl", until=16)
    answer = cli("verify", tmp_path)
    assert answer.code == 3
    text = " ".join(answer.out.split())
    assert "unfinished, 16 of 40 samples verified; to resume: infer --resume" in text


def test_an_unfinished_run_of_journal_format_1_does_not_suggest_a_resume(cli: Command) -> None:
    answer = cli("verify", ROOT / "tests" / "golden" / "journal-format-1" / "jsonl")
    assert answer.code == 3
    text = " ".join(answer.out.split())
    assert "unfinished, 16 of 23 samples verified; this version cannot resume it" in text
    assert "--overwrite" in text
    assert "--resume" not in text


def test_damage_is_reported_with_samples_and_file(cli: Command, tmp_path: Path) -> None:
    run(tmp_path, "npy")
    with (tmp_path / "predictions.npy").open("r+b") as file:
        file.seek(-5, 2)
        file.write(b"x")
    answer = cli("verify", tmp_path)
    assert answer.code == 3
    assert "samples 32 to 39 in predictions.npy: the checksum differs" in answer.out
    assert "1 range damaged" in " ".join(answer.out.split())  # a long path wraps the line
    assert verify(tmp_path).damaged[0].start == 32


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]\n", b'{"journal": 2}\n'])
def test_an_unreadable_journal_is_an_error_in_one_sentence(
    cli: Command, tmp_path: Path, content: Any
) -> None:
    if content is not None:
        (tmp_path / "journal.jsonl").write_bytes(content)
    answer = cli("verify", tmp_path)
    assert answer.code == (2 if content is None else 1)
    assert answer.err.startswith("error: ")
    assert "Traceback" not in answer.text


def test_verification_does_not_import_torch(tmp_path: Path) -> None:
    run(tmp_path / "run", "safetensors")
    code = (
        "import sys; from gradrun.output.verification import verify; "
        f"assert verify({str(tmp_path / 'run')!r}).complete; print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "False"
