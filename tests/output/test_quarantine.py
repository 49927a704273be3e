"""The file of quarantined samples."""

from __future__ import annotations

from pathlib import Path

from gradrun.output.quarantine import Quarantine, quarantined_positions


def test_a_file_is_created_with_the_first_sample(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path)
    quarantine.truncate(0)
    assert not quarantine.path.exists()
    assert quarantined_positions(tmp_path) == set()
    quarantine.add(3, "c", "ValueError: too long", "Traceback ...")
    quarantine.add(7, 7, "OSError", "")
    assert quarantine.count == 2
    assert quarantined_positions(tmp_path) == {3, 7}


def test_a_resume_removes_later_and_damaged_entries(tmp_path: Path) -> None:
    first = Quarantine(tmp_path)
    for sample in (3, 12, 7):  # grouped batches are not in input order
        first.add(sample, sample, "error", "")
    with first.path.open("a") as file:
        file.write('[1]\n{"sample": 1')  # such as after a full disk
    assert quarantined_positions(tmp_path) == {3, 12, 7}
    resumed = Quarantine(tmp_path)
    resumed.truncate(8)
    assert resumed.count == 2
    assert quarantined_positions(tmp_path) == {3, 7}
