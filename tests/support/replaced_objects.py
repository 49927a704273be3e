"""An object that is replaced by another one during a run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from gradrun.core import remote
from gradrun.data import source
from tests.conftest import Command
from tests.support.remote_data import npy


def check_replacement(
    cli: Command,
    config: dict[str, Any],
    put: Callable[[bytes], object],
    weight: np.ndarray[Any, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Replace the array that a run reads by one of equal size, before its seventh block is read.

    The run must end, and the predictions that it saved must be those of the first array.
    """
    rows = np.random.default_rng(1).normal(size=(32_000, 4)).astype(np.float32)
    monkeypatch.setattr(remote, "_BLOCK", 2**16)
    monkeypatch.setattr(source, "CHUNK_BYTES", 2**16)
    read = remote._read_block

    def read_block(path: remote.RemotePath, info: Any, number: int) -> bytes:
        if number == 6:
            put(npy(rows + 1))
        return read(path, info, number)

    monkeypatch.setattr(remote, "_read_block", read_block)
    put(npy(rows))
    config["data"]["batch_size"] = 1024
    Path("c.yaml").write_text(yaml.safe_dump(config))
    command = ["infer", "c.yaml", "--output", "saved"]
    answer = cli(*command)
    text = " ".join(answer.text.split())
    assert answer.code == 1, text
    assert f"{config['data']['path']} cannot be read: its content changed during the run" in text
    saved = json.loads(Path("saved/journal.jsonl").read_text().splitlines()[-1])["stop"]
    assert 0 < saved < len(rows)
    found = np.load("saved/predictions.npy")[:saved]
    np.testing.assert_allclose(found, rows[:saved] @ weight.T, rtol=1e-4, atol=1e-5)
    answer = cli(*command, "--resume")
    assert answer.code == 2
    assert "changed (version)" in " ".join(answer.text.split())
