"""Whether a .pt2 archive can be loaded and run without running code that the file chose.

torch.export.load pastes the file's names into Python source, evaluates its formulas, and imports
and unpickles what it names; whatever reaches such a place must be on a list here.
"""

from __future__ import annotations

import io
import json
import os
import re
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from gradrun.core.errors import ConfigError
from gradrun.models.archives import HostileError, check_claim
from gradrun.models.pickles import check_checkpoint


def _each(prefix: str, names: str) -> set[str]:
    return {prefix + name for name in names.split()}


_MOST_MEMBERS, _MOST_BYTES = 100_000, 256 * 2**20

# The members of an archive, of today's layout and of the one that torch wrote until 2.7.
_JSON = re.compile(
    r"models/.*|serialized_exported_program\.json|data/(weights|constants)/.*_config\.json"
)
_SAMPLES = re.compile(r"data/sample_inputs/[^/]+\.pt|serialized_example_inputs\.pt")
_DATA = re.compile(
    r"data/weights/weight_\d+|data/constants/tensor_\d+|data/(weights|constants)/[^/]+\.pt"
    r"|serialized_(state_dict|constants)\.(pt|json)|extra(_files)?/.*|archive_(format|version)"
    r"|version|byteorder|\.data/\w+|\.format_version|\.storage_alignment"
)

# Strings, by the key they lie under. Most become names in the Python source that torch generates,
# so a key not listed may hold no more than a name.
_NAME, _DOTTED = re.compile(r"\w*"), re.compile(r"[\w.@+-]*")
# Pasted into Python between single quotes (a dict's key, an input's text), into torch.compile's
# C++ between double quotes (an operator's text), and kept beside a node but never called.
_KEY, _TEXT = re.compile(r"[\w .:/@+-]*"), re.compile(r'[^"\\\x00-\x1f\x7f]*')
_COMMENT = re.compile(r"[^\x00-\x08\x0b-\x1f\x7f]*")
_STRINGS = {
    **dict.fromkeys(
        "stack_trace nn_module_stack source_fn_stack torch_fn from_node".split(), _COMMENT
    ),
    **dict.fromkeys("parameter_name buffer_name tensor_constant_name".split(), _DOTTED),
    **dict.fromkeys("fqn torch_version".split(), _DOTTED),
    **dict.fromkeys("as_float as_floats real imag".split(), re.compile("-?Infinity|NaN")),
    "as_string": _KEY,
    "path_name": re.compile(r"(weight|tensor)_\d+"),  # the other kinds are pickles
    "class_fqn": re.compile(r"(?!)"),  # an object of a class is no tensor: nothing is allowed
}

_OPERATOR = re.compile(r"torch\.ops\.(aten|prims|quantized_decomposed|torchvision)\.(\w+)\.(\w+)")
_WRITERS = {"from_file", "_print"}  # the two that write where the file says; the others compute
_FUNCTIONS = {
    *_each("_operator.", "add sub mul truediv floordiv mod pow neg pos abs eq ne lt le gt ge and_"),
    *_each("_operator.", "or_ not_ lshift rshift"),
    *_each("math.", "trunc ceil floor"),
    *_each("torch.sym_", "not int float ite max min sqrt sum"),
    *_each("torch.ops.higher_order.", "cond while_loop scan associative_scan map_impl out_dtype"),
    *_each("torch.ops.higher_order.", "wrap_with_set_grad_enabled wrap_with_autocast strict_mode"),
    *_each("torch.ops.higher_order.", "invoke_subgraph hints_wrapper tag_activation_checkpoint"),
    *_each("torch._functorch.predispatch._", "add_batch_dim remove_batch_dim"),
    *_each("torch._functorch.predispatch._vmap_", "increment_nesting decrement_nesting"),
    *_each("torch.", "_sym_sqrt _functorch.predispatch.lazy_load_decompositions"),
}

# A formula or guard made of these words, numbers and signs alone reaches nothing else, however
# they are put together: that is easier to be sure of than any parse of it. (e: of 1.5e-8)
_SYMBOL = re.compile(r"(s|u|z|zf|zuf|ps|tmp)\d+|e\d*")
_MATH = "sqrt cos cosh sin sinh tan tanh asin asinh acos atan exp log log2 floor ceil"
_FORMULA = re.compile(r"[\w ().,'=+*/%<>&|~-]*", re.ASCII)
_FORMULA_WORDS = _each("OpaqueUnaryFn_", _MATH) | _each(
    "",
    f"{_MATH} Symbol positive nonnegative nonzero integer real finite precision True False true "
    "false oo int_oo Integer Float Rational Add Mul Pow Max Min Mod Abs ceiling Eq Ne Lt Le Gt Ge "
    "Equality Unequality LessThan StrictLessThan GreaterThan StrictGreaterThan And Or Not Where "
    "Piecewise ExprCondPair Tuple FloorDiv CeilDiv CleanDiv PythonMod ModularIndexing CeilToInt "
    "FloorToInt TruncToInt RoundToInt TruncToFloat ToFloat RoundDecimal LShift RShift FloatPow "
    "PowByNatural FloatTrueDiv IntTrueDiv Identity IsNonOverlappingAndDenseIndicator "
    "BitwiseFn_bitwise_and BitwiseFn_bitwise_or BitwiseFn_bitwise_xor",
)
_GUARD = re.compile(r"[\w ().,[\]=!+*/%<>&|~-]*", re.ASCII)
_GUARD_WORDS = _FORMULA_WORDS | _each(
    "",
    "L size stride storage_offset torch math trunc isnan inf max min abs int float round and or "
    "not if else None sym_not sym_int sym_float sym_ite sym_max sym_min sym_sqrt sym_sum _sym_sqrt "
    "cast_symbool_to_symint_guardless",
)
_CONTAINERS = {
    *_each("builtins.", "tuple list dict"),
    *_each("collections.", "OrderedDict deque"),
    *_each("torch.fx.immutable_collections.", "immutable_list immutable_dict"),
    *("torch.Size", None),
}


class _DangerError(Exception):
    """What was found in the archive, as the end of a sentence that begins with its path."""


def inspect(path: Path) -> None:
    """Look through an archive before torch opens it; runs nothing of it.

    Raises:
        ConfigError: It is no archive of torch.export.save, or holds what could run code.
    """
    try:
        for members, read in _views(path):
            _refuse_other_kinds(path, members)
            for member in members:
                _check_member(member, read)
    except (_DangerError, HostileError) as danger:
        text = f"{path} {danger}; if you trust the file, run with --trust-code"
        raise ConfigError(text, "model.path") from None
    except ConfigError:
        raise
    except Exception as error:  # a damaged archive fails in any of a dozen ways
        text = f"{path} is no .pt2 archive as torch.export.save writes it ({type(error).__name__})"
        raise ConfigError(text, "model.path") from error


@contextmanager
def weights_only_loads() -> Iterator[None]:
    """Make every torch.load in the block, in any thread, refuse to unpickle more than tensors."""
    # torch refuses to load anything at all where both variables are set.
    forced = {"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "0"}
    before = {name: os.environ.get(name) for name in forced}
    os.environ.update(forced)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _views(path: Path) -> Iterator[tuple[list[str], Callable[[str], bytes]]]:
    """The members and how to read one: as zipfile sees the archive, then as torch does.

    A crafted file shows each of them other content, and torch.export.load falls back on zipfile.
    """
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if len(names) > _MOST_MEMBERS:
            raise _DangerError(f"has {len(names)} members, more than can be looked through")
        check_claim(path.stat().st_size, sum(info.file_size for info in archive.infolist()))
        root = f"{names[0].split('/')[0]}/"
        root = root if all(name.startswith(root) for name in names) else ""

        def read(member: str) -> bytes:
            if archive.getinfo(root + member).file_size > _MOST_BYTES:
                raise _DangerError(f"holds {member}, which is too large to look through")
            return archive.read(root + member)

        yield [name.removeprefix(root) for name in names], read
    try:
        reader = torch._C.PyTorchFileReader(str(path))
        members = reader.get_all_records()
    except RuntimeError:
        return  # the older layout, which torch reads with zipfile alone
    check_claim(path.stat().st_size, sum(map(reader.get_record_size, members)))
    yield members, reader.get_record


def _refuse_other_kinds(path: Path, members: list[str]) -> None:
    if "constants.pkl" in members:
        text = f"{path} is a TorchScript archive (torch.jit.save); set model.source to torchscript"
        raise ConfigError(text, "model.path")
    if "data.pkl" in members:
        text = (
            f"{path} is a checkpoint (torch.save), which holds weights and no program; give it as "
            "model.weights to source zoo, layers or python"
        )
        raise ConfigError(text, "model.path")


def _check_member(member: str, read: Callable[[str], bytes]) -> None:
    if _JSON.fullmatch(member):
        _check_json(json.loads(read(member).decode()))
    elif _SAMPLES.fullmatch(member):
        _check_samples(read(member))
    elif not _DATA.fullmatch(member):
        raise _DangerError(f"holds {member!r:.80}, which is no part of an exported program")


def _check_json(value: Any, key: str = "", parent: str = "") -> None:
    """Hold every string in `value` against the rule for the key that it lies under."""
    if isinstance(value, dict):
        for name, item in value.items():
            if not _TEXT.fullmatch(name):
                raise _DangerError(f"holds the key {name!r:.80}, which could run code")
            _check_json(item, name, key)
    elif isinstance(value, list):
        for item in value:
            _check_json(item, key, parent)
    elif isinstance(value, str):
        if key in _CHECKS:
            _CHECKS[key](value)
            return
        # The text of an operator's argument; that of an input becomes source, as a name does.
        text = parent == "arg" and key in ("as_string", "as_strings")
        if not (_TEXT if text else _STRINGS.get(key, _NAME)).fullmatch(value):
            raise _DangerError(f"holds {value!r:.80} as {key}, which could run code")
    elif key == "use_pickle" and value:
        raise _DangerError("holds a pickled object")


def _check_operator(target: str) -> None:
    match = _OPERATOR.fullmatch(target)
    if match is not None and match[2] not in _WRITERS:
        overload = "" if match[3] == "default" else match[3]
        try:  # TorchScript's own operators, of which aten::save is one, are not the dispatcher's
            torch._C._dispatch_find_schema_or_throw(f"{match[1]}::{match[2]}", overload)
            return
        except RuntimeError:
            pass
    if target not in _FUNCTIONS:
        raise _DangerError(f"calls {target!r:.80}, which is not known to only compute")


def _check_formula(text: str) -> None:
    words = set(re.findall(r"[^\W\d]\w*", text)) - _FORMULA_WORDS
    if not _FORMULA.fullmatch(text) or not all(map(_SYMBOL.fullmatch, words)):
        raise _DangerError(f"holds the formula {text!r:.80}, which could run code")


def _check_guard(text: str) -> None:
    bare = re.sub(r"\['[\w .:/@+-]*'\]", "[]", text)  # without the names of the inputs
    if not _GUARD.fullmatch(bare) or set(re.findall(r"[^\W\d]\w*", bare)) - _GUARD_WORDS:
        raise _DangerError(f"holds the guard {text!r:.80}, which could run code")


def _check_tree(text: str) -> None:
    _, tree = json.loads(text)
    pending = [tree]
    while pending:
        node = pending.pop()
        if node["type"] not in _CONTAINERS:
            raise _DangerError(f"holds a container of type {node['type']!r:.80}")
        context = None if node["context"] is None else json.loads(node["context"])
        for key in context if isinstance(context, list) else [context]:
            _check_key(key)
        pending += node["children_spec"]


def _check_samples(data: bytes) -> None:
    """The keys of the sample inputs: torch pastes them into the source of the guards."""
    try:
        check_checkpoint(io.BytesIO(data))
        pending = [torch.load(io.BytesIO(data), "cpu", weights_only=True)] if data else []
    except Exception:  # whatever torch says of it: it does not load without unpickling
        raise _DangerError("has sample inputs that only unpickling can read") from None
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            for key in value:
                _check_key(key)
            value = list(value.values())
        pending += value if isinstance(value, list | tuple) else []


def _check_key(key: object) -> None:
    if isinstance(key, str) and _KEY.fullmatch(key):
        return
    if key is not None and not isinstance(key, int | float):
        raise _DangerError(f"holds the key {key!r:.80}, which could run code")


_CHECKS: dict[str, Callable[[str], None]] = {
    "target": _check_operator,
    "as_operator": _check_operator,
    "expr_str": _check_formula,
    "guards_code": _check_guard,
    "in_spec": _check_tree,
    "out_spec": _check_tree,
}
