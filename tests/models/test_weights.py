"""Tests of weights from a file: loading, mismatches, and files that could run code."""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import pickle
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model
from torch import nn

from gradrun.core.errors import ConfigError
from gradrun.models import weights
from gradrun.models.weights import _check_tuples, describe_file, load_weights


def net(width: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(2, width), nn.BatchNorm1d(width), nn.Linear(width, 1))


@pytest.fixture
def trained() -> nn.Module:
    torch.manual_seed(1)
    module = net()
    module(torch.randn(8, 2))
    return module


def loaded(path: Path, key: str | None = None) -> dict[str, torch.Tensor]:
    module = net()
    load_weights(module, path, key)
    return module.state_dict()


def load_error(path: Path, key: str | None = None, width: int = 3) -> ConfigError:
    module = net(width)
    with pytest.raises(ConfigError) as caught:
        load_weights(module, path, key)
    return caught.value


def assert_loaded(state: dict[str, torch.Tensor], trained: nn.Module) -> None:
    expected = trained.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert int(state["1.num_batches_tracked"]) == 1, "buffers are loaded"


@pytest.mark.parametrize(
    ("nest", "key"),
    [
        (lambda state: state, None),
        (lambda state: OrderedDict(state), None),
        (lambda state: {"state_dict": state, "epoch": 3}, None),
        (lambda state: {"model": state, "optimizer": {"lr": 0.1}}, None),
        (lambda state: {"model_state_dict": state, "loss": 0.5}, None),
        (lambda state: {"ema": state, "model": {}}, "ema"),
        (lambda state: {"runs": {"best": state}}, "runs.best"),
        (lambda state: {"dotted.name": state}, "dotted.name"),
    ],
)
def test_a_state_dict_is_found_at_the_top_under_a_usual_key_or_under_the_given_key(
    tmp_path: Path, trained: nn.Module, nest: Any, key: str | None
) -> None:
    torch.save(nest(trained.state_dict()), tmp_path / "w.pt")
    assert_loaded(loaded(tmp_path / "w.pt", key), trained)


def test_safetensors_are_loaded(tmp_path: Path, trained: nn.Module) -> None:
    save_file(trained.state_dict(), tmp_path / "w.safetensors")
    assert_loaded(loaded(tmp_path / "w.safetensors"), trained)


def test_a_checkpoint_of_the_legacy_format_is_loaded(tmp_path: Path, trained: nn.Module) -> None:
    torch.save(trained.state_dict(), tmp_path / "w.pt", _use_new_zipfile_serialization=False)
    assert_loaded(loaded(tmp_path / "w.pt"), trained)


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_missing_unexpected_and_misshapen_keys_are_all_listed(
    tmp_path: Path, trained: nn.Module, suffix: str
) -> None:
    state = trained.state_dict()
    state["head.weight"] = state.pop("2.weight")
    state["0.weight"] = torch.zeros(5, 2)
    path = tmp_path / f"w.{suffix}"
    save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
    error = load_error(path)
    assert error.key == "model.weights"
    for words in (
        "missing in the file: 2.weight",
        "not in the model: head.weight",
        "different shape: 0.weight [5, 2] (the model has [3, 2])",
    ):
        assert words in str(error)


def test_a_long_list_of_keys_is_truncated(tmp_path: Path) -> None:
    torch.save({f"k{i}": torch.zeros(1) for i in range(20)}, tmp_path / "w.pt")
    assert "k7 and 12 more" in str(load_error(tmp_path / "w.pt"))


@pytest.mark.parametrize(
    ("nest", "key", "words"),
    [
        (lambda state: {"ema": state, "epoch": 1}, None, "it contains ema, epoch"),
        (lambda state: {"ema": state}, "best", "no state dict under 'best'; it contains ema"),
        (lambda state: {"ema": state}, "ema.best", "no state dict under 'ema.best'"),
        (lambda state: {"epoch": 3}, None, "no state dict at the top"),
        (lambda state: {}, None, "no state dict at the top"),
        (lambda state: [1, 2], None, "it contains a list"),
        (lambda state: torch.zeros(3), None, "it contains a Tensor"),
        (lambda state: torch.zeros(3), "ema", "it contains a Tensor"),
        (lambda state: 7, "ema", "it contains a int"),
        (lambda state: {"model": {"a": 1}}, "model", "no state dict under 'model'"),
    ],
)
def test_the_error_for_a_missing_state_dict_lists_the_contents(
    tmp_path: Path, trained: nn.Module, nest: Any, key: str | None, words: str
) -> None:
    torch.save(nest(trained.state_dict()), tmp_path / "w.pt")
    assert words in str(load_error(tmp_path / "w.pt", key))


class _Attack:
    def __init__(self, mark: Path) -> None:
        self.command = f"touch '{mark}'"

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


@pytest.mark.parametrize("form", ["zip", "old", "pickle"])
def test_a_checkpoint_with_objects_is_an_error_and_runs_no_code(
    tmp_path: Path, trained: nn.Module, form: str
) -> None:
    mark, path = tmp_path / "mark", tmp_path / "w.pt"
    payload = {"state_dict": trained.state_dict(), "config": _Attack(mark)}
    if form == "pickle":
        path.write_bytes(pickle.dumps(_Attack(mark)))
    else:
        torch.save(payload, path, _use_new_zipfile_serialization=form == "zip")
    error = load_error(path)
    assert not mark.exists()
    assert "unpickling them could run code" in str(error)
    if form == "pickle":
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert mark.exists(), "the attack works on torch itself"


def test_a_pickled_module_is_an_error(tmp_path: Path, trained: nn.Module) -> None:
    torch.save(trained, tmp_path / "w.pt")
    assert "torch.save(model.state_dict()" in str(load_error(tmp_path / "w.pt"))


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("damage", ["empty", "text", "head", "tail", "middle"])
def test_a_damaged_file_is_an_error(
    tmp_path: Path, trained: nn.Module, suffix: str, damage: str
) -> None:
    path = tmp_path / f"w.{suffix}"
    state = trained.state_dict()
    save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
    whole = path.read_bytes()
    path.write_bytes(
        {
            "empty": b"",
            "text": b"plain text here\n" * 9,
            "head": whole[: len(whole) // 2],
            "tail": whole[len(whole) // 2 :],
            "middle": whole[:20] + b"\xff" * 40 + whole[60:],
        }[damage]
    )
    assert load_error(path).key == "model.weights"


def test_weights_are_cast_to_the_dtype_of_the_module(tmp_path: Path, trained: nn.Module) -> None:
    half = {name: tensor.half() for name, tensor in trained.state_dict().items()}
    torch.save(half, tmp_path / "w.pt")
    state = loaded(tmp_path / "w.pt")
    assert state["0.weight"].dtype == torch.float32
    assert torch.equal(state["0.weight"], half["0.weight"].float())


def trained_pair() -> tuple[nn.Module, torch.optim.Optimizer]:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    module[1].weight = module[0].weight
    groups = [{"params": [p]} for p in module.parameters()]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99))
    module(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    return module, optimizer


@pytest.mark.parametrize("zipped", [True, False])
def test_a_training_checkpoint_with_all_plain_types_is_loaded(tmp_path: Path, zipped: bool) -> None:
    module, optimizer = trained_pair()
    pair = (1, 2)
    checkpoint = {
        "state_dict": module.state_dict(),
        "optimizer": optimizer.state_dict(),
        "history": OrderedDict(loss=[0.5] * 10_000, pairs=[pair] * 10_000),
        "by key": {pair: torch.ones(2), ("a", (1, 2)): None, 3: True, torch.float32: 1},
        "types": [torch.float16, torch.Size([1, 2]), torch.device("cpu"), {1, 2}],
        "parameter": nn.Parameter(torch.ones(2)),
        "views": [torch.ones(4, 4).t()[1:], torch.ones(1).expand(5), torch.zeros(0, 3)],
    }
    torch.save(checkpoint, tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
    loaded = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    load_weights(loaded, tmp_path / "w.pt", None)
    assert torch.equal(loaded[0].weight, module[0].weight)


# --- keys and contents that torch accepts -------------------------------------------------------


@pytest.mark.parametrize(
    ("prefix", "renamed"),
    [
        ("module.", ["prefix 'module.' removed from all keys"]),
        ("model.", ["prefix 'model.' removed from all keys"]),
        ("net.", ["prefix 'net.' removed from all keys"]),
        ("student.backbone.", ["prefix 'student.backbone.' removed from all keys"]),
        ("_orig_mod.", ["'_orig_mod.' of torch.compile removed from the keys"]),
        (
            "module._orig_mod.model.",
            [
                "'_orig_mod.' of torch.compile removed from the keys",
                "prefix 'module.model.' removed from all keys",
            ],
        ),
    ],
)
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_prefix_of_all_keys_is_removed_and_reported(
    tmp_path: Path, trained: nn.Module, prefix: str, renamed: list[str], suffix: str
) -> None:
    state = {prefix + key: value for key, value in trained.state_dict().items()}
    path = tmp_path / f"w.{suffix}"
    save_file(state, path) if suffix == "safetensors" else torch.save({"state_dict": state}, path)
    module = net()
    notes = load_weights(module, path, None)
    assert [(note.topic, note.text) for note in notes] == [("weights", text) for text in renamed]
    assert_loaded(module.state_dict(), trained)


def test_a_checkpoint_of_a_data_parallel_model_is_loaded(
    tmp_path: Path, trained: nn.Module
) -> None:
    torch.save(nn.DataParallel(trained).state_dict(), tmp_path / "w.pt")
    assert_loaded(loaded(tmp_path / "w.pt"), trained)


def test_a_prefix_that_only_the_model_has_is_added(tmp_path: Path, trained: nn.Module) -> None:
    torch.save(trained.state_dict(), tmp_path / "w.pt")
    module = nn.DataParallel(net())
    (note,) = load_weights(module, tmp_path / "w.pt", None)
    assert note.text == "prefix 'module.' added to all keys"
    assert_loaded(module.module.state_dict(), trained)


def test_a_prefix_of_some_keys_is_not_removed(tmp_path: Path, trained: nn.Module) -> None:
    state = {"module." + key: value for key, value in trained.state_dict().items()}
    torch.save(state | {"epoch": torch.tensor(3)}, tmp_path / "w.pt")
    message = str(load_error(tmp_path / "w.pt"))
    assert "not in the model: module.0.weight" in message
    assert message.endswith(
        "9 of 10 keys fit without their prefix 'module.'; save the file without epoch"
    )


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight


class Extra(nn.Linear):
    words: tuple[str, ...] = ()

    def get_extra_state(self) -> Any:
        return {"words": self.words}

    def set_extra_state(self, state: Any) -> None:
        self.words = state["words"]


class Renaming(nn.Linear):
    def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
        state[f"{prefix}weight"] = state.pop(f"{prefix}kernel")
        super()._load_from_state_dict(state, prefix, *rest)


def test_one_name_of_a_tied_weight_is_enough(tmp_path: Path) -> None:
    saved, module = Tied(), Tied()
    save_model(saved, tmp_path / "w.safetensors")
    assert len(load_file(tmp_path / "w.safetensors")) == 1
    load_weights(module, tmp_path / "w.safetensors", None)
    assert torch.equal(module.head.weight, saved.embedding.weight)
    assert module.head.weight is module.embedding.weight


def test_an_untied_weight_that_is_missing_is_an_error(tmp_path: Path) -> None:
    save_model(Tied(), tmp_path / "w.safetensors")
    module = Tied()
    module.head.weight = nn.Parameter(torch.zeros(11, 6))
    with pytest.raises(ConfigError, match=r"missing in the file: \w+\.weight$"):
        load_weights(module, tmp_path / "w.safetensors", None)


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_batch_norm_without_a_batch_counter_is_loaded(
    tmp_path: Path, trained: nn.Module, suffix: str
) -> None:
    state = {k: v for k, v in trained.state_dict().items() if "num_batches" not in k}
    path = tmp_path / f"w.{suffix}"
    save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
    found = loaded(path)
    assert all(torch.equal(found[name], state[name]) for name in state)


def test_the_names_of_the_former_weight_norm_are_loaded(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates it
        saved = nn.utils.weight_norm(nn.Linear(4, 3))
    assert "weight_g" in saved.state_dict()
    torch.save(saved.state_dict(), tmp_path / "w.pt")
    module = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))
    load_weights(module, tmp_path / "w.pt", None)
    x = torch.randn(2, 4)
    assert torch.allclose(module(x), saved(x))


def test_modules_that_rename_keys_or_store_extra_state_load_them(tmp_path: Path) -> None:
    saved = Extra(4, 2)
    saved.words = ("a", "b")
    torch.save(saved.state_dict(), tmp_path / "w.pt")
    module = Extra(4, 2)
    load_weights(module, tmp_path / "w.pt", None)
    assert module.words == ("a", "b")
    torch.save({"kernel": saved.weight, "bias": saved.bias}, tmp_path / "k.pt")
    renaming = Renaming(4, 2)
    load_weights(renaming, tmp_path / "k.pt", None)
    assert torch.equal(renaming.weight, saved.weight)


def test_packed_parameters_of_a_quantized_model_are_loaded(tmp_path: Path) -> None:
    def quantized() -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch deprecates it
            return torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 2)))

    torch.manual_seed(1)
    saved = quantized()
    torch.save(saved.state_dict(), tmp_path / "w.pt")
    module = quantized()
    load_weights(module, tmp_path / "w.pt", None)
    x = torch.randn(3, 4)
    assert torch.equal(module(x), saved(x))


@pytest.mark.parametrize(
    "checkpoint",
    [
        lambda module: {
            "state_dict": module.state_dict(),
            "args": argparse.Namespace(lr=0.1),
            "path": Path("data"),
        },
        lambda module: module,
        lambda module: {"model": module, "epoch": 3},
    ],
    ids=["a namespace inside", "a module", "a module inside"],
)
def test_objects_in_a_checkpoint_are_loaded_with_trust_only(
    tmp_path: Path, trained: nn.Module, checkpoint: Any
) -> None:
    path = tmp_path / "w.pt"
    torch.save(checkpoint(trained), path)
    assert "pass trust_code=True" in str(load_error(path))
    module = net()
    load_weights(module, path, None, trust_code=True)
    assert_loaded(module.state_dict(), trained)


def test_a_trusted_file_that_torch_cannot_load_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "w.pt").write_bytes(b"plain text here")
    with pytest.raises(ConfigError, match=r"cannot be read by torch\.load"):
        load_weights(net(), tmp_path / "w.pt", None, trust_code=True)


def test_the_hash_in_the_description_is_that_of_sha256sum(tmp_path: Path) -> None:
    (tmp_path / "w.pt").write_bytes(b"abc" * 1000)
    expected = hashlib.sha256(b"abc" * 1000).hexdigest()[:8]
    assert describe_file(tmp_path / "w.pt") == f"w.pt (sha256 {expected})"


def test_a_file_that_was_removed_is_described_by_its_name(tmp_path: Path) -> None:
    assert describe_file(tmp_path / "w.pt") == "w.pt"


def test_a_compressed_archive_is_refused_and_a_stored_one_is_loaded(
    tmp_path: Path, trained: nn.Module
) -> None:
    """torch.load would allocate all that it expands to."""
    torch.save(trained.state_dict(), tmp_path / "w.pt")
    torch.save({"zeros": torch.zeros(100_000)}, tmp_path / "zeros.pt")

    def packed(name: str, kind: int) -> Path:
        with (
            zipfile.ZipFile(tmp_path / name) as whole,
            zipfile.ZipFile(tmp_path / f"{kind}-{name}", "w", kind) as copied,
        ):
            for member in whole.namelist():
                copied.writestr(member, whole.read(member))
        return tmp_path / f"{kind}-{name}"

    assert_loaded(loaded(packed("w.pt", zipfile.ZIP_STORED)), trained)
    text = str(load_error(packed("zeros.pt", zipfile.ZIP_DEFLATED)))
    assert "is a compressed archive, which torch.save does not write; save it again" in text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"weights", "w.pt is not a checkpoint of torch.save"),
        (pickle.dumps(argparse.Namespace(a=1), 2), "contains Python objects besides tensors"),
        (b"\x80\x02\x85.", "contains Python objects besides tensors"),  # takes from an empty stack
    ],
)
def test_files_without_tensors_are_named(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "w.pt").write_bytes(content)
    assert words in str(load_error(tmp_path / "w.pt"))


def test_large_files_are_hashed_by_evenly_spaced_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "_HASHED_BLOCKS", 3)
    monkeypatch.setattr(weights, "_HASHED_BLOCK_BYTES", 2)
    (tmp_path / "w.pt").write_bytes(b"ab..cd..ef")
    expected = hashlib.sha256(b"abcdef").hexdigest()[:8]
    assert describe_file(tmp_path / "w.pt") == f"w.pt (sampled sha256 {expected})"


# --- checkpoints that torch.load cannot handle: in attack_files.py, by the command ---------------


@pytest.mark.parametrize(
    ("opcodes", "allowed"),
    [
        (b"]" + b"]a" * 1000, True),
        (b")" + b"\x85" * 90, True),
        (b")" + b"\x85" * 101, False),
        (b")q\x00" + b"".join(b"h%c\x86q%c" % (i, i + 1) for i in range(20)), True),
        (b")q\x00" + b"".join(b"h%c\x86q%c" % (i, i + 1) for i in range(40)), False),
        (b"ctorch\nSize\n" + b")" + b"\x85" * 60 + b"R" + b"\x85" * 60, False),
        (b"ctorch\nSize\n" + b")" + b"\x85" * 60 + b"R}b" + b"\x85" * 60, False),
        (b"ctorch\nSize\n" + b")" + b"\x85" * 60 + b"\x81" + b"\x85" * 60, False),
        (b"K\x01" * 4 + b"\x87" + b"\x85" * 10 + b"0", True),
    ],
)
def test_tuples_are_limited_in_depth_and_size(opcodes: bytes, allowed: bool) -> None:
    file = io.BytesIO(b"\x80\x02" + opcodes + b".")
    if allowed:
        _check_tuples(file, Path("w.pt"))
    else:
        with pytest.raises(ConfigError, match=r"w\.pt contains tuples nested without limit"):
            _check_tuples(file, Path("w.pt"))
