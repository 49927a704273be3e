"""Messages between driver and workers keep all values that predictions, ids and errors may have."""

from __future__ import annotations

import msgspec

from gradrun.engines.messages import (
    Done,
    Open,
    Quarantined,
    Rows,
    decode_reply,
    decode_request,
    encode,
    pack_rows,
    unpack_rows,
)
from gradrun.inference.timed_loop import LargestBatch
from gradrun.output.columns import ValueColumn

NOT_UTF8 = "a\udcff.png"
"""As Python reads the name of a file that is not UTF-8."""


def test_names_that_are_not_utf8_and_large_numbers_arrive() -> None:
    values = [NOT_UTF8, 2**70, {"n": [-(2**65), NOT_UTF8]}, None]
    ids = [NOT_UTF8, "b", "c", "d"]
    events = [
        Quarantined(sample=0, id=NOT_UTF8, error=f"{NOT_UTF8} is broken", details=""),
        pack_rows({"v": ValueColumn(values)}, ids, None),
    ]
    sent = Done(start=0, stop=4, events=[*events], error=f"{NOT_UTF8} is missing")
    sent = msgspec.structs.replace(sent, largest=LargestBatch(6, 0, 4))
    done = decode_reply(bytearray(encode(sent)))
    assert isinstance(done, Done)
    assert done.largest == (6, 0, 4)
    assert done.error == f"{NOT_UTF8} is missing"
    line, rows = done.events
    assert line == events[0]
    assert isinstance(rows, Rows)
    outputs, found, _ = unpack_rows(rows)
    assert outputs["v"].tolist() == values
    assert [*found] == ids
    opening = Open(config={"data": {"path": NOT_UTF8}}, trust_code=False)
    assert decode_request(encode(opening)) == opening
