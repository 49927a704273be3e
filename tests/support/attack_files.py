"""Attacks on every file that gradrun reads or writes: their files and the expected result.

soak/victim.py runs and observes the commands. No attack may create `evil` or change a file outside
of `out`.
"""

from __future__ import annotations

import functools
import io
import json
import os
import pickle
import struct
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from tests.soak import fuzz
from tests.soak.fuzz import INFER, LINEAR, config, saved

TERABYTE = 2**40
BOMB = 300 * 2**20
SCREEN = "[bold]\x1b]0;x\x07\u202e[/]"
"""Markup, a title of the terminal window, and text in reverse direction."""
SHOWN = r"\[bold\]\\(x|u00)1b\]0;x\\(x|u00)07\\u202e\[[/_]\]"
VALIDATE = ["validate", "c.yaml"]
VERIFY = ["verify", "out"]

Files = dict[str, bytes]
Create = Callable[[], bytes]


@dataclass(frozen=True)
class Attack:
    """Files, commands, and the expected exit code and message."""

    lay_out: Callable[[Path], None]
    said: str
    """A pattern."""
    commands: tuple[list[str], ...] = (INFER,)
    code: int = 2
    """Of the last command."""


class Touch:
    """Unpickled, it makes `evil`."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("evil",)


def attack(said: str, files: Files, *commands: list[str], code: int = 2, **more: Any) -> Attack:
    """An attack that is files alone; `holes`: name to bytes that follow which take no disk."""

    def lay_out(folder: Path) -> None:
        for name, data in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        for name, size in more.get("holes", {}).items():
            os.truncate(folder / name, size)

    return Attack(lay_out, said, commands or (INFER,), code)


def archive(members: Files, **options: Any) -> bytes:
    """A zip archive; a level of packing that is quick."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", **options, compresslevel=1) as made:
        for name, data in members.items():
            made.writestr(name, data)
    return buffer.getvalue()


def members_of(data: bytes) -> Files:
    with zipfile.ZipFile(io.BytesIO(data)) as made:
        return {name: made.read(name) for name in made.namelist()}


# --- configs -----------------------------------------------------------------------------------


def _yaml(said: str, text: str, **more: Any) -> Attack:
    return attack(said, {"c.yaml": text.encode()}, VALIDATE, **more)


def _bomb() -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    return "\n".join(lines)


CONFIGS = {
    "a tag that calls": _yaml("is not allowed", 'run: !!python/object/apply:os.mkdir ["evil"]'),
    "a tag that names": _yaml("is not allowed", "run: !!python/name:os.system"),
    "a tag that makes": _yaml("is not allowed", "run: !!python/object/new:os.mkdir [evil]"),
    "a tag on a key": _yaml("is not allowed", "!!python/name:os.system : 1"),
    "a tag of a stranger": _yaml("is not allowed", "run: !evil {a: 1}"),
    "aliases upon aliases": _yaml("recursive aliases", _bomb()),
    "an alias of itself": _yaml("recursive aliases", "run: &a [*a]"),
    "merges upon merges": _yaml("unknown key", "a: &a {x: 1}\nrun: {<<: *a}"),
    "brackets without end": _yaml("nested too deeply", "[" * 60_000),
    "braces without end": _yaml("nested too deeply", "{a: " * 60_000),
    "one long line with a tab": _yaml("too long", f"['\t', {'1,' * 60_000}]"),
    "a line of a million": _yaml("is not a valid path|is missing", f"run: {{mode: {'x' * 10**6}}}"),
    "unknown keys by the thousand": _yaml(
        "unknown key", "\n".join(f"modle{i}: 1" for i in range(3_000))
    ),
    "a number of 10,000 digits": attack(
        "data.samples", config(data=f"{{source: synthetic, samples: {'9' * 10_000}}}"), VALIDATE
    ),
    "a config of a terabyte": _yaml("larger than 1 MiB", "run: {}", holes={"c.yaml": TERABYTE}),
    "UTF-16": attack("not UTF-8", {"c.yaml": "run: {}".encode("utf-16")}, VALIDATE),
    "half a character": _yaml("half of a surrogate", r'run: {mode: "\ud800"}'),
    "a NUL in a path": _yaml("embedded null", r'model: {source: exported, path: "a\0b"}'),
    "a device as a file": _yaml("not a regular file", "data: {source: arrays, path: /dev/zero}"),
    "a way out": _yaml(r"contains '\.\.'", "output: {path: out/../../evil}"),
    "a key that drives the terminal": _yaml(SHOWN, f"run: {{{json.dumps(SCREEN)}: 1}}"),
    "a value that drives the terminal": _yaml(SHOWN, f"run: {{mode: {json.dumps(SCREEN)}}}"),
    "code that nobody trusts": attack(
        "pass --trust-code",
        config("{source: python, target: 'm.py:Net'}") | {"m.py": b"import os; os.mkdir('evil')"},
    ),
    "a function that nobody trusts": attack(
        "pass --trust-code", config("{source: python, target: 'os:mkdir', args: {path: evil}}")
    ),
    "layers of more than the memory": attack(
        "TiB of weights", config("{source: layers, layers: [{Linear: [1000000, 100000000]}]}")
    ),
}

# --- arrays ------------------------------------------------------------------------------------


def npy(descr: str, shape: str, rest: bytes = bytes(64), **more: Any) -> bytes:
    order = more.get("order", "False")
    header = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + rest


def _array(said: str, data: bytes, name: str = "x.npy", **more: Any) -> Attack:
    asked = config(data=f"{{source: arrays, path: {name}}}")
    return attack(said, asked | {name: data}, **more)


def _safetensors(said: str, header: object, size: int | None = None, rest: bytes = b"") -> Attack:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = struct.pack("<Q", len(text) if size is None else size)
    return _array(said, length + text + rest, "x.safetensors")


def _of(dtype: object, shape: object, *offsets: int) -> dict[str, object]:
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


def _stored(array: np.ndarray[Any, Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def _lying_member() -> bytes:
    """An archive that says of a member of some bytes that it has a terabyte."""
    data = bytearray(archive({"a.npy": npy("'<f4'", f"({2**28}, 4)")}))
    at = data.rindex(b"PK\x01\x02")
    data[at + 24 : at + 28] = struct.pack("<L", 2**32 - 2)
    return bytes(data)


def _encrypted() -> bytes:
    data = bytearray(archive({"a.npy": npy("'<f4'", "(2, 2)")}))
    for mark, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(mark) + at] |= 1
    return bytes(data)


LONG_HEADER = b"\x93NUMPY\x02\x00" + struct.pack("<L", 2**32 - 1)
PACKED = {"compression": zipfile.ZIP_DEFLATED}
ROWS = npy("'<f4'", f"({2**20}, 16)", bytes(2**26))

ARRAYS = {
    "pickled objects": _array("could run code", _stored(np.array([Touch()], object))),
    "a pickle for an array": _array("not a NumPy array", pickle.dumps(Touch())),
    "objects in a structure": _array("could run code", npy("[('a', '|O')]", "(1,)")),
    "a header that is code": _array(
        "not a NumPy array", npy("__import__('os').mkdir('evil')", "(1,)")
    ),
    "a shape that is code": _array(
        "not a NumPy array", npy("'<f4'", "__import__('os').mkdir('evil')")
    ),
    "a header of parentheses": _array("not a NumPy array", npy("(" * 5_000, "(1,)")),
    "an array of terabytes": _array("is truncated", npy("'<f4'", f"({2**40}, 4)")),
    "a shape beyond all numbers": _array(
        "impossible shape|truncated", npy("'<f8'", f"({2**62}, {2**62})")
    ),
    "a shape below zero": _array("its shape is", npy("'<f4'", "(-1, 4)")),
    "a shape of booleans": _array(
        "not a NumPy array|truncated|refuses", npy("'<f4'", "(True, 99)")
    ),
    "rows of nothing": _array("rows without values", npy("'<f4'", f"({2**60}, 0)", b"")),
    "a type of gigabytes": _array(
        "does not support|not a NumPy array|truncated", npy(f"'|S{2**31 - 1}'", "(9,)")
    ),
    "a header of 4 GiB": _array(
        "is not a NumPy array: EOF", LONG_HEADER, holes={"x.npy": 5 * 2**30}
    ),
    "one row of a terabyte": _array(
        "one batch needs", npy("'<f4'", f"(1, {2**38})"), holes={"x.npy": TERABYTE + 100}
    ),
    "a packed header of 4 GiB": _array(
        "is not a NumPy array: EOF",
        archive({"a.npy": LONG_HEADER + bytes(2**26)}, **PACKED),
        "x.npz",
    ),
    "a bomb of rows": _array("predictions", archive({"a.npy": ROWS}, **PACKED), "x.npz", code=0),
    "a member that claims a terabyte": _array("truncated|damaged", _lying_member(), "x.npz"),
    "pickled objects in an archive": _array(
        "could run code", archive({"a.npy": _stored(np.array([Touch()], object))}), "x.npz"
    ),
    "a member on its way out": _array(
        "predictions", archive({"../../evil.npy": npy("'<f4'", "(4, 4)")}), "x.npz", code=0
    ),
    "members that drive the terminal": _array(
        SHOWN, archive({f"{SCREEN}.npy": b"", "b.npy": b""}), "x.npz"
    ),
    "members by the thousand": _array(
        "and 4992 more", archive({f"{i}.npy": b"" for i in range(5_000)}), "x.npz"
    ),
    "an encrypted member": _array("cannot be read", _encrypted(), "x.npz"),
    "a header beyond the file": _safetensors("not a valid safetensors file", b"{}", 2**63),
    "a header of a gigabyte": _safetensors("not a valid safetensors file", b"{}", 2**30),
    "no JSON in the header": _safetensors("not a valid safetensors file", b"\x80\x04cos\nmkdir\n"),
    "brackets in the header": _safetensors("not a valid safetensors file", b'{"a":' * 100_000),
    "data beyond the file": _safetensors(
        "not a valid safetensors file", _of("F32", [2, 2], 0, 2**40)
    ),
    "data before the file": _safetensors(
        "not a valid safetensors file", _of("F32", [2, 2], -16, 0), None
    ),
    "a shape beyond its data": _safetensors(
        "not a valid safetensors file", _of("F32", [2**40, 4], 0, 16), None, bytes(16)
    ),
    "a shape that overflows": _safetensors(
        "not a valid safetensors file", _of("F32", [2**62, 4], 0, 16), None, bytes(16)
    ),
    "two tensors in one place": _safetensors(
        "not a valid safetensors file",
        {"b": _of("F32", [4], 0, 16)["a"], **_of("F32", [4], 0, 16)},
        None,
        b"_" * 16,
    ),
    "a type of nobody's": _safetensors(
        "not a valid safetensors file", _of("X99", [2, 2], 0, 16), None, bytes(16)
    ),
    "tensors that drive the terminal": _array(
        SHOWN, save({SCREEN: torch.zeros(2), "b": torch.zeros(2)}), "x.safetensors"
    ),
}

# --- records -----------------------------------------------------------------------------------


def _records(said: str, name: str, text: str | bytes, **more: Any) -> Attack:
    asked = f"{{source: records, path: {name}, inputs: {{x: {{columns: [a]}}}}, id: b}}"
    return attack(said, config(data=asked, form="jsonl") | {name: _bytes(text)}, **more)


def _bytes(text: str | bytes) -> bytes:
    return text.encode() if isinstance(text, str) else text


RECORDS = {
    "a table of one line": _records("a line of", "x.csv", "a,b\n", holes={"x.csv": TERABYTE}),
    "a text of one line": _records("a line of", "x.jsonl", "{", holes={"x.jsonl": TERABYTE}),
    "a quote without an end": _records(
        "a quote is not closed", "x.csv", 'a,b\n1,"' + "x\n" * 200_000
    ),
    "a formula": _records("not a number of type float32", "x.csv", "a,b\n=cmd|' /C calc'!A0,1\n"),
    "a column that drives the terminal": _records(SHOWN, "x.csv", f"{SCREEN},b\n1,2\n"),
    "a cell that drives the terminal": _records(SHOWN, "x.csv", f"a,b\n{SCREEN},2\n"),
    "an id that drives the terminal": _records(
        "predictions", "x.csv", f"a,b\n1,{SCREEN}\n2,x\n", code=0
    ),
    "columns by the thousand": _records(
        "has no column 'a'", "x.csv", ",".join(map("c{}".format, range(20_000))) + "\n1\n"
    ),
    "brackets in a line": _records("invalid JSON|number", "x.jsonl", "[" * 500_000),
    "lists in lists": _records("number", "x.jsonl", f'{{"b": 1, "a": {"[" * 800}1{"]" * 800}}}'),
    "a number of 100,000 digits": _records("invalid JSON", "x.jsonl", f'{{"a": {"9" * 100_000}}}'),
    "a number beyond all": _records("1e999 is out of range", "x.jsonl", '{"a": 1e999, "b": NaN}'),
    "an object for a number": _records(
        "not a number of type float32",
        "x.jsonl",
        '{"a": {"__reduce__": ["os.mkdir", "evil"]}, "b": 1}',
    ),
    "a pickle for a table": _records("not UTF-8 text", "x.csv", b"\x80\x04cos\nmkdir\n"),
}

# --- weights and programs ----------------------------------------------------------------------

STATE = {"0.weight": torch.ones(3, 4), "0.bias": torch.zeros(3)}
REFUSED = "contains Python objects besides tensors, and unpickling them could run code"


def _weights(said: str, data: bytes, name: str = "w.pt", **more: Any) -> Attack:
    return attack(said, config(f"{LINEAR}, weights: {name}}}") | {name: data}, **more)


def _changed(data: bytes, changes: dict[str, Callable[[bytes], bytes]], **options: Any) -> bytes:
    """An archive with some members changed, each by the end of its name."""
    members = members_of(data)
    for end, change in changes.items():
        (name,) = [name for name in members if name.endswith(end)]
        members[name] = change(members[name])
    return archive(members, **options)


def _pickle(module: str, name: str, argument: str) -> bytes:
    """A pickle by hand that calls `module.name(argument)`."""
    return f"\x80\x02c{module}\n{name}\nX".encode("latin1") + (
        struct.pack("<L", len(argument)) + argument.encode() + b"\x85R."
    )


def _older(state: object) -> bytes:
    return saved(state, _use_new_zipfile_serialization=False)


def nested_tuples() -> bytes:
    """Opcodes for a tuple that contains one tuple twice, which contains one twice, and so on."""
    return b")q\x00" + b"".join(b"h%c\x86q%c" % (i, i + 1) for i in range(100))


def nested_lists() -> bytes:
    return b"]q\x00" + b"".join(b"](h%ch%ceq%c" % (i, i, i + 1) for i in range(100))


CALLERS = {
    "builtins exec": _pickle("builtins", "exec", "import os; os.mkdir('evil')"),
    "builtins eval": _pickle("builtins", "eval", "__import__('os').mkdir('evil')"),
    "posix system": _pickle("posix", "system", "mkdir evil"),
    "torch hub": _pickle("torch.hub", "load_state_dict_from_url", "http://127.0.0.1:9/evil"),
    "torch load": _pickle("torch", "load", "evil"),
    "numpy load": _pickle("numpy", "load", "evil"),
    "pickle loads": _pickle("pickle", "loads", "cos\nmkdir\n(S'evil'\ntR."),
}
WEIGHTS = {
    "a checkpoint that calls": _weights(REFUSED, saved({"state_dict": Touch()})),
    "an older checkpoint that calls": _weights(REFUSED, _older({"state_dict": Touch()})),
    "a whole module": _weights(REFUSED, saved(torch.nn.ReLU())),
    "a bare pickle": _weights("model.weights: ", pickle.dumps(Touch())),
    "a pickle called safetensors": _weights(
        "not a valid safetensors file", pickle.dumps(Touch()), "w.safetensors"
    ),
    **{
        f"a checkpoint that calls {name}": _weights(
            "model.weights: ", _changed(saved(STATE), {"data.pkl": lambda _, data=data: data})
        )
        for name, data in CALLERS.items()
    },
    "a packed checkpoint": _weights(
        "is a compressed archive",
        _changed(saved(STATE), {"data/0": lambda _: bytes(BOMB)}, **PACKED),
    ),
    "a storage shorter than its tensor": _weights(
        "not a checkpoint", _changed(saved(STATE), {"data/0": lambda _: b"x"})
    ),
    "a tensor longer than its storage": _weights(
        "not a checkpoint|does not fit",
        _changed(saved(STATE), {"data.pkl": lambda d: d.replace(b"K\x03K\x04", b"K\xffK\xff", 1)}),
    ),
    "tuples within tuples as a key": _weights(
        "tuples nested without limit",
        _changed(saved(STATE), {"data.pkl": lambda _: b"\x80\x02}" + nested_tuples() + b"K\x01s."}),
    ),
    "tuples a million levels deep": _weights(
        "tuples nested without limit",
        _changed(
            saved(STATE),
            {"data.pkl": lambda _: b"\x80\x02})" + b"\x85" * 1_000_000 + b"K\x01s."},
        ),
    ),
    "tuples within tuples": _weights(
        "tuples nested without limit",
        _changed(saved(STATE), {"data.pkl": lambda _: b"\x80\x02" + nested_tuples() + b"."}),
    ),
    "tuples within tuples, called": _weights(
        "tuples nested without limit",
        _changed(saved(STATE), {"data.pkl": lambda _: b"\x80\x02" + nested_tuples() + b")R."}),
    ),
    "tuples within tuples in an older checkpoint": _weights(
        "tuples nested without limit",
        b"".join(pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {}))
        + b"\x80\x02}"
        + nested_tuples()
        + b"K\x01s.",
    ),
    "lists within lists, called": _weights(
        REFUSED,
        _changed(saved(STATE), {"data.pkl": lambda _: b"\x80\x02" + nested_lists() + b")R."}),
    ),
    "a list within itself": _weights(
        "it contains a list",
        _changed(saved(STATE), {"data.pkl": lambda _: b"\x80\x02]q\x00h\x00a."}),
    ),
    "a pickle with a place for everything": _weights(
        "not a checkpoint|no state dict",
        _changed(saved(STATE), {"data.pkl": lambda _: b"\x80\x02}r\xff\xff\xff\x7f."}),
    ),
    "keys that drive the terminal": _weights(SHOWN, saved({SCREEN: torch.ones(1)})),
    "weights of a terabyte": _weights(
        "not a valid safetensors file|cannot be read",
        struct.pack("<Q", 2**39) + b"{",
        "w.safetensors",
        holes={"w.safetensors": TERABYTE},
    ),
}


class WritesOnLoad(torch.nn.Module):
    """A scripted module whose file creates `evil` while torch.jit.load reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("x", torch.ones(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x

    @torch.jit.export
    def __getstate__(self) -> tuple[torch.Tensor, bool]:
        return self.x, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, bool]) -> None:
        torch.save(state[0], "evil")
        self.x, self.training = state


def script_that_writes() -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings(action="ignore"):
        torch.jit.save(torch.jit.script(WritesOnLoad()), buffer)
    return buffer.getvalue()


def export_that_writes() -> bytes:
    """An exported program whose formula creates `evil` when torch.export.load evaluates it."""
    buffer = io.BytesIO()
    example = (torch.ones(3, 4),)
    torch.export.save(torch.export.export(torch.nn.Linear(4, 2), example, strict=False), buffer)

    def change(data: bytes) -> bytes:
        program = json.loads(data)
        formula = {"expr_str": "__import__('os').system('touch evil')", "hint": None}
        values = program["graph_module"]["graph"]["tensor_values"]
        values["input"]["sizes"][0] = {"as_expr": formula}
        return json.dumps(program).encode()

    data = buffer.getvalue()
    old = b"serialized_exported_program.json"  # the name in torch 2.6
    return _changed(data, {old.decode() if old in data else "models/model.json": change})


def _program(source: str, create: Create) -> Attack:
    def lay_out(folder: Path) -> None:
        (folder / "c.yaml").write_bytes(config(f"{{source: {source}, path: m}}")["c.yaml"])
        (folder / "m").write_bytes(create())

    return Attack(lay_out, "was not loaded, because it could run anything .* pass --trust-code")


PROGRAMS = {
    "a TorchScript file that writes": _program("torchscript", script_that_writes),
    "an exported program that writes": _program("exported", export_that_writes),
    "a damaged TorchScript file": _program("torchscript", lambda: b"PK\x03\x04"),
    "a pickle as an exported program": _program("exported", lambda: pickle.dumps(Touch())),
}

# --- pictures ----------------------------------------------------------------------------------


def _picture(said: str, data: bytes, name: str = "a.png") -> Attack:
    asked = config(data="{source: images, path: pictures}")
    return attack(said, asked | {f"pictures/{name}": data})


def _png(width: int, height: int) -> bytes:
    """A picture of many pixels in few bytes."""
    parts = ((b"IHDR", struct.pack(">2L5B", width, height, 8, 2, 0, 0, 0)), (b"IDAT", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">L", len(data)) + kind + data + struct.pack(">L", zlib.crc32(kind + data))
        for kind, data in parts
    )


PICTURES = {
    "a picture of ten gigapixels": _picture("no image can be read", _png(100_000, 100_000)),
    "a picture beyond all numbers": _picture("no image can be read", _png(2**31 - 1, 2**31 - 1)),
    "a program for a picture": _picture(
        "is not an image of a supported format",
        b"%!PS-Adobe-3.0 EPSF-3.0\n(evil) (w) file closefile\n",
    ),
    "a picture that drives the terminal": _picture(
        SHOWN, b"no picture", f"{SCREEN.replace('/', '_')}.png"
    ),
}

# --- output folders ----------------------------------------------------------------------------

NAMES = [
    *("predictions.npy", "predictions.x.npy", "predictions.jsonl", "predictions-00000.safetensors"),
    *("predictions-00000.safetensors.tmp", "predictions-00000.safetensors.rest", "result.json"),
    *("result.json.tmp", "journal.jsonl", "journal.jsonl.tmp", "quarantine.jsonl"),
    *("quarantine.jsonl.tmp", ".gradrun.output.lock"),
]
KINDS: dict[str, Callable[[Path], None]] = {
    "a link": lambda path: path.symlink_to("../precious"),
    "a link to nowhere": lambda path: path.symlink_to("../evil"),
    "a pipe": os.mkfifo,
    "a folder": lambda path: path.mkdir(),
}


def _there(name: str, kind: str, *options: str) -> Attack:
    def lay_out(folder: Path) -> None:
        (folder / "c.yaml").write_bytes(config()["c.yaml"])
        (folder / "out").mkdir()
        KINDS[kind](folder / "out" / name)

    said = f"{name} is a (link|pipe|folder), not a regular file"
    return Attack(lay_out, said, ([*INFER, *options],))


FOLDERS = {
    f"{name} is {kind}": _there(name, kind, option)
    for at, name in enumerate(NAMES)
    for kind, option in (
        ("a link", "--overwrite"),
        ("a link to nowhere", ("--overwrite", "--resume")[at % 2]),
        (("a pipe", "a folder")[at % 2], ("--resume", "--overwrite")[at % 3 % 2]),
    )
}

# --- folders of runs ---------------------------------------------------------------------------


@functools.cache
def _runs() -> dict[tuple[str, str], Files]:
    with tempfile.TemporaryDirectory() as folder:
        return {(form, state): files for form, state, files in fuzz.runs(Path(folder, "run"))}


Change = Callable[[bytes], bytes]


def _run(
    said: str,
    state: str,
    changes: dict[str, Change],
    *commands: list[str],
    form: str = "npy",
    code: int = 3,
    after: Callable[[Path], None] = lambda _: None,
) -> Attack:
    """A run's folder of which some files were changed."""

    def lay_out(folder: Path) -> None:
        files = dict(_runs()[form, state])
        for name, change in changes.items():
            files[f"out/{name}"] = change(files.get(f"out/{name}", b""))
        fuzz.lay_out(folder, files)
        after(folder / "out")

    return Attack(lay_out, said, commands or (VERIFY,), code)


def _journal(said: str, change: Callable[[list[dict[str, Any]]], None], **more: Any) -> Attack:
    def changed(data: bytes) -> bytes:
        lines = [json.loads(line) for line in data.splitlines()]
        change(lines)
        return b"".join(json.dumps(line).encode() + b"\n" for line in lines)

    return _run(said, "killed", {"journal.jsonl": changed}, **more)


def _result(said: str, change: Callable[[dict[str, Any]], Any], **more: Any) -> Attack:
    def changed(data: bytes) -> bytes:
        result = json.loads(data)
        change(result)
        return json.dumps(result).encode()

    return _run(said, "finished", {"result.json": changed}, [*INFER, "--resume"], **more)


def _hole(name: str, size: int = TERABYTE) -> Callable[[Path], None]:
    return lambda out: os.truncate(out / name, size)


def _piped(name: str) -> Callable[[Path], None]:
    def pipe(out: Path) -> None:
        (out / name).unlink(missing_ok=True)
        os.mkfifo(out / name)

    return pipe


def _linked(name: str) -> Callable[[Path], None]:
    """The file itself lies elsewhere, as it should be; writing through the link would change it."""

    def link(out: Path) -> None:
        (out / name).rename(out.parent / "precious")
        (out / name).symlink_to("../precious")

    return link


def _files(lines: list[dict[str, Any]], name: str) -> None:
    lines[1]["files"] = {name: 0}


RESUME = [*INFER, "--resume"]
DAMAGED = {"code": 1}
RUNS = {
    "a journal that points out": _journal(
        "journal is damaged", lambda lines: _files(lines, "../precious"), **DAMAGED
    ),
    "a journal that points anywhere": _journal(
        "journal is damaged", lambda lines: _files(lines, "/etc/passwd"), **DAMAGED
    ),
    "a journal of files of nobody's": _journal(
        "the file is damaged", lambda lines: _files(lines, "x.pkl")
    ),
    "a journal that drives the terminal": _journal(
        SHOWN, lambda lines: _files(lines, SCREEN.replace("/", "_") + ".npy")
    ),
    "a journal without an end": _run(
        "longer than gradrun writes",
        "killed",
        {},
        after=_hole("journal.jsonl"),
        **DAMAGED,
    ),
    "a journal of brackets": _run(
        "journal is damaged",
        "killed",
        {"journal.jsonl": lambda data: b'{"a":' * 100_000 + b"\n" + data},
        **DAMAGED,
    ),
    "a journal of samples below zero": _journal(
        "journal is damaged", lambda lines: lines[0].update(samples=-1), **DAMAGED
    ),
    "a journal of ranges beyond": _journal(
        "shorter than", lambda lines: (lines[0].update(samples=2**70), lines[-1].update(stop=2**70))
    ),
    "a journal of a time to come": _journal(
        "journal format", lambda lines: lines[0].update(journal=SCREEN * 1000), **DAMAGED
    ),
    "a journal in a pipe": _run(
        "has no journal.jsonl", "killed", {}, after=_piped("journal.jsonl"), code=2
    ),
    "predictions in a pipe": _run(
        "a pipe or a device", "killed", {}, after=_piped("predictions.npy")
    ),
    "predictions elsewhere": _run("a link, a pipe", "killed", {}, after=_linked("predictions.npy")),
    "predictions elsewhere, resumed": _run(
        "is a link, not a regular", "killed", {}, RESUME, after=_linked("predictions.npy"), code=2
    ),
    "a journal elsewhere, resumed": _run(
        "is a link, not a regular", "killed", {}, RESUME, after=_linked("journal.jsonl"), code=2
    ),
    "predictions with a header of code": _run(
        "file is damaged",
        "killed",
        {"predictions.npy": lambda _: npy("__import__('os').mkdir('evil')", "(1,)")},
    ),
    "predictions of a negative shape": _run(
        "cut off|damaged|differs|Invalid",
        "killed",
        {"predictions.npy": lambda _: npy("'<f4'", "(4, -4)")},
    ),
    "a part whose header is a terabyte": _run(
        "damaged|cut off",
        "finished",
        {"predictions-00000.safetensors": lambda _: struct.pack("<Q", 2**39) + b"{"},
        form="safetensors",
        after=_hole("predictions-00000.safetensors"),
    ),
    "a part of no samples": _run(
        "file is damaged",
        "finished",
        {"predictions-00000.safetensors": lambda data: data.replace(b'"shape":[', b'"shape":[0,')},
        form="safetensors",
    ),
    "samples set apart in a terabyte": _run(
        "longer than gradrun writes",
        "killed",
        {},
        RESUME,
        after=_hole("quarantine.jsonl"),
        code=1,
    ),
    "samples set apart in brackets": _run(
        "predictions",
        "killed",
        {"quarantine.jsonl": lambda _: b"[" * 100_000 + b"\n"},
        RESUME,
        code=0,
    ),
    "a result of a terabyte": _run(
        "over 1 GiB", "finished", {}, RESUME, after=_hole("result.json"), code=1
    ),
    "a result of brackets": _run(
        "recursion",
        "finished",
        {"result.json": lambda _: b"[" * 100_000},
        RESUME,
        code=1,
    ),
    "a result that drives the terminal": _result(
        SHOWN, lambda result: result["warnings"].append({"code": "x", "text": SCREEN}), code=0
    ),
    "a machine that drives the terminal": _result(
        SHOWN, lambda result: result["environment"].update(device_name=SCREEN), code=0
    ),
    "a result without a config": _result(
        "invalid config", lambda result: result.update(config={}, format=1), **DAMAGED
    ),
    "a result of unequal lists": _result(
        "differ in length",
        lambda result: result["measurements"][0].update(batch_sizes=[1]),
        **DAMAGED,
    ),
    "a result of numbers beyond all": _result(
        "not a gradrun result",
        lambda result: result["measurements"][0]["memory"].update(weights=10**4000),
        **DAMAGED,
    ),
    "a result of no time": _result(
        "not a gradrun result",
        lambda result: result["measurements"][0]["phases"].update(data=float("nan")),
        **DAMAGED,
    ),
    "a result of another kind": _result(
        "predictions", lambda result: result.update(kind="check"), code=0
    ),
    "a result without measurements": _result(
        "length >= 1", lambda result: result.update(measurements=[]), **DAMAGED
    ),
}

KINDS_OF_ATTACK: dict[str, dict[str, Attack]] = {
    "configs": CONFIGS,
    "arrays": ARRAYS,
    "records": RECORDS,
    "weights": WEIGHTS,
    "programs": PROGRAMS,
    **({"pictures": PICTURES} if find_spec("PIL") else {}),
    "output folders": FOLDERS,
    "folders of runs": RUNS,
}
