"""The user's own data: what a target may return, which inputs it has, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter

from gradrun.config.data import DataConfig
from gradrun.core.errors import ConfigError
from gradrun.data import open_data
from gradrun.data.batch import Batch
from gradrun.data.prefetch import should_prefetch
from gradrun.data.source import BatchSource

COUNT, SIZE = 23, 4

CODE = """
import random
from collections import namedtuple
import numpy as np
import torch
from torch.utils.data import *

COUNT = 23


def item(i):
    return torch.tensor([i, i + 0.5]), i % 3


texts = ["a", "b", "c"]


class Pairs(Dataset):
    def __init__(self, count=COUNT, bad=(), short=()):
        self.count, self.bad, self.short = count, bad, short

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        if i in self.bad:
            raise ValueError(f"item {i} is broken")
        x, y = item(i)
        return (x[:1] if i in self.short else x), y


class Stream(IterableDataset):
    def __iter__(self):
        return iter([item(i) for i in range(COUNT)])


class NoLength(Dataset):
    def __getitem__(self, i):
        return item(i)


def generator(fails_at=None):
    for i in range(COUNT):
        if i == fails_at:
            raise OSError("the source is gone")
        yield item(i)


def loader(**options):
    return DataLoader(Pairs(), batch_size=4, **options)


def sampled(kind):
    dataset = Pairs()
    return {
        "subset": lambda: DataLoader(dataset, 4, sampler=SubsetRandomSampler([1, 2])),
        "replacement": lambda: DataLoader(dataset, 4, sampler=RandomSampler(dataset, True)),
        "batches": lambda: DataLoader(dataset, batch_sampler=BatchSampler([1, 2], 2, False)),
        "no batches": lambda: DataLoader(dataset, batch_size=None),
    }[kind]()


def dicts():
    return [{"x": item(i)[0], "n": i, "name": f"é{i}", "y": "cat" if i % 2 else "dog"}
            for i in range(COUNT)]


def noisy():
    return [lambda: 0][:0] or Noisy()


class Noisy(Pairs):
    def __getitem__(self, i):
        return torch.rand(2)


class Named(Pairs):
    def __getitem__(self, i):
        return torch.zeros(2), "text"


def series():
    return [torch.arange(float(1 + i % 5)) for i in range(COUNT)]


def pad(items):
    lengths = torch.tensor([len(x) for x in items])
    return torch.nn.utils.rnn.pad_sequence(items, batch_first=True), lengths


def pad_dict(items):
    values, lengths = pad(items)
    return {"x": values, "n": lengths}


def time_first(items):
    return torch.stack([x for x, _ in items], 1)


def fails_on_5(items):
    if any(y == 2 for _, y in items):
        raise KeyError("no such class")
    return torch.stack([x for x, _ in items])


def dict_of_lists(items):
    return {"x": [x for x, _ in items]}


def counts(items):
    return len(items)


def numpy_batch(items):
    x = np.stack([x.numpy() for x, _ in items])
    return {"x": x, "y": np.array([y for _, y in items]), "n": x[:, 0].astype(int)}


def changes_later(items):
    later = any(x[0] >= 8 for x, _ in items)
    x = torch.stack([x for x, _ in items])
    return {"other" if later else "x": x}


def widens_later(items):
    x = torch.stack([x for x, _ in items])
    return x.double() if x[0, 0] >= 8 else x


def with_total(items):
    if any(y == 2 for _, y in items):
        raise KeyError("no such class")
    x = torch.stack([x for x, _ in items])
    return {"x": x, "names": [f"n{y}" for _, y in items], "total": x.sum(), "size": len(items)}


def refuses_pairs(items):
    if len(items) > 1 or items[0][1] == 1:
        raise ValueError("one at a time")
    return items[0][0][None]


class Together(Pairs):
    # Reads the items of a batch in one call, as the DataLoader of torch supports.

    def __getitems__(self, numbers):
        if self.short:  # a list of another length is not used
            return []
        return [self[i] for i in numbers] if max(numbers) < 20 else 1 / 0


class Fails:
    def __iter__(self):
        raise OSError("no disk")


def parts():
    return [{"x": item(i)[0], "y": {"class": i}, "n": i / 2} for i in range(COUNT)]


def pets():
    names = ["cat", "dog", "bird"]
    return [{"x": item(i)[0], "y": names[min(2, i % 7)], "id": i} for i in range(COUNT)]


class Ids(Pairs):
    def __getitem__(self, i):
        x, y = super().__getitem__(i)
        return {"x": x, "number": i, "name": f"é{i}", "y": ["cat", "dog", "bird"][y]}


def mixed_ids(items):
    return torch.stack([x for x, _ in items]), [y if y < 2 else "two" for _, y in items]


def renamed():
    return [{"x": item(i)[0], "id": f"é{i}" if i > 7 else i} for i in range(COUNT)]


rows = torch.arange(COUNT * 2.0).reshape(COUNT, 2)
lists = rows.tolist()
array = rows.numpy().astype(np.float64)
empty = []
pair = (rows, rows)
number = 3


def fails():
    raise RuntimeError("no connection")


def labelled():
    import pandas
    return pandas.Series([4.0, 5.0, 6.0], index=[2, 0, 1])


def table():
    import pandas
    return pandas.DataFrame({"a": [1.0, 2.0]})
"""


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("code") / "mine.py"
    path.write_text(CODE)
    return path


@pytest.fixture
def opened(code: Path) -> Callable[..., BatchSource]:
    def open_target(name: str, **keys: Any) -> BatchSource:
        if "collate" in keys:
            keys["collate"] = f"{code}:{keys['collate']}"
        keys = {"source": "python", "target": f"{code}:{name}", "batch_size": SIZE, **keys}
        config: Any = TypeAdapter(DataConfig).validate_json(json.dumps(keys))
        return open_data(config, seed=0, trust_code=True)

    return open_target


Opened = Callable[..., BatchSource]


def same(left: Batch, right: Batch) -> bool:
    pairs = zip(left.tensors(), right.tensors(), strict=True)
    return list(left.ids) == list(right.ids) and all(torch.equal(*pair) for pair in pairs)


def expected() -> torch.Tensor:
    return torch.stack([torch.tensor([i, i + 0.5]) for i in range(COUNT)])


def joined(data: BatchSource) -> torch.Tensor:
    batches = [*data.batches()]
    assert [batch.size for batch in batches] == [4] * 5 + [3]
    assert [i for batch in batches for i in batch.ids] == [*range(COUNT)]
    return torch.cat([batch.args[0] for batch in batches])


KINDS: dict[str, dict[str, Any]] = {
    "Pairs": {},
    "Stream": {},
    "generator": {},
    "loader": {},
    "rows": {},
    "array": {},
}


def test_a_series_of_pandas_is_read_by_position_whatever_its_labels(opened: Opened) -> None:
    (batch,) = opened("labelled").batches()
    assert batch.args[0].tolist() == [4, 5, 6]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_data_is_read_in_order(opened: Opened, name: str, workers: int) -> None:
    items = {} if name in {"rows", "array"} else {"inputs": [0]}
    data = opened(name, workers=workers, **items)
    streamed = name in {"Stream", "generator"}
    assert data.samples == (None if streamed else COUNT)
    found = joined(data)
    if items:
        assert torch.equal(found, expected())
    else:
        rows = torch.arange(COUNT * 2.0).reshape(COUNT, 2)
        assert torch.equal(found, rows.double() if name == "array" else rows)
    assert data.samples == COUNT


@pytest.mark.parametrize("workers", [0, 2])
def test_a_range_has_the_batches_of_the_whole_pass(opened: Opened, workers: int) -> None:
    data = opened("Pairs", inputs=[0], workers=workers)
    whole = [*data.batches()]
    next(data.batches())  # abandoned, with batches under way
    for start, stop in [(0, 4), (4, 12), (12, 23), (20, 23), (8, 8)]:
        found = [*data.batches(start, stop)]
        wanted = whole[start // SIZE : -(-stop // SIZE)]
        assert len(found) == len(wanted)
        assert all(same(*pair) for pair in zip(found, wanted, strict=True))


def test_one_batch_can_be_read_again_while_workers_read_others(opened: Opened) -> None:
    data = opened("Pairs", inputs=[0], workers=2)
    rows = []
    for batch in data.batches():
        again = next(data.batches(0, SIZE))
        assert torch.equal(again.args[0], expected()[:SIZE])
        rows.append(batch.args[0])
    assert torch.equal(torch.cat(rows), expected())


def test_a_dataloader_brings_its_batch_size_and_collation_and_its_order_is_not_used(
    opened: Opened,
) -> None:
    data = opened("loader", batch_size=None, inputs=[0], args={"shuffle": True, "drop_last": True})
    assert data.batch_size == SIZE
    assert torch.equal(joined(data), expected())
    texts = {statement.topic: statement.text for statement in data.statements()}
    assert texts["order"].endswith("shuffle and drop_last of the DataLoader: not used")


def test_the_batch_size_of_the_config_replaces_that_of_a_dataloader(opened: Opened) -> None:
    assert opened("loader", batch_size=7, inputs=[0]).batch_size == 7


@pytest.mark.parametrize("kind", ["subset", "replacement", "batches", "no batches"])
def test_a_dataloader_that_may_lose_samples_is_refused(opened: Opened, kind: str) -> None:
    with pytest.raises(ConfigError, match="return its dataset"):
        opened("sampled", args={"kind": kind})


# --- inputs, labels, ids -----------------------------------------------------------------------


def first(data: BatchSource) -> Batch:
    return next(data.batches())


def test_a_padding_collate_gives_series_and_lengths_by_name(opened: Opened) -> None:
    for collate, inputs in (("pad", {"series": 0, "lengths": 1}), ("pad_dict", None)):
        batch = first(opened("series", collate=collate, inputs=inputs))
        series, lengths = ("series", "lengths") if inputs else ("x", "n")
        assert batch.args == ()
        assert batch.kwargs[lengths].tolist() == [1, 2, 3, 4]
        assert batch.kwargs[series].tolist() == [
            [0, 0, 0, 0], [0, 1, 0, 0], [0, 1, 2, 0], [0, 1, 2, 3],
        ]  # fmt: skip


def test_positions_are_passed_by_position_and_keys_by_keyword(opened: Opened) -> None:
    assert len(first(opened("Pairs", inputs=[0, 1])).args) == 2
    assert first(opened("Pairs", inputs={"x": 0, "y": 1})).kwargs.keys() == {"x", "y"}
    assert first(opened("dicts", inputs=["n", "x"])).kwargs.keys() == {"n", "x"}
    assert first(opened("dicts", inputs=["x"])).args[0].shape == (4, 2)
    assert first(opened("Pairs", inputs={"x": 0}, call="keyword")).kwargs.keys() == {"x"}


def test_labels_and_ids_are_no_inputs(opened: Opened) -> None:
    batch = first(opened("Pairs", labels=1))
    assert batch.labels is not None
    assert batch.labels.tolist() == [0, 1, 2, 0]
    assert [tensor.shape for tensor in batch.args] == [(4, 2)]
    named = first(opened("dicts", labels="y", id="name", classes=["dog", "cat"]))
    assert named.kwargs.keys() == {"x", "n"}
    assert named.ids == ["é0", "é1", "é2", "é3"]
    assert named.labels is not None
    assert named.labels.tolist() == [0, 1, 0, 1]
    assert first(opened("dicts", id="n", inputs=["x"])).ids == [0, 1, 2, 3]


def test_names_whose_positions_a_run_saves_as_labels_identify_the_data(opened: Opened) -> None:
    for names in (["dog", "cat"], ["cat", "dog"]):
        data: Any = opened("dicts", labels="y", inputs=["x"], classes=names)
        assert data.identity["saved_label_names"] == names
    numbered: Any = opened("Pairs", labels=1, classes=["a", "b", "c"])
    assert "saved_label_names" not in numbered.identity


def test_numbers_keep_their_dtype_as_arrays_do_and_it_is_stated(opened: Opened) -> None:
    data = opened("array")
    assert first(data).args[0].dtype == torch.float64
    texts = {statement.topic: statement.text for statement in data.statements()}
    assert texts["input 0"] == "the item, float64 [2] in the first batch"


@pytest.mark.parametrize(
    ("name", "keys", "problem"),
    [
        ("texts", {}, "an item is a str, and inputs are tensors: convert it in the dataset"),
        ("Pairs", {}, "an item has 2 elements (0: float32 [2], 1: int64 []), and the inputs among "
         "them are not known; set data.inputs: [0], and data.labels: 1 for metrics"),
        ("Pairs", {"inputs": [2]}, "an item has no element 2"),
        ("Pairs", {"inputs": [0], "labels": "y"}, "an item has no element 'y'"),
        ("Pairs", {"inputs": [0], "call": "keyword"}, "needs names for the inputs: data.inputs: "
         "{NAME0: 0}"),
        ("Pairs", {"labels": 1, "inputs": []}, "no element of an item is an input"),
        ("dicts", {}, "input name is a list, not a tensor"),
        ("dicts", {"inputs": ["x"], "labels": "y"}, "the labels are names; set data.classes"),
        ("Named", {"inputs": [1]}, "input 1 is a tuple, not a tensor"),
        ("Pairs", {"collate": "time_first", "inputs": [0]},
         "collated, input 0 have 2 rows for 4 samples"),
        ("Pairs", {"collate": "dict_of_lists"}, "input x is a list, not a tensor"),
        ("Pairs", {"collate": "counts"}, "the batch is a int, not a tensor, list, tuple or dict"),
        ("lists", {}, "set data.inputs: [0], and data.labels: 1 for metrics; if an item is one row "
         "of numbers, make it a tensor or an array"),
        ("parts", {"inputs": ["x"], "labels": "y"}, "the labels are a dict, not numbers or names"),
        ("parts", {"inputs": ["x"], "id": "n"}, "the ids are neither whole numbers nor texts"),
        ("Fails", {}, "cannot be iterated: OSError: no disk"),
        ("pair", {}, "returns a tuple, which may be one sample or several arrays"),
        ("number", {}, "returns a int, from which no samples can be read"),
        ("NoLength", {}, "returns a NoLength without a length"),
        ("fails", {}, "failed: RuntimeError: no connection"),
        ("missing", {}, "has no 'missing'"),
        ("empty", {}, "the data contains no samples"),
        ("rows", {"args": {"n": 1}}, "is an object, which takes no arguments"),
        ("Stream", {"workers": 2}, "is iterable, and 2 workers would each read all"),
        ("generator", {"args": {"fails_at": 0}}, "failed at sample 0: OSError: the source is gone"),
        ("table", {}, "returns a DataFrame, whose items are columns; return frame.to_numpy()"),
    ],
)  # fmt: skip
def test_data_that_cannot_be_understood_are_refused(
    opened: Opened, name: str, keys: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        opened(name, **keys)
    assert problem in str(caught.value)


def test_nothing_is_imported_without_trust(tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text("raise SystemExit('imported')")
    config: Any = TypeAdapter(DataConfig).validate_python(
        {"source": "python", "target": f"{tmp_path}/code.py:make"}
    )
    with pytest.raises(ConfigError, match=r"is Python code and was not loaded.*trust_code=True"):
        open_data(config, seed=0)


# --- items that cannot be used -------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_an_item_that_raises_is_an_error_of_its_sample(opened: Opened, workers: int) -> None:
    data = opened("Pairs", inputs=[0], args={"bad": [0, 6, 20, 21, 22]}, workers=workers)
    batches = [*data.batches()]
    assert [[*batch.errors] for batch in batches] == [[0], [2], [], [], [], [0, 1, 2]]
    assert str(batches[1].errors[2]).startswith("sample 6: ValueError: item 6 is broken (")
    wanted = expected()
    wanted[[0, 6]] = 0
    assert torch.equal(torch.cat([batch.args[0] for batch in batches[:5]]), wanted[:20])


def test_an_item_of_another_shape_is_an_error_that_names_collate(opened: Opened) -> None:
    data = opened("Pairs", inputs=[0], args={"short": [0, 9]})
    one, _, third, *_ = data.batches()
    assert str(one.errors[0]) == (
        "sample 0: element 0 is float32 [1], and in most items float32 [2]; data.collate can pad "
        "or convert them"
    )
    assert [*third.errors] == [1]
    assert third.args[0].tolist() == [[8, 8.5], [0, 0], [10, 10.5], [11, 11.5]]


def test_an_item_that_a_collate_function_refuses_is_found(opened: Opened) -> None:
    batches = [*opened("Pairs", collate="fails_on_5").batches()]
    bad = {i for i in range(COUNT) if i % 3 == 2}
    assert {4 * n + row for n, batch in enumerate(batches) for row in batch.errors} == bad
    assert "KeyError: 'no such class'" in str(batches[0].errors[2])


def test_arrays_of_a_collate_function_are_inputs_labels_and_ids(opened: Opened) -> None:
    one, two, *_ = opened(
        "Pairs", collate="numpy_batch", inputs=["x"], labels="y", id="n"
    ).batches()
    assert torch.equal(torch.cat([one.args[0], two.args[0]]), expected()[:8])
    assert [*one.ids, *two.ids] == [*range(8)]
    assert two.labels is not None
    assert two.labels.tolist() == [1, 2, 0, 1]


@pytest.mark.parametrize(
    ("collate", "problem"),
    [
        ("changes_later", "the item has no element 'x'"),
        ("widens_later", "input 0 is float64, and in the first batch it is float32"),
    ],
)
def test_a_batch_that_differs_from_the_first_has_no_predictions(
    opened: Opened, collate: str, problem: str
) -> None:
    one, two, three, *_ = opened("Pairs", collate=collate).batches()
    assert not one.errors
    assert torch.equal(two.args[0], expected()[4:8])
    assert [str(three.errors[row]) for row in range(4)] == [
        f"sample {8 + row}: {problem}" for row in range(4)
    ]


def test_rows_of_failing_items_are_filled_in_tensors_and_lists(opened: Opened) -> None:
    """Not in a total, which belongs to no sample."""
    data = opened("Pairs", collate="with_total", inputs=["x"], id="names")
    one, *_ = data.batches()
    assert [*one.errors] == [2]
    wanted = expected()[:4]
    wanted[2] = 0
    assert torch.equal(one.args[0], wanted)
    assert [*one.ids] == ["n0", "n1", "row 2", "n0"]


def test_items_that_can_be_collated_alone_but_not_together_are_errors(opened: Opened) -> None:
    batches = [*opened("Pairs", collate="refuses_pairs", batch_size=1).batches()]
    assert [n for n, batch in enumerate(batches) if batch.errors] == [*range(1, COUNT, 3)]
    with pytest.raises(ConfigError, match=r"no item can be used, .*ValueError: one at a time"):
        opened("Pairs", collate="refuses_pairs")


@pytest.mark.parametrize("short", [[], [COUNT]])
def test_items_are_read_together_if_their_dataset_can(opened: Opened, short: list[int]) -> None:
    """A batch that fails, or another number of items, is read item by item."""
    data = opened("Together", inputs=[0], args={"short": short})
    assert torch.equal(joined(data), expected())


def test_labels_that_are_no_class_are_errors_of_their_samples(opened: Opened) -> None:
    data = opened("pets", inputs=["x"], labels="y", id="id", classes=["cat", "dog"])
    batches = [*data.batches()]
    assert [[*batch.errors] for batch in batches[:3]] == [[2, 3], [0, 1, 2], [1, 2, 3]]
    assert str(batches[0].errors[3]).startswith("sample 3: ")
    assert "'bird'" in str(batches[0].errors[3])
    assert batches[1].labels is not None
    assert batches[1].labels[3].item() == 0
    texts = {statement.topic: statement.text for statement in data.statements()}
    assert texts["labels"] == "'y' of an item, by name: cat, dog"


@pytest.mark.parametrize("bad", [[0], [1, 3], [0, 1, 2, 3, 4]])
@pytest.mark.parametrize("key", ["number", "name"])
def test_a_failing_item_of_the_first_batch_decides_on_no_id_and_no_label(
    opened: Opened, bad: list[int], key: str
) -> None:
    classes = ["cat", "dog", "bird"]
    keys: dict[str, Any] = {"inputs": ["x"], "id": key, "labels": "y", "classes": classes}
    batches = [*opened("Ids", args={"bad": bad}, **keys).batches()]
    failed = {
        4 * n + row: str(e) for n, batch in enumerate(batches) for row, e in batch.errors.items()
    }
    assert [*failed] == bad
    assert all("is broken" in text for text in failed.values())
    names = [i if key == "number" else f"é{i}" for i in range(COUNT)]
    for i in bad:
        names[i] = f"row {i}"
    assert [name for batch in batches for name in batch.ids] == names
    assert batches[-1].labels is not None
    assert batches[-1].labels.tolist() == [i % 3 for i in range(20, COUNT)]


def test_ids_of_two_types_in_the_first_batch_are_errors_too(opened: Opened) -> None:
    one, *_ = opened("Pairs", collate="mixed_ids", inputs=[0], id=1).batches()
    assert [*one.ids] == [0, 1, "row 2", 0]
    assert str(one.errors[2]) == "sample 2: its id 'two' is not whole numbers, as the first"


def test_ids_of_another_type_than_the_first_are_errors_of_their_samples(opened: Opened) -> None:
    _, two, three, *_ = opened("renamed", inputs=["x"], id="id").batches()
    assert [*two.ids] == [4, 5, 6, 7]
    assert str(three.errors[1]) == "sample 9: its id 'é9' is not whole numbers, as the first"
    assert [*three.ids] == ["row 8", "row 9", "row 10", "row 11"]


def test_an_iterable_that_raises_ends_with_an_error_that_names_the_sample(opened: Opened) -> None:
    for workers in (0, 1):
        data = opened("generator", inputs=[0], args={"fails_at": 10}, workers=workers)
        batches = data.batches()
        assert [next(batches).size, next(batches).size] == [4, 4]
        with pytest.raises(ConfigError, match="failed at sample 10: OSError"):
            next(batches)
        assert data.samples is None


# --- identity ------------------------------------------------------------------------------------


def test_the_first_batch_identifies_the_data_unless_it_is_random(opened: Opened) -> None:
    def identity(data: Any) -> Any:
        return data.identity["first_batch"]

    plain, again = opened("Pairs", inputs=[0]), opened("Pairs", inputs=[0])
    assert identity(plain) == identity(again) != identity(opened("rows"))
    noisy = opened("noisy")
    assert identity(noisy) == "random"
    texts = {statement.topic: statement.text for statement in noisy.statements()}
    assert "an item differs when it is read again" in texts["resume"]


def test_the_code_of_the_user_runs_in_the_main_thread_only(opened: Opened) -> None:
    assert not should_prefetch(opened("Pairs", inputs=[0]), forward_seconds=1.0)
