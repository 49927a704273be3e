"""Randomly damaged files of every kind that gradrun reads: each is read or is a reported error.

`python tests/soak/fuzz.py` tries 20,000 files and saves those that cause a failure. victim.py runs
the commands and checks how they end.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import random
import re
import shutil
import sys
import tempfile
import threading
import time
import zipfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

sys.path.insert(0, str(Path(__file__).parents[2]))

import gradrun
from gradrun.core.errors import GradrunError
from gradrun.core.grad_mode import GradMode
from gradrun.results.result import (
    AuditResult,
    CheckResult,
    CompareResult,
    Comparison,
    Equivalence,
    Finding,
    InferResult,
    Outcome,
    RunResult,
    SavedForBackward,
)
from tests.soak import faults
from tests.soak.victim import ROOT, Ending, Victim
from tests.support import profile_results, small_models
from tests.support import run_results as results

SETTINGS = """\
run: {{device: cpu, threads: 1, warmup: 0{run}}}
measure: {{memory: false}}
output: {{path: out, format: {form}}}
"""
IDENTITY = "{source: layers, layers: [Identity]}"
LINEAR = "{source: layers, layers: [{Linear: [4, 3]}]"
SYNTHETIC = "{source: synthetic, inputs: {x: {shape: [4]}}, samples: 5, batch_size: 2}"
INFER = ["infer", "c.yaml"]
RESUME = [["verify", "out"], [*INFER, "--resume"]]
ON_DISK = 1_700_000_000
"""When every file was last changed, so that a resume finds those that it knows."""


@dataclass(frozen=True)
class Seed:
    """Files that are as they should be, the one of them to damage, and the commands to run."""

    kind: str
    files: dict[str, bytes]
    target: str
    commands: list[list[str]]


# --- files as they should be -------------------------------------------------------------------


def config(
    model: str = IDENTITY, data: str = SYNTHETIC, form: str = "npy", run: str = ""
) -> dict[str, bytes]:
    text = f"model: {model}\ndata: {data}\n" + SETTINGS.format(form=form, run=run)
    return {"c.yaml": text.encode()}


def saved(tensors: object, **options: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(tensors, buffer, **options)
    return buffer.getvalue()


def _arrays() -> dict[str, bytes]:
    rows = np.arange(28, dtype=np.float32).reshape(7, 4)
    files = {}
    for name, write in {
        "x.npy": lambda file: np.save(file, rows),
        "stored.npz": lambda file: np.savez(file, a=rows),
        "packed.npz": lambda file: np.savez_compressed(file, a=rows, b=rows.astype(np.int16)),
    }.items():
        buffer = io.BytesIO()
        write(buffer)
        files[name] = buffer.getvalue()
    files["x.safetensors"] = save({"a": torch.from_numpy(rows), "b": torch.ones(7)}, {"by": "us"})
    return files


def _texts() -> dict[str, bytes]:
    lines = [json.dumps({"a": i, "b": [1.5, -2e3], "name": f"n{i}"}) for i in range(7)]
    table = ["a,b,name", *(f'{i},1.5,"n, {i}"' for i in range(7))]
    return {"x.csv": "\n".join(table).encode(), "x.jsonl": "\n".join(lines).encode()}


def _plain() -> Iterator[Seed]:
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        yield Seed("yaml", {"c.yaml": path.read_bytes()}, "c.yaml", [["validate", "c.yaml"]])
    for name, data in _arrays().items():
        key = "" if name == "x.npy" else ", inputs: {x: {key: a}}"
        files = config(data=f"{{source: arrays, path: {name}, batch_size: 2{key}}}") | {name: data}
        yield Seed(name.rpartition(".")[2], files, name, [INFER])
    for name, data in _texts().items():
        inputs = "inputs: {x: {columns: [a, b]}}, id: name, batch_size: 2"
        files = config(data=f"{{source: records, path: {name}, {inputs}}}", form="jsonl")
        yield Seed(name.rpartition(".")[2], files | {name: data}, name, [INFER])
    weights = {"0.weight": torch.randn(3, 4), "0.bias": torch.zeros(3)}
    older = saved({"state_dict": weights}, _use_new_zipfile_serialization=False)
    for kind, name, data in (
        ("weights safetensors", "w.safetensors", save(weights)),
        ("checkpoint", "w.pt", saved({"state_dict": weights, "epoch": 3, "note": "text"})),
        ("older checkpoint", "w.pt", older),
    ):
        yield Seed(kind, config(f"{LINEAR}, weights: {name}}}") | {name: data}, name, [INFER])


def runs(folder: Path) -> Iterator[tuple[str, str, dict[str, bytes]]]:
    """(format, "finished" or "killed", files) of a run whose samples failed here and there."""
    model = "{source: layers, layers: [{Embedding: [5, 3]}]}"
    inputs = "inputs: {x: {shape: [2], dtype: int64, distribution: randint, low: 0, high: 6}}"
    data = f"{{source: synthetic, {inputs}, samples: 23, batch_size: 4}}"
    for form in faults.FORMATS:
        asked = config(model, data, form, ", on_error: quarantine")
        lay_out(folder, asked)
        out = folder / "out"
        whole = faults.Disk(out)
        with faults.commits_at_every_batch(), whole.watched():
            gradrun.infer(folder / "c.yaml")
        finished = faults.contents(out)
        shutil.rmtree(out)
        killed = faults.Disk(out, "kill", len(whole.calls) * 3 // 5)
        died = suppress(faults.Died, GradrunError)  # the second is what a rescue makes of the first
        with died, faults.commits_at_every_batch(), killed.watched():
            gradrun.infer(folder / "c.yaml")
        faults.close_below(out)
        assert killed.remains
        killed.remains.pop(".gradrun.output.lock")
        for state, files in (("finished", finished), ("killed", killed.remains)):
            yield form, state, asked | {f"out/{name}": data for name, data in files.items()}


def _run_files(folder: Path) -> Iterator[Seed]:
    for form, _, files in runs(folder):
        for place in files:
            folder_name, _, name = place.rpartition("/")
            kind = f"predictions {form}" if name.startswith("predictions") else name
            if folder_name:
                yield Seed(kind, files, place, RESUME)


def _pictures() -> Iterator[Seed]:
    """A picture of each format, beside one that stays as it is."""
    if find_spec("PIL") is None:
        return
    from PIL import Image

    pixels = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
    for form in ("png", "jpeg", "bmp", "gif", "tiff", "webp", "ppm"):
        buffer = io.BytesIO()
        pixels.save(buffer, form)
        files = config(data="{source: images, path: pictures, batch_size: 2}")
        places = {name: f"pictures/{name}.{form}" for name in ("a", "b")}
        files |= dict.fromkeys(places.values(), buffer.getvalue())
        yield Seed("pictures", files, places["b"], [INFER])


def _parquet() -> Iterator[Seed]:
    if find_spec("pyarrow") is None:
        return
    data = (ROOT / "configs/digits.parquet").read_bytes()
    text = (ROOT / "configs/parquet.yaml").read_text()
    text = re.sub(r"(?ms)^output:.*", "output: {path: out}\n", text)
    yield Seed(
        "parquet", {"c.yaml": text.encode(), "digits.parquet": data}, "digits.parquet", [INFER]
    )


def _pretrained(folder: Path) -> Iterator[Seed]:
    """A small BERT with its tokenizer, and texts of each kind of file."""
    if find_spec("transformers") is None:
        return
    small_models.save_bert(folder / "bert", hidden_size=8, intermediate_size=8)
    model = {f"bert/{path.name}": path.read_bytes() for path in (folder / "bert").iterdir()}
    texts = small_models.sentences(6)
    rows = [json.dumps({"text": text, "is": i % 2}) for i, text in enumerate(texts)]
    table = ["text,is", *(f'"{text}",{i % 2}' for i, text in enumerate(texts))]
    lists = {"t.txt": texts, "t.jsonl": rows, "t.csv": table}
    for name, lines in lists.items():
        field = "" if name == "t.txt" else ", field: text, labels: is"
        data = f"{{source: text, path: {name}, batch_size: 2{field}}}"
        files = config("{source: huggingface, path: bert}", data, "jsonl") | model
        files[name] = "\n".join(lines).encode()
        yield Seed("text", files, name, [INFER])
    for place in model:
        yield Seed("huggingface", files, place, [INFER])


def _results() -> Iterator[Seed]:
    """A result of each kind, by every report."""
    first = results.measurement(4, variant="grad")
    second = results.measurement(4, mode=GradMode.NO_GRAD, variant="no_grad")
    pair: dict[str, Any] = {"baseline": "grad", "candidate": "no_grad"}
    kinds: dict[type[RunResult], dict[str, Any]] = {
        InferResult: {},
        CompareResult: {
            "measurements": (first, second),
            "comparisons": (Comparison(**pair, ratio=1.2, low=1.1, high=1.3, verdict="faster"),),
            "equivalence": (Equivalence(**pair, bitwise=True, max_abs_diff=0.0, equal=True),),
        },
        AuditResult: {
            "findings": (
                Finding(severity="error", code="x", text="it does", advice="do not", cost=7),
            ),
            "saved_for_backward": (SavedForBackward(module="0 (Linear)", bytes=64),),
        },
        CheckResult: {
            "outcomes": (Outcome(check="model runs", limit="yes", value="yes", status="pass"),),
        },
    }
    forms = [
        ["report", "out", "-o", f"out/report.{form}"] for form in ("html", "md", "csv", "json")
    ]
    made = [results.run_result(first, cls=cls, **parts) for cls, parts in kinds.items()]
    made += [profile_results.PROFILES[name] for name in ("modules", "modes")]
    for one in made:
        data = one.to_json().encode()
        yield Seed(
            "reports", {"out/result.json": data}, "out/result.json", [*forms, ["report", "out"]]
        )


def seeds(folder: Path) -> dict[str, list[Seed]]:
    """Kind of file to what there is of it."""
    torch.manual_seed(0)
    kinds = defaultdict(list)
    for seed in itertools.chain(
        _plain(),
        _pictures(),
        _parquet(),
        _pretrained(folder),
        _results(),
        _run_files(folder),
    ):
        kinds[seed.kind].append(seed)
    return kinds


def lay_out(folder: Path, files: dict[str, bytes]) -> None:
    """Make the folder hold just these."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        os.utime(path, (ON_DISK, ON_DISK))


# --- damage ------------------------------------------------------------------------------------

NUMBERS = [0, 1, 2, 7, 127, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**33, 2**40]
NUMBERS += [2**62, 2**63 - 1, 2**63, 2**64 - 1]
WORDS = [
    *(b"-1", b"1e999", b"NaN", b"null", b"true", b"[]", b"{}", b'""', b'"', b"'", b"\n", b"\\"),
    *(b"\x00", b"\xff\xfe", b"\xed\xa0\x80", "\u202e\u2066".encode(), b"\x1b]0;x\x07", b"[/bold]"),
    *(b"../../evil", b"/dev/zero", b"9" * 40, b"[" * 2000, b'{"a":' * 2000, b"*a", b"&a [*a]"),
    *(b'!!python/object/apply:os.mkdir ["evil"]', b"__import__('os').mkdir('evil')"),
    *(b"cos\nmkdir\n(S'evil'\ntR.", b"O", b"|O", b"<f8", b"torch.os.system", b"ops.evil.op"),
]


def damaged(lot: random.Random, data: bytes, others: list[bytes]) -> bytes:
    """The data with one to three faults; in an archive often inside a member, with its checksum."""
    if data[:2] == b"PK" and lot.random() < 0.6:
        return _inside(lot, data)
    for _ in range(lot.choice([1, 1, 2, 3])):
        data = lot.choice(_FAULTS)(lot, data, others)
    return data


def _inside(lot: random.Random, data: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {info: archive.read(info) for info in archive.infolist()}
    chosen = lot.choice([*members])
    with zipfile.ZipFile(buffer, "w") as archive:
        for info, content in members.items():
            if info is chosen:
                content = damaged(lot, content, [*members.values()])
                if lot.random() < 0.1:
                    continue
            archive.writestr(info, content)
    return buffer.getvalue()


def _place(lot: random.Random, data: bytes) -> int:
    """Anywhere, and more often where headers lie."""
    near = min(len(data), 128)
    return lot.choice(
        [lot.randrange(len(data) + 1), lot.randrange(near + 1), len(data) - lot.randrange(near + 1)]
    )


def _flip(lot: random.Random, data: bytes, others: list[bytes]) -> bytes:
    changed = bytearray(data)
    for _ in range(lot.choice([1, 1, 2, 8])):
        if data:
            changed[min(_place(lot, data), len(data) - 1)] ^= 1 << lot.randrange(8)
    return bytes(changed)


def _cut(lot: random.Random, data: bytes, others: list[bytes]) -> bytes:
    return data[: _place(lot, data)]


def _remove(lot: random.Random, data: bytes, others: list[bytes]) -> bytes:
    at = _place(lot, data)
    return data[:at] + data[at + lot.choice([1, 2, 4, 8, 30]) :]


def _repeat(lot: random.Random, data: bytes, others: list[bytes]) -> bytes:
    at, size = _place(lot, data), lot.choice([1, 4, 16, 64])
    return data[:at] + data[at : at + size] * lot.choice([2, 3, 100]) + data[at + size :]


def _insert(lot: random.Random, data: bytes, others: list[bytes]) -> bytes:
    at = _place(lot, data)
    return data[:at] + lot.choice([*WORDS, lot.randbytes(lot.choice([1, 4, 32]))]) + data[at:]


def _splice(lot: random.Random, data: bytes, others: list[bytes]) -> bytes:
    other = lot.choice(others)
    return data[: _place(lot, data)] + other[_place(lot, other) :]


def _length(lot: random.Random, data: bytes, others: list[bytes]) -> bytes:
    """Another number where a binary one might be."""
    at, width = _place(lot, data), lot.choice([1, 2, 4, 8])
    number = lot.choice([*NUMBERS, len(data), len(data) + 1]) % 2 ** (8 * width)
    return data[:at] + number.to_bytes(width, lot.choice(["little", "big"])) + data[at + width :]


def _number(lot: random.Random, data: bytes, others: list[bytes]) -> bytes:
    """Another number where one is written."""
    found = [*re.finditer(rb"-?\d+", data)]
    if not found:
        return _flip(lot, data, others)
    at, number = lot.choice(found), lot.choice([*NUMBERS, -1, -3, -(2**63), 10**30])
    return data[: at.start()] + str(number).encode() + data[at.end() :]


def _word(lot: random.Random, data: bytes, others: list[bytes]) -> bytes:
    """Another word where one is written: a key, a type, a name."""
    found = [*re.finditer(rb"[A-Za-z_][\w.]*", data)]
    if not found:
        return _insert(lot, data, others)
    at = lot.choice(found)
    new = lot.choice([*WORDS, lot.choice(found)[0], b""])
    return data[: at.start()] + new + data[at.end() :]


_FAULTS = [_flip, _cut, _remove, _repeat, _insert, _splice, _length, _number, _word]


# --- trying them -------------------------------------------------------------------------------


@dataclass
class Tally:
    """What became of the files of one kind."""

    read: int = 0
    refused: int = 0
    seconds: float = 0.0
    peak: int = 0
    wrong: int = 0

    def add(self, ending: Ending) -> None:
        if ending.codes and not ending.codes[-1]:
            self.read += 1
        else:
            self.refused += 1
        self.seconds = max(self.seconds, ending.seconds)
        self.peak = max(self.peak, ending.peak)
        self.wrong += bool(ending.wrong)


class Fuzzer:
    """Tries damaged files, each known by its number."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder, seed
        self.kinds = seeds(folder / "seeds")

    def case(self, number: int) -> tuple[Seed, dict[str, bytes]]:
        """A seed and its files, with one damaged."""
        lot = random.Random(f"{self.seed} {number}")
        kind = [*self.kinds][number % len(self.kinds)]
        seed = lot.choice(self.kinds[kind])
        others = [other.files[other.target] for other in self.kinds[kind]]
        return seed, seed.files | {seed.target: damaged(lot, seed.files[seed.target], others)}

    def attempt(self, number: int, victim: Victim, folder: Path) -> tuple[str, Ending]:
        """Try a file; its kind, and how it ended."""
        seed, files = self.case(number)
        lay_out(folder, files)
        ending = victim.run(folder, seed.commands)
        there = {str(path.relative_to(folder)) for path in folder.rglob("*")}
        known = {*files, *(name.partition("/")[0] for name in files), "out"}
        if strange := [name for name in there - known if not name.startswith("out/")]:
            ending.wrong.append(f"{strange} came to be")
        return seed.kind, ending

    def run(self, numbers: range, victims: Sequence[Victim]) -> dict[str, Tally]:
        """Try files, as many at once as there are victims; kind to what became of them."""
        tallies: dict[str, Tally] = defaultdict(Tally)
        left, lock = iter(numbers), threading.Lock()

        def work(victim: Victim, folder: Path) -> None:
            for tried in itertools.count(1):
                with lock:
                    number = next(left, None)
                if number is None:
                    return
                kind, ending = self.attempt(number, victim, folder)
                with lock:
                    tallies[kind].add(ending)
                if ending.wrong:
                    self._keep(number, kind, ending, folder)
                if tried % 2000 == 0:  # torch keeps something of every program
                    victim.close()

        with ThreadPoolExecutor(len(victims)) as pool:
            places = [self.folder / str(index) for index in range(len(victims))]
            for done in [pool.submit(work, *pair) for pair in zip(victims, places, strict=True)]:
                done.result()
        return tallies

    def _keep(self, number: int, kind: str, ending: Ending, folder: Path) -> None:
        """Put what went wrong where it can be tried again."""
        kept = Path(tempfile.gettempdir(), "gradrun-fuzz", f"{self.seed}-{number}")
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(folder, kept, symlinks=True)
        print(f"file {number} ({kind}), kept in {kept}:", *ending.wrong, sep="\n", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, began = Path(name).resolve(), time.monotonic()
        fuzzer = Fuzzer(folder, asked.seed)
        victims = [Victim(), Victim()]
        try:
            tallies = fuzzer.run(range(asked.files), victims)
        finally:
            for victim in victims:
                victim.close()
        print(f"{asked.files:,} files in {time.monotonic() - began:.0f} s")
        print(f"{'kind':20} {'read':>6} {'refused':>8} {'slowest':>9} {'peak':>9} {'wrong':>6}")
        for kind, tally in sorted(tallies.items()):
            peak = f"{tally.peak / 2**20:.0f} MiB"
            print(
                f"{kind:20} {tally.read:6,} {tally.refused:8,} {tally.seconds:7.2f} s {peak:>9} "
                f"{tally.wrong:6}"
            )
    return 1 if any(tally.wrong for tally in tallies.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
