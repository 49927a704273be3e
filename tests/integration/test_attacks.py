"""Malicious files and folders are read or are an error, without side effects."""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import struct
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from gradrun.config.data import ArraysData
from gradrun.core.errors import GradrunError
from gradrun.data import open_data
from gradrun.output.verification import verify
from gradrun.report import terminal
from gradrun.report.document import describe, describe_verification
from gradrun.results.result import RunResult
from tests.integration.test_properties import mutate
from tests.soak.fuzz import Fuzzer, config, lay_out
from tests.soak.victim import Victim
from tests.support import run_results as results
from tests.support.attack_files import KINDS_OF_ATTACK, Attack, npy

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")

SECONDS = 30.0
FUZZED = 88


@pytest.fixture(scope="module")
def victim() -> Iterator[Victim]:
    victim = Victim()
    yield victim
    victim.close()


def files_outside(folder: Path) -> dict[str, object]:
    """Return the files outside of `out`: their bytes, or their size if they are large."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_relative_to(folder / "out"):
            size = path.stat().st_size
            found[str(path)] = path.read_bytes() if size < 2**20 else size
    return found


def check(attack: Attack, folder: Path, victim: Victim) -> None:
    (folder / "precious").write_text("what is not the attacker's")
    attack.lay_out(folder)
    before = files_outside(folder)
    ending = victim.run(folder, list(attack.commands), SECONDS)
    said = " ".join(ending.output.split())
    assert not ending.wrong, "\n".join(ending.wrong)
    told = f"{ending.codes}, wanted {attack.code} and {attack.said!r}\n{ending.output[-600:]}"
    assert (ending.codes[-1], bool(re.search(attack.said, said))) == (attack.code, True), told
    assert len(ending.output) < 2**20
    assert files_outside(folder) == before


@pytest.mark.parametrize("kind", KINDS_OF_ATTACK)
def test_an_attack_is_an_error_or_has_no_effect(kind: str, tmp_path: Path, victim: Victim) -> None:
    failed = []
    for number, (name, attack) in enumerate(KINDS_OF_ATTACK[kind].items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        try:
            check(attack, folder, victim)
        except AssertionError as error:
            failed.append(f"{name}: {error}")
    if failed:
        pytest.fail("\n\n".join(failed), pytrace=False)


def test_the_harness_detects_the_effects_of_an_attack(tmp_path: Path, victim: Victim) -> None:
    harm = "import os, torch\nopen('evil', 'w')\nos.mkdir('evil2')\nos.system('true')\n"
    harm += "bytearray(800 * 2**20)\nprint('\\x1b]0;x\\x07')\nnet = torch.nn.Identity()\n"
    (tmp_path / "m.py").write_text(harm)
    lay_out(tmp_path, config("{source: python, target: 'm.py:net'}") | {"m.py": harm.encode()})
    ending = victim.run(tmp_path, [["infer", "c.yaml", "--trust-code"]])
    said = "\n".join(ending.wrong)
    for wrong in ("open of evil", "os.mkdir of evil2", "os.system", "MiB", "reach the terminal"):
        assert wrong in said


def test_a_crashed_or_hanging_process_is_reported_and_replaced(
    tmp_path: Path, victim: Victim
) -> None:
    for code, message in (
        ("os.abort()", r"ended with -6: (?s:.*)Fatal"),  # after warnings of libraries
        ("[*iter(int, 1)]", "stopped after 2 s"),
    ):
        harm = f"import os, torch\n{code}\nnet = torch.nn.Identity()\n".encode()
        lay_out(tmp_path, config("{source: python, target: 'm.py:net'}") | {"m.py": harm})
        ending = victim.run(tmp_path, [["infer", "c.yaml", "--trust-code"]], 2)
        assert re.search(message, ending.wrong[0])
    lay_out(tmp_path, config())
    assert victim.run(tmp_path, [["infer", "c.yaml"]]).codes == [0]


def test_a_result_is_not_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("what is not the attacker's")
    (tmp_path / "result.json.tmp").symlink_to("precious")
    with pytest.raises(OSError, match="not a regular file"):
        results.run_result().save(tmp_path / "result.json")
    assert (tmp_path / "precious").read_text() == "what is not the attacker's"


# --- damaged files -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory: pytest.TempPathFactory) -> Fuzzer:
    return Fuzzer(tmp_path_factory.mktemp("fuzz"), seed=0)


def test_the_undamaged_files_are_read(fuzzer: Fuzzer, tmp_path: Path, victim: Victim) -> None:
    for kind, seeds in fuzzer.kinds.items():
        lay_out(tmp_path, seeds[-1].files)
        ending = victim.run(tmp_path, seeds[-1].commands)
        assert (ending.codes[-1], ending.wrong) == (0, []), f"{kind}: {ending.output}"


def test_a_damaged_file_is_read_or_is_an_error(
    fuzzer: Fuzzer, victim: Victim, capsys: pytest.CaptureFixture[str]
) -> None:
    tallies = fuzzer.run(range(FUZZED), [victim]).values()
    assert not any(tally.wrong for tally in tallies), capsys.readouterr().out
    read, refused = (sum(getattr(t, name) for t in tallies) for name in ("read", "refused"))
    assert read + refused == FUZZED
    assert FUZZED / 10 < read < FUZZED / 2, "too little or too much damage teaches nothing"


# --- files of a wrong structure (of configs: test_properties.py) -------------------------------

INTS = st.integers(-2, 9) | st.sampled_from([2**16, 2**31, 2**40, 2**62, 2**63, 2**64, -(2**63)])
SHAPES = st.lists(INTS, max_size=5)
TYPES = st.sampled_from("<f4 <f8 >f4 |O |V0 |S0 <U9 |b1 <M8[s] <c8 <f2 | <i33 evil".split())
DTYPES = TYPES.map(repr) | st.sampled_from(["[('a', 'O')]", "[]", "None", "('<f4', (2,))", "{}"])
derandomized = settings(
    max_examples=int(os.environ.get("GRADRUN_EXAMPLES", "60")),
    deadline=None,
    derandomize="GRADRUN_EXAMPLES" not in os.environ,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def read_array(data: bytes, suffix: str) -> None:
    """Open an array and read the batches of a run."""
    with tempfile.TemporaryDirectory() as folder, suppress(GradrunError):
        path = Path(folder, f"x{suffix}")
        path.write_bytes(data)
        opened = open_data(ArraysData(source="arrays", path=path, batch_size=2), seed=0)
        for batch in itertools.islice(opened.batches(), 3):
            assert batch.size <= 2


@derandomized
@given(DTYPES, st.sampled_from(["False", "True", "0", "None"]), SHAPES, st.binary(max_size=64))
def test_any_npy_header_is_read_or_is_an_error(
    descr: str, order: str, shape: list[int], rest: bytes
) -> None:
    read_array(npy(descr, repr(tuple(shape)), rest, order=order), ".npy")


@derandomized
@given(
    st.dictionaries(
        st.sampled_from(["a", "b", "__metadata__", "\x1b[2J"]),
        st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["F32", "BOOL", "F8_E4M3", "X9", 7]),
                "shape": SHAPES,
                "data_offsets": st.lists(INTS | st.just(16), max_size=3),
            }
        )
        | st.dictionaries(st.text(max_size=3), st.text(max_size=3) | st.integers(), max_size=2),
        max_size=3,
    ),
    st.none() | INTS.filter(lambda count: 0 <= count < 2**64),
    st.binary(max_size=64),
)
def test_any_safetensors_header_is_read_or_is_an_error(
    header: dict[str, Any], length: int | None, rest: bytes
) -> None:
    text = json.dumps(header).encode()
    count = len(text) if length is None else length
    read_array(struct.pack("<Q", count) + text + rest, ".safetensors")


@derandomized
@given(st.data())
def test_any_journal_is_read_or_is_an_error(
    run_files: dict[str, dict[str, bytes]], data: st.DataObject
) -> None:
    files = data.draw(st.sampled_from([*run_files.values()]))
    lines = {str(i): json.loads(line) for i, line in enumerate(files["journal.jsonl"].splitlines())}
    for _ in range(data.draw(st.integers(1, 3))):
        mutate(lines, data.draw)
    text = "".join(json.dumps(line) + "\n" for line in lines.values())
    with tempfile.TemporaryDirectory() as name:
        lay_out(Path(name), files | {"journal.jsonl": text.encode()})
        with suppress(GradrunError):
            terminal.show(describe_verification(verify(name)), Console(file=io.StringIO()))


@derandomized
@given(st.data())
def test_any_result_is_shown_or_is_an_error(
    run_files: dict[str, dict[str, bytes]], data: st.DataObject
) -> None:
    result = {"result": json.loads(run_files["npy"]["result.json"])}
    for _ in range(data.draw(st.integers(1, 3))):
        mutate(result, data.draw)
    with tempfile.TemporaryDirectory() as name:
        path = Path(name, "result.json")
        path.write_text(json.dumps(result.get("result")))
        with suppress(GradrunError):
            loaded = RunResult.load(path)
            if loaded.kind == "infer" and loaded.measurements:
                terminal.show(describe(loaded), Console(file=io.StringIO()))


@pytest.fixture(scope="module")
def run_files(fuzzer: Fuzzer) -> dict[str, dict[str, bytes]]:
    """Format -> files of a finished run folder."""
    found = {}
    for seed in fuzzer.kinds["result.json"]:
        files = {n.partition("/")[2]: d for n, d in seed.files.items() if n.startswith("out/")}
        (first,) = {Path(n).suffix for n in files if n.startswith("predictions")}
        found[first.removeprefix(".")] = files
    return found
