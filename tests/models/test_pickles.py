"""What torch itself writes passes; the attacks on pickles are in attack_files.py."""

from __future__ import annotations

import io
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn

from gradrun.models.archives import HostileError, check_claim, opened
from gradrun.models.pickles import check_checkpoint, check_storages

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


class Views(nn.Module):
    """Tensors that are not laid out as they look, and some that are no parameters."""

    def __init__(self) -> None:
        super().__init__()
        square = torch.randn(4, 4)
        self.register_buffer("turned", square.t()[1:])
        self.register_buffer("spread", torch.ones(1).expand(5))
        self.register_buffer("empty", torch.zeros(0, 3))
        self.register_buffer("complex", torch.randn(2, dtype=torch.complex64))
        self.listed, self.named = [square, square], {"a": torch.ones(1)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.turned.sum() + self.listed[0].sum() + self.named["a"]


constant = torch.randn(5)
PROGRAMS: dict[str, Any] = {
    "layers": nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout()),
    "a recurrent network": nn.LSTM(4, 3, num_layers=2),
    "a transformer": nn.TransformerEncoderLayer(8, 2, 16),
    "half precision": nn.Linear(4, 2).to(torch.bfloat16),
    "channels last": nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last),
    "views": Views(),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_scripted_program_passes(name: str) -> None:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(PROGRAMS[name]), buffer)
    check_storages(opened(buffer))


def test_a_traced_program_with_constants_passes() -> None:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(lambda x: x + constant, torch.ones(5)), buffer)
    assert "constants/0" in opened(buffer).get_all_records()
    check_storages(opened(buffer))


def test_a_program_traced_with_a_module_passes() -> None:
    """The shapes of its example inputs are kept, and their bytes are not."""
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(nn.Linear(4, 2), torch.ones(256, 4)), buffer)
    assert opened(buffer).get_record_size("traced_inputs/0") == 0
    check_storages(opened(buffer))


def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = net[0].weight
    optimizer = torch.optim.AdamW([{"params": [p]} for p in net.parameters()], betas=(0.9, 0.99))
    net(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    return net, optimizer


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_passes(zipped: bool) -> None:
    net, optimizer = trained()
    pair = (1, 2)
    checkpoint = {
        "state_dict": net.state_dict(),
        "optimizer": optimizer.state_dict(),
        "history": OrderedDict(loss=[0.5] * 10_000, pairs=[pair] * 10_000),
        "by place": {pair: torch.ones(2), ("a", 1): None, 3: True, torch.float32: 1},
        "types": [torch.float16, torch.Size([1, 2]), torch.device("cpu")],
    }
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer, _use_new_zipfile_serialization=zipped)
    buffer.seek(0)
    check_checkpoint(buffer)


def test_values_are_counted_as_often_as_they_are_met() -> None:
    value: list[Any] = [0] * 1000
    for often in (100, 100):
        value = [value] * often
    buffer = io.BytesIO()
    torch.save({"a": value}, buffer)  # 10 million values in some kilobytes
    buffer.seek(0)
    check_checkpoint(buffer)
    buffer = io.BytesIO()
    torch.save({"a": [value] * 3}, buffer)
    buffer.seek(0)
    with pytest.raises(HostileError, match="grow without end"):
        check_checkpoint(buffer)


def test_an_archive_may_hold_packed_code_and_no_more() -> None:
    check_claim(1000, 1000 + 256 * 2**20)
    with pytest.raises(HostileError, match=r"1000 B .* 256\.00 MiB, as nothing"):
        check_claim(1000, 1001 + 256 * 2**20)
