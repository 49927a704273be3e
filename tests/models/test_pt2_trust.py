"""Real exports pass; crafted ones, first shown to work on torch alone, are refused."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim

from gradrun.core.errors import ConfigError
from gradrun.models import pt2_trust

Members = dict[str, bytes]
PROGRAM = "archive/models/model.json"
SAMPLES = "archive/data/sample_inputs/model.pt"

# --- real exports ------------------------------------------------------------------------------


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chosen = torch.cond(x.sum() > 0, lambda x: self.left(x), lambda x: self.right(x), (x,))
        assert isinstance(chosen, torch.Tensor)
        return chosen


class Constants(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(4))
        self.register_buffer("hidden", torch.ones(4), persistent=False)
        self.plain = torch.full((4,), 2.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale + self.hidden + self.plain + torch.tensor([1.0, 2.0, 3.0, 4.0])


class Nested(nn.Module):
    def forward(
        self,
        features: dict[str, Any],
        pair: tuple[Any, Any],
        *,
        scale: Any,
        mode: str = "bi-linear",
    ) -> dict[str, Any]:
        total = features["image"] + pair[0] * scale
        return {"total": total, "others": (pair[1], [total * 2], None)}


class Shapes(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        longer = torch.arange(int(x.shape[0] * 1.5)) * (x.shape[0] % 3 + 1)
        if x.shape[0] * 2 > 7:
            longer = longer + 1
        return (
            x.reshape(x.shape[0] * 2, -1),
            x[: x.shape[0] // 2],
            x[: max(3, x.shape[0] - 5)],
            longer / x.shape[0] ** 0.5,
            nn.functional.interpolate(x[None, None], scale_factor=1.5),
            torch.einsum("bi,bj->ij", x, x),
        )


class Neighbours(nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x[:-1] + y


class Switches(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with torch.no_grad():
            doubled = x * 2
        with torch.autocast("cpu", dtype=torch.bfloat16):
            product = doubled @ doubled.T
        count = x.gt(-100).sum().item()
        torch._check(count <= 100)
        return product, torch.zeros(count), x.masked_fill(x > 0, float("-inf"))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.lstm = nn.Embedding(10, 4), nn.LSTM(4, 5, batch_first=True)

    def forward(self, words: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.lstm(self.embedding(words))[0], words.nonzero()


x, image, one = torch.randn(6, 4), torch.randn(2, 3, 8, 8), Dim("one", min=3, max=50)
mlp = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
REAL: dict[str, tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = {
    "a fixed batch": (mlp, (x,), {}),
    "a dynamic batch": (mlp, (x,), {"dynamic_shapes": ({0: Dim.DYNAMIC},)}),
    "a bounded batch": (mlp, (x,), {"dynamic_shapes": ({0: Dim("batch", min=2, max=64)},)}),
    "a strict export": (mlp, (x,), {"dynamic_shapes": ({0: Dim.DYNAMIC},), "strict": True}),
    "batch norm": (
        nn.Sequential(nn.Conv2d(3, 4, 3, padding="same"), nn.BatchNorm2d(4), nn.GELU()),
        (image,),
        {"dynamic_shapes": ({0: Dim.AUTO, 2: Dim.DYNAMIC},)},
    ),
    "a transformer": (encoder, (torch.randn(2, 3, 8),), {"dynamic_shapes": ({0: Dim.DYNAMIC},)}),
    "nested inputs": (Nested(), ({"image": x}, (x, x)), {"kwargs": {"scale": x}}),
    "a text input": (
        Nested(),
        ({"image": x}, (x, x)),
        {"kwargs": {"scale": x, "mode": "by-area"}},
    ),
    "branches": (Branches(), (x,), {}),
    "constants": (Constants(), (x,), {}),
    "integer inputs": (Recurrent(), (torch.randint(0, 10, (3, 7)),), {}),
    "shape arithmetic": (Shapes(), (x,), {"dynamic_shapes": ({0: Dim.DYNAMIC},)}),
    "related sizes": (
        Neighbours(),
        (torch.randn(7, 2), torch.randn(6, 2)),
        {"dynamic_shapes": ({0: one + 1}, {0: one})},
    ),
    "a size from the data": (Switches(), (x,), {}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", REAL)
def test_a_real_export_passes_and_gives_the_outputs_of_the_model(name: str, tmp_path: Path) -> None:
    model, args, options = REAL[name]
    path, kwargs = tmp_path / "m.pt2", options.get("kwargs", {})
    torch.export.save(torch.export.export(model.eval(), args, **options), path)
    pt2_trust.inspect(path)
    with pt2_trust.weights_only_loads():
        loaded = torch.export.load(path).module()
    torch.testing.assert_close(loaded(*args, **kwargs), model(*args, **kwargs), equal_nan=True)


# --- attacks -----------------------------------------------------------------------------------


class Small(nn.Module):
    """What every attack starts from."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor, mode: str = "zip") -> torch.Tensor:
        return self.linear(x) + torch.tensor([1.0, 2.0])


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def pickled(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def source(marker: Path) -> str:
    """An expression that makes the file, without a dot or a quote to trip over."""
    return f"exec(bytes({list(f'open({str(marker)!r}, chr(119))'.encode())}))".replace(" ", "")


def graph(program: Any) -> Any:
    return program["graph_module"]["graph"]


def signature(program: Any) -> Any:
    return program["graph_module"]["module_call_graph"][0]["signature"]


def call(program: Any, target: str, *args: dict[str, Any], name: str = "") -> None:
    """Append a node that calls `target`."""
    node = copy.deepcopy(graph(program)["nodes"][-1])
    inputs = [{"name": name, "arg": arg, "kind": 2 if name else 1} for arg in args]
    node |= {"target": target, "name": "extra", "inputs": inputs, "outputs": [{"as_none": True}]}
    graph(program)["nodes"].append(node)


def payload(members: Members, kind: str, file: str, data: bytes) -> None:
    """Add a pickled weight or constant."""
    config = f"archive/data/{kind}/model_{kind}_config.json"
    known = json.loads(members[config])
    known["config"]["extra"] = {
        "path_name": file,
        "is_param": False,
        "use_pickle": True,
        "tensor_meta": None,
    }
    members[config] = json.dumps(known).encode()
    members[f"archive/data/{kind}/{file}"] = data


def replace(members: Members, program: Any, old: str, new: str) -> None:
    """Exchange a string wherever the archive's JSON has it."""
    for name in [name for name in members if name.endswith("_config.json")]:
        members[name] = members[name].replace(json.dumps(old).encode(), json.dumps(new).encode())
    changed = json.loads(json.dumps(program).replace(json.dumps(old), json.dumps(new)))
    program.clear()
    program.update(changed)


def out_spec(program: Any, kind: str, context: object) -> None:
    leaf = {"type": None, "context": None, "children_spec": []}
    spec = [1, {"type": kind, "context": context, "children_spec": [leaf]}]
    signature(program)["out_spec"] = json.dumps(spec)


Attack = Callable[[Members, Any, Path], None]


def a_formula(members: Members, program: Any, marker: Path) -> None:
    # Not source(): sympy would make its own numbers of the bytes.
    text = f"__import__('os').system('touch {marker}')"
    size = {"as_expr": {"expr_str": text, "hint": None}}
    graph(program)["tensor_values"]["x"]["sizes"][0] = size


def a_formula_without_a_word(members: Members, program: Any, marker: Path) -> None:
    a_formula(members, program, marker)
    size = graph(program)["tensor_values"]["x"]["sizes"][0]["as_expr"]
    size["expr_str"] = f"Max('{''.join(f'{chr(92)}{ord(c):03o}' for c in size['expr_str'])}')"


def a_guard(members: Members, program: Any, marker: Path) -> None:
    program["guards_code"] = [f"{source(marker)} is None"]


def pickled_samples(members: Members, program: Any, marker: Path) -> None:
    members[SAMPLES] = pickled(((Touch(marker), "zip"), {}))


def a_key_of_the_samples(members: Members, program: Any, marker: Path) -> None:
    members[SAMPLES] = pickled((({f'\'"+str({source(marker)})+"': torch.ones(3, 4)}, "zip"), {}))


def a_pickled_constant(members: Members, program: Any, marker: Path) -> None:
    payload(members, "constants", "opaque_obj_0", pickle.dumps(Touch(marker)))


def a_pickled_weight(members: Members, program: Any, marker: Path) -> None:
    payload(members, "weights", "weight_9", pickled(Touch(marker)))


def the_name_of_a_node(members: Members, program: Any, marker: Path) -> None:
    replace(members, program, "mode", f"mode={source(marker)}")


def the_name_of_an_argument(members: Members, program: Any, marker: Path) -> None:
    lines = f'x, mode):\n    {source(marker)}\n    x, = list(([x, """'
    signature(program)["forward_arg_names"] = [lines, "mode"]


def the_name_of_a_keyword(members: Members, program: Any, marker: Path) -> None:
    target = "torch._functorch.predispatch.lazy_load_decompositions"
    call(program, target, {"as_int": 1}, name=f"a={source(marker)}, b")


def the_name_of_a_parameter(members: Members, program: Any, marker: Path) -> None:
    replace(members, program, "linear.weight", f'w", {source(marker)})#')


def a_text_for_an_input(members: Members, program: Any, marker: Path) -> None:
    text = f"' or {source(marker)} or '"
    for place in (graph(program)["inputs"], program["graph_module"]["signature"]["input_specs"]):
        place[:] = json.loads(json.dumps(place).replace('"zip"', json.dumps(text)))


def an_import_by_an_enum(members: Members, program: Any, marker: Path) -> None:
    key = {"__enum__": True, "fqn": f"{marker.stem}:A", "name": "B"}
    out_spec(program, "builtins.dict", json.dumps([key]))


def an_import_by_a_defaultdict(members: Members, program: Any, marker: Path) -> None:
    names = {"default_factory_module": marker.stem, "default_factory_name": "A"}
    out_spec(program, "collections.defaultdict", {**names, "dict_context": ["a"]})


def an_import_by_a_node(members: Members, program: Any, marker: Path) -> None:
    target = "torch.export.custom_ops._call_custom_autograd_function_in_pre_dispatch"
    call(program, target, {"as_string": f"{marker.stem}.A"})


def a_file_made_by_an_operator(members: Members, program: Any, marker: Path) -> None:
    args = ({"as_string": str(marker)}, {"as_bool": True}, {"as_int": 6})
    call(program, "torch.ops.aten.from_file.default", *args)
    node = graph(program)["nodes"][-1]
    for given, name in zip(node["inputs"], ("filename", "shared", "size"), strict=True):
        given["name"] = name
    node["outputs"] = [{"as_tensor": {"name": "extra"}}]
    values = graph(program)["tensor_values"]
    values["extra"] = values["x"]


# All of these run on torch 2.13; the refusal of those below is one more lock on a closed door.
RUN = [
    *(a_formula, a_formula_without_a_word, a_guard, pickled_samples, a_key_of_the_samples),
    *(a_pickled_constant, a_pickled_weight, the_name_of_a_node, the_name_of_an_argument),
    *(the_name_of_a_keyword, the_name_of_a_parameter, a_text_for_an_input, an_import_by_an_enum),
    *(an_import_by_a_defaultdict, an_import_by_a_node, a_file_made_by_an_operator),
]


def a_call_of(target: str) -> Attack:
    def attack(members: Members, program: Any, marker: Path) -> None:
        call(program, target, {"as_string": f"touch {marker}"})

    return attack


def an_operator_argument(members: Members, program: Any, marker: Path) -> None:
    target = "torch.ops.higher_order.cond"
    call(program, target, {"as_operator": "torch.os.system"}, {"as_string": f"touch {marker}"})


def a_name_in_a_keyword_key(members: Members, program: Any, marker: Path) -> None:
    _, tree = json.loads(signature(program)["in_spec"])
    tree["children_spec"][1]["context"] = json.dumps([f"k':{source(marker)},'q"])
    signature(program)["in_spec"] = json.dumps([1, tree])


def a_custom_object(members: Members, program: Any, marker: Path) -> None:
    graph(program)["custom_obj_values"]["a"] = {"name": "a", "class_fqn": "__torch__.A"}


def compiled_code(members: Members, program: Any, marker: Path) -> None:
    members["archive/data/aotinductor/model/model.so"] = b"\x7fELF"


def a_mention_of_compiled_code(members: Members, program: Any, marker: Path) -> None:
    members["archive/data/aotinductor/model/weights_config.json"] = b"{}"


def text_that_torch_compile_pastes_into_c(members: Members, program: Any, marker: Path) -> None:
    message = {"as_string": f'a" + (system("touch {marker}"), 0) + *"'}
    call(program, "torch.ops.aten._assert_async.msg", {"as_tensor": {"name": "x"}}, message)


def a_program_under_another_name(members: Members, program: Any, marker: Path) -> None:
    other = copy.deepcopy(program)
    a_guard(members, other, marker)
    members["archive/models/extra/data"] = json.dumps(other).encode()


def a_program_in_a_subgraph(members: Members, program: Any, marker: Path) -> None:
    inner = copy.deepcopy(graph(program))
    call({"graph_module": {"graph": inner}}, "torch.os.system", {"as_string": "ls"})
    call(program, "torch.ops.higher_order.cond", {"as_graph": {"name": "a", "graph": inner}})


def a_name_that_looks_like_a_free_text(members: Members, program: Any, marker: Path) -> None:
    inner = {"as_operator": "torch.os.system"}
    call(program, "torch.ops.aten.add.Tensor", {"as_string_to_argument": {"metadata": inner}})


CALLS = [
    "torch.os.system",
    "torch.serialization.os.system",
    "torch.builtins.exec",
    "torch.ops.load_library",
    "torch.ops.aten.save.default",
    "torch.ops.aten._print.default",
    "torch.ops.aten.linear",
    "torch.ops.higher_order.aoti_call_delegate",
    "torch.ops.higher_order.call_torchbind",
    "torch.ops.higher_order.print",
    "torch.ops.c10d.send.default",
    "_operator.call",
    "_operator.attrgetter",
    "_operator.methodcaller",
    "_operator.add.__self__",
    "math.os",
    "#extension:op",
]
OTHERS: dict[str, Attack] = {target: a_call_of(target) for target in CALLS} | {
    attack.__name__: attack
    for attack in (
        *(an_operator_argument, a_name_in_a_keyword_key, a_custom_object, compiled_code),
        a_mention_of_compiled_code,
        *(text_that_torch_compile_pastes_into_c, a_program_under_another_name),
        *(a_program_in_a_subgraph, a_name_that_looks_like_a_free_text),
    )
}

PLAIN_TORCH = """
import logging, sys, torch
logging.disable()
for path in sys.argv[1:]:
    try:
        torch.export.load(path).module()(torch.ones(3, 4), "zip")
    except Exception as error:
        print(path, str(error)[:100], file=sys.stderr)
"""


@pytest.fixture(scope="module")
def small() -> Members:
    """The members of a good archive."""
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(Small(), (torch.ones(3, 4), "zip")), buffer)
    with zipfile.ZipFile(buffer) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def craft(small: Members, attack: Attack, path: Path) -> Path:
    """Write the archive of an attack; gives the file that would be there if it ran."""
    members, program, marker = dict(small), json.loads(small[PROGRAM]), path.with_suffix(".ran")
    attack(members, program, marker)
    members[PROGRAM] = json.dumps(program).encode()
    write(path, members)
    return marker


def write(path: Path, members: Members) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)


@pytest.fixture(scope="module")
def older() -> Members:
    """The members of a good archive in the layout that torch wrote until 2.7, and still reads."""
    from torch._export.serde.serialize import serialize

    made = serialize(torch.export.export(Small(), (torch.ones(3, 4), "zip")))
    return {
        "version": b"8.8",
        "serialized_exported_program.json": made.exported_program,
        "serialized_state_dict.pt": made.state_dict,
        "serialized_constants.pt": made.constants,
        "serialized_example_inputs.pt": made.example_inputs,
        "extra_files/note.txt": b"made in 2025",
    }


def craft_in_the_older_layout(small: Members, older: Members, path: Path) -> Path:
    name, marker = "serialized_exported_program.json", path.with_suffix(".ran")
    program = json.loads(older[name])
    a_formula({}, program, marker)
    write(path, older | {name: json.dumps(program).encode()})
    return marker


def craft_for_torch_alone(small: Members, older: Members, path: Path) -> Path:
    """An attack that zipfile does not see."""
    program, marker = json.loads(small[PROGRAM]), path.with_suffix(".ran")
    a_guard({}, program, marker)
    write_for_two_readers(path, small | {PROGRAM: json.dumps(program).encode()}, small)
    return marker


def write_for_two_readers(path: Path, for_torch: Members, for_zipfile: Members) -> None:
    """An archive of two directories: torch goes to the one that it names, zipfile to the last."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for members in (for_torch, for_zipfile):
            for name, data in members.items():
                archive.writestr(name, data)
    written, ends = buffer.getvalue()[: archive.start_dir], []
    entries = re.split(rb"(?=PK\x01\x02)", buffer.getvalue()[archive.start_dir : -22])[1:]
    for part in (entries[: len(for_torch)], entries[len(for_torch) :]):
        sizes = (len(part), len(part), sum(map(len, part)), len(written))
        written += b"".join(part)
        ends.append(len(written))
        written += struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, *sizes)
    written += struct.pack("<4sLQL", b"PK\x06\x07", 0, ends[0], 1)
    written += struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, *[2**16 - 1] * 2, *[2**32 - 1] * 2, 0)
    path.write_bytes(written)


ARCHIVES = [craft_in_the_older_layout, craft_for_torch_alone]


def refusal(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        pt2_trust.inspect(path)
    assert caught.value.key == "model.path"
    assert str(caught.value).startswith(str(path))
    return str(caught.value)


TRUST = "; if you trust the file, run with --trust-code"


@pytest.mark.skipif(not torch.__version__.startswith("2.13"), reason="shown for torch 2.13 only")
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_plain_torch_runs_what_the_attacks_say(
    small: Members, older: Members, tmp_path: Path
) -> None:
    paths = [tmp_path / f"{attack.__name__}.pt2" for attack in RUN]
    markers = [craft(small, attack, path) for attack, path in zip(RUN, paths, strict=True)]
    for marker in markers:  # the modules that some of them import
        (tmp_path / f"{marker.stem}.py").write_text(f"open({str(marker)!r}, 'w')\n")
    for build in ARCHIVES:
        paths.append(tmp_path / f"{build.__name__}.pt2")
        markers.append(build(small, older, paths[-1]))
    command = [sys.executable, "-W", "ignore", "-c", PLAIN_TORCH, *map(str, paths)]
    said = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path).stderr
    assert [marker.stem for marker in markers if not marker.exists()] == [], said


@pytest.mark.parametrize("attack", RUN, ids=lambda attack: attack.__name__)
def test_inspect_refuses_each_of_them_and_runs_nothing(
    attack: Attack, small: Members, tmp_path: Path
) -> None:
    marker = craft(small, attack, tmp_path / "m.pt2")
    assert refusal(tmp_path / "m.pt2").endswith(TRUST)
    assert not marker.exists()


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("build", ARCHIVES, ids=lambda build: build.__name__)
def test_inspect_refuses_them_in_every_layout_and_from_every_reader(
    build: Callable[..., Path], small: Members, older: Members, tmp_path: Path
) -> None:
    marker = build(small, older, tmp_path / "m.pt2")
    assert refusal(tmp_path / "m.pt2").endswith(TRUST)
    assert not marker.exists()


@pytest.mark.parametrize("name", OTHERS)
def test_inspect_refuses_what_this_torch_may_refuse_too(
    name: str, small: Members, tmp_path: Path
) -> None:
    craft(small, OTHERS[name], tmp_path / "m.pt2")
    assert refusal(tmp_path / "m.pt2").endswith(TRUST)


def test_the_archive_that_the_attacks_start_from_passes(small: Members, tmp_path: Path) -> None:
    craft(small, lambda *_: None, tmp_path / "m.pt2")
    pt2_trust.inspect(tmp_path / "m.pt2")


def test_an_archive_of_the_older_layout_passes_and_runs(older: Members, tmp_path: Path) -> None:
    write(tmp_path / "m.pt2", older)
    pt2_trust.inspect(tmp_path / "m.pt2")
    with pt2_trust.weights_only_loads():
        loaded = torch.export.load(tmp_path / "m.pt2").module()
    assert loaded(torch.ones(3, 4), "zip").shape == (3, 2)


# --- unpickling --------------------------------------------------------------------------------


def test_weights_that_need_unpickling_fail_to_load_and_run_nothing(
    small: Members, tmp_path: Path
) -> None:
    path, marker = tmp_path / "m.pt2", tmp_path / "m.ran"
    write(
        path, small | {"archive/data/weights/model.pt": pickled({"linear.weight": Touch(marker)})}
    )
    pt2_trust.inspect(path)  # weights are not read here: they may be large
    with pt2_trust.weights_only_loads(), pytest.raises(Exception, match=r"(?i)weights.only"):
        torch.export.load(path)
    assert not marker.exists()


def test_in_the_block_even_an_explicit_load_of_more_than_weights_fails(tmp_path: Path) -> None:
    torch.save(Touch(tmp_path / "ran"), tmp_path / "m.pt")
    with pt2_trust.weights_only_loads(), pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "m.pt", weights_only=False)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("before", [None, "0", "1"])
def test_the_block_leaves_the_environment_as_it_was(
    before: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"):
        monkeypatch.delenv(name, raising=False)
    if before is not None:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", before)
    known = dict(os.environ)
    with pytest.raises(pickle.UnpicklingError), pt2_trust.weights_only_loads():
        torch.load(io.BytesIO(pickled(Touch(Path("never")))), weights_only=False)
    assert dict(os.environ) == known


# --- other files -------------------------------------------------------------------------------


def test_a_torchscript_archive_is_sent_to_its_source(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), tmp_path / "m.pt2")
    assert refusal(tmp_path / "m.pt2").endswith("set model.source to torchscript")


def test_a_checkpoint_is_sent_to_the_sources_that_take_weights(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "m.pt2")
    assert "model.weights" in refusal(tmp_path / "m.pt2")


@pytest.mark.parametrize("data", [b"", b"\x80\x04N.", b"PK\x05\x06" + bytes(18)])
def test_a_file_that_is_no_archive_is_refused_in_a_sentence(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.pt2").write_bytes(data)
    assert "is no .pt2 archive" in refusal(tmp_path / "m.pt2")


def test_a_cut_archive_is_refused_in_a_sentence(small: Members, tmp_path: Path) -> None:
    write(tmp_path / "m.pt2", small | {PROGRAM: small[PROGRAM][:-100]})
    assert "is no .pt2 archive" in refusal(tmp_path / "m.pt2")


def test_a_program_too_large_to_look_through_is_refused(
    small: Members, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "m.pt2", small)
    monkeypatch.setattr(pt2_trust, "_MOST_BYTES", 1000)
    assert "too large" in refusal(tmp_path / "m.pt2")
    monkeypatch.setattr(pt2_trust, "_MOST_MEMBERS", 3)
    assert "members" in refusal(tmp_path / "m.pt2")
