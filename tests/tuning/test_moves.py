"""Which settings a tuning tries, and when."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gradrun.config.load import load_config
from gradrun.core.errors import ConfigError
from gradrun.tuning import moves
from gradrun.tuning.constraints import Constraints
from gradrun.tuning.facts import Facts, apply, value_of
from gradrun.tuning.moves import MOVES, Move, applicable
from tests.support.planted_search import BASE, planted_facts

BERT = {"source": "huggingface", "path": "bert"}
COMPILED = {"model.compile": {"freezing": True}}
OPENVINO = {"model.compile": {"backend": "openvino"}}
CUDAGRAPHS = {"model.compile": {"backend": "cudagraphs"}}
REDUCED = {"model.compile": {"mode": "reduce-overhead"}}


def row(name: str) -> Move:
    """Return the first row of the table with this name."""
    return next(move for move in MOVES if move.name == name)


def facts_of(changes: dict[str, Any] | None = None, **given: Any) -> Facts:
    """Return the facts of a linear model with changed keys and properties."""
    sections = {key: value for key, value in (changes or {}).items() if "." not in key}
    keys = {key: value for key, value in (changes or {}).items() if "." in key}
    config = load_config(BASE | sections, keys).config
    return replace(
        planted_facts(),
        **{"config": config, "constraints": Constraints(config.tune, config.measure)} | given,
    )


def within(**tolerance: Any) -> dict[str, Any]:
    return {"tune.within": tolerance}


@pytest.mark.parametrize(
    ("name", "facts", "reason"),
    [
        ("decode threads", {}, "the data are not image or audio files"),
        ("length order", {}, "the data are not texts"),
        ("memory format", {}, "the model has no Conv2d"),
        ("memory format", {"modules": {"Conv2d": 1}}, ""),
        ("fast path", {}, "the model has no nn.TransformerEncoderLayer"),
        ("fast path", {"modules": {"MultiheadAttention": 1}}, ""),
        ("attention", {}, "the model is not from transformers"),
        ("attention", {"changes": {"model": BERT}}, ""),
        ("compile", {}, ""),
        ("compile", {"has_compiler": False}, "no C++ compiler (g++ or clang++) was found"),
        ("compile", {"changes": {"run.mode": "grad"}}, "run.mode grad"),
        ("autotuned kernels", {}, "a compiled model is not faster"),
        ("autotuned kernels", {"changes": COMPILED}, ""),
        ("worker processes", {}, ""),
        ("worker processes", {"cpus": 1}, "one CPU is available"),
        ("worker processes", {"device": "cuda:0"}, "the model does not run on the CPU"),
        ("threads", {"changes": {"engine": {"source": "processes"}}}, "the config has an engine"),
        (
            "precision", {"cpu_flags": frozenset({"amx_bf16"})},
            "the tolerance is that of float32; --within max_rel=0.01 allows more",
        ),
        (
            "precision", {"changes": within(max_rel=0.01)},
            "the CPU has no instructions for bfloat16",
        ),
        (
            "precision",
            {"changes": within(max_rel=0.01), "cpu_flags": frozenset({"avx512_bf16"})}, "",
        ),
        ("precision", {"changes": within(top1=0.99), "device": "cuda:0"}, ""),
        (
            "precision", {"changes": within(max_rel=1e-4), "device": "cuda:0"},
            "the tolerance is that of float32; --within max_rel=0.01 allows more",
        ),
    ],
)  # fmt: skip
def test_a_move_that_cannot_help_is_skipped_with_the_reason(
    name: str, facts: dict[str, Any], reason: str
) -> None:
    assert row(name).skip(facts_of(facts.pop("changes", None), **facts)) == reason


def test_files_of_exported_programs_keep_their_memory_format(tmp_path: Path) -> None:
    (tmp_path / "m.pt2").touch()
    facts = facts_of({"model": {"source": "exported", "path": str(tmp_path / "m.pt2")}})
    found = replace(facts, modules={"Conv2d": 1})
    assert row("memory format").skip(found) == "the file of the model fixes its memory format"
    # Nor can such a file be cast, but its operators can run with fewer digits.
    assert row("precision").settings(found) == [
        {"run.autocast": "bfloat16"}, {"run.float32_precision": "bf16"},
    ]  # fmt: skip


def test_data_without_a_batch_size_keep_their_batches(tmp_path: Path) -> None:
    (tmp_path / "data.py").touch()
    target = f"{tmp_path / 'data.py'}:loader"
    facts = facts_of({"data": {"source": "python", "target": target, "batch_size": None}})
    names = ("much larger batches", "larger batches", "smaller batches")
    assert {row(name).skip(facts) for name in names} == {"the data have no batch size"}
    assert row("smaller batches").settings(facts) == []
    assert row("smaller batches").settings(facts_of()) == [{"data.batch_size": 4}]
    assert row("smaller batches").settings(facts_of({"data.batch_size": 1})) == []


def test_a_batch_is_not_larger_than_the_data() -> None:
    assert row("much larger batches").settings(facts_of(samples=64)) == [{"data.batch_size": 64}]
    assert row("much larger batches").settings(facts_of(samples=63)) == []


@pytest.mark.parametrize(
    ("mode", "tried"),
    [
        ("grad", ["inference_mode", "no_grad"]),
        ("no_grad", ["inference_mode"]),
        ("inference_mode", []),
    ],
)
def test_modes_that_save_more_are_tried(mode: str, tried: list[str]) -> None:
    found = row("gradient mode").settings(facts_of({"run.mode": mode}))
    assert found == [{"run.mode": better} for better in tried]


def test_precisions_are_tried_once_the_whole_model_first() -> None:
    settings = row("precision").settings
    cast = {"model.dtype": "bfloat16"}
    operators = [{"run.autocast": "bfloat16"}, {"run.float32_precision": "bf16"}]
    assert settings(facts_of()) == [cast, *operators]
    assert settings(facts_of({"model.dtype": "float32"})) == operators
    assert settings(facts_of(operators[0])) == []
    assert settings(facts_of(operators[1])) == []


def test_compilers_are_tried_on_models_that_are_not_compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = row("compile").settings
    monkeypatch.setattr(moves, "find_spec", lambda name: None)
    assert settings(facts_of()) == [COMPILED, {"model.compile": {}}]
    monkeypatch.setattr(moves, "find_spec", lambda name: name == "openvino")
    assert settings(facts_of()) == [COMPILED, {"model.compile": {}}, OPENVINO]
    assert settings(facts_of(COMPILED)) == []


def test_cuda_graphs_follow_the_compiler_of_the_model() -> None:
    settings = row("CUDA graphs").settings
    assert settings(facts_of()) == [CUDAGRAPHS, REDUCED]
    assert settings(facts_of(has_compiler=False)) == [CUDAGRAPHS]
    assert settings(facts_of(COMPILED)) == [{"model.compile.mode": "reduce-overhead"}, CUDAGRAPHS]
    assert settings(facts_of(CUDAGRAPHS)) == []
    assert settings(facts_of(REDUCED)) == []


def test_kernels_are_autotuned_where_the_compiler_has_no_mode() -> None:
    settings = row("autotuned kernels").settings
    assert settings(facts_of(COMPILED)) == [{"model.compile.mode": "max-autotune"}]
    assert settings(facts_of(REDUCED)) == []
    assert settings(facts_of(CUDAGRAPHS)) == []
    assert settings(facts_of()) == []


def test_workers_use_all_cpus_with_fewer_threads_each() -> None:
    found = row("worker processes").settings(facts_of(cpus=6))
    assert [(c["engine"]["workers"], c["run.threads"]) for c in found] == [(6, 1), (3, 2)]


def test_every_move_changes_keys_that_the_config_accepts(tmp_path: Path) -> None:
    """Each setting of each move makes a valid config with its values."""
    (tmp_path / "t.txt").write_text("one\ntwo\n")
    texts = {"source": "text", "path": str(tmp_path / "t.txt"), "tokenizer": "t", "batch_size": 32}
    precision = within(max_rel=0.01)
    several = [
        facts_of(precision, device="cuda:0", modules={"Conv2d": 1, "MultiheadAttention": 1}),
        facts_of(precision | {"model": BERT, "data": texts}, cpus=4, memory=2**40),
        facts_of({"data": {"source": "images", "path": str(tmp_path), "batch_size": 8}}, cpus=4),
        facts_of({"run.mode": "grad"}),
        facts_of(COMPILED, cpus=4),
    ]
    tried: set[str] = set()
    for facts in several:
        for move, reason in applicable(MOVES, facts):
            for changes in () if reason else move.settings(facts):
                try:
                    changed = apply(facts.config, changes)
                except ConfigError as error:
                    pytest.fail(f"{move.name}: {changes}: {error}")
                tried.add(move.name)
                for key, value in changes.items():
                    found = value_of(changed, key)
                    expected = value if not isinstance(value, dict) else found | value
                    assert found == expected, (move.name, key)
    assert tried >= {move.name for move in MOVES} - {"allocator"}  # depends on the libc
