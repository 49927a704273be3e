"""Records round-trip through JSON; other data is rejected."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradrun.core.record import Record


class Figures(Record, frozen=True, kw_only=True):
    floats: tuple[float, ...] = ()
    count: int = 0
    words: dict[str, str] | None = None
    inner: Figures | None = None


@given(st.lists(st.floats(), max_size=20), st.integers(-(2**70), 2**70), st.text())
def test_floats_round_trip_bit_for_bit(floats, count, text):
    noun = Figures(floats=tuple(floats), count=count, inner=Figures(words={text: text}))
    back = Figures.from_json(noun.to_json())
    assert [repr(f) for f in back.floats] == [repr(f) for f in floats]
    assert (back.count, back.inner) == (count, noun.inner)


def test_infinity_and_nan_are_written_as_strings():
    text = Figures(floats=(math.inf, -math.inf, math.nan)).to_json()
    data = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert data["floats"] == ["Infinity", "-Infinity", "NaN"]
    positive, negative, none = Figures.from_json(text).floats
    assert (positive, negative) == (math.inf, -math.inf)
    assert math.isnan(none)


def test_numpy_numbers_are_written_as_numbers():
    noun = Figures(floats=(np.float64(0.1), np.float32(0.5)), count=np.int64(3))
    assert Figures.from_json(noun.to_json()) == Figures(floats=(0.1, 0.5), count=3)


def test_a_name_that_is_not_utf8_is_escaped():
    noun = Figures(words={"file": "a\udcff"}, floats=(math.inf,))
    assert noun.to_json().isascii()
    assert Figures.from_json(noun.to_json()) == noun


def test_replace_does_not_change_the_original():
    first = Figures(count=1)
    assert first.replace(count=2) == Figures(count=2)
    assert first.count == 1
    with pytest.raises(TypeError, match="weight"):
        first.replace(weight=2)
    with pytest.raises(AttributeError, match="immutable"):
        first.count = 2


@pytest.mark.parametrize(
    ("data", "where"),
    [
        ({"floats": [1.0, "x"]}, r"\$\.floats\[1\]"),
        ({"inner": {"count": 1.5}}, r"\$\.inner\.count"),
        ({"inner": []}, r"\$\.inner"),
        ([], "Expected `object`"),
    ],
)
def test_a_wrong_type_is_rejected_with_its_location(data, where):
    with pytest.raises(msgspec.ValidationError, match=where):
        Figures.of(data)


def test_unknown_keys_are_ignored():
    assert Figures.of({"count": 2, "moon": "full"}) == Figures(count=2)


def test_records_do_not_import_pydantic():
    code = (
        "import sys, gradrun.results.result, gradrun.comparison.protocol\n"
        "print('pydantic' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "False\n"
