"""Operations and bytes of a forward pass, against counts by hand."""

from __future__ import annotations

from math import prod
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from gradrun.data.batch import Batch
from gradrun.inference.meters.cpu_memory import storages
from gradrun.inference.meters.work import _bytes, forward_work
from gradrun.results.work import Work
from models import mlp, resnet18, transformer_encoder


def work_of(model: nn.Module, *inputs: torch.Tensor, mode: Any = torch.inference_mode) -> Work:
    with mode():
        return forward_work(model.eval(), Batch(inputs, {}, len(inputs[0]), range(len(inputs[0]))))


def test_operations_of_the_mlp_are_those_of_its_products() -> None:
    counted = work_of(mlp.build(width=16, depth=3), torch.ones(5, 16))
    assert counted.total_flops == 3 * (2 * 5 * 16 * 16)
    assert counted.flops[0].dtype == "float32"
    # Linear reads input, weight and bias, and writes the output; ReLU reads and writes it.
    linear = 5 * 16 + 16 * 16 + 16 + 5 * 16
    assert counted.bytes == 4 * 3 * (linear + 2 * 5 * 16)
    assert counted.uncounted == ("relu",)
    assert (counted.operators, counted.batch_size, counted.elements) == (6, 5, 80)


def test_operations_of_resnet18_are_those_of_its_convolutions_and_last_layer() -> None:
    model, expected = resnet18.build().eval(), 0

    def convolution(module: Any, inputs: Any, output: torch.Tensor) -> None:
        nonlocal expected
        if isinstance(module, nn.Conv2d):
            taps = module.in_channels // module.groups * prod(module.kernel_size)
            expected += 2 * output.numel() * taps

    hooks = [module.register_forward_hook(convolution) for module in model.modules()]
    image = torch.ones(2, 3, 64, 64)
    with torch.no_grad():
        model(image)
    for hook in hooks:
        hook.remove()
    expected += 2 * 2 * 512 * 1000
    assert work_of(model, image).total_flops == expected
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    assert counter.get_total_flops() == expected


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.enable_grad])
def test_operations_of_an_encoder_are_equal_in_its_fused_and_its_other_implementation(
    mode: Any,
) -> None:
    n, length, width, hidden, layers = 3, 8, 32, 64, 2
    model = transformer_encoder.build(width, heads=4, layers=layers, feedforward=hidden)
    tokens = n * length
    projections = 2 * tokens * width * (3 * width + width)
    attention = 2 * (2 * n * length * length * width)
    feedforward = 2 * (2 * tokens * width * hidden)
    expected = layers * (projections + attention + feedforward)
    counted = work_of(model, torch.ones(n, length, width), mode=mode)
    assert counted.total_flops == expected
    assert (counted.operators < 5) == (mode is torch.inference_mode), "the fused one ran"


def test_operations_of_a_nested_batch_leave_its_padding_out() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 1)
    padding = torch.zeros(2, 8, dtype=torch.bool)
    padding[1, 4:] = True

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.model(x, src_key_padding_mask=padding)

    def one(length: int) -> int:
        return length * (8 * 32**2 + 4 * 32 * 64) + 4 * length**2 * 32

    assert work_of(Masked(), torch.ones(2, 8, 32)).total_flops == one(8) + one(4)


def test_operations_of_a_recurrent_layer_are_those_of_its_gates() -> None:
    counted = work_of(nn.LSTM(4, 6, batch_first=True), torch.ones(2, 5, 4))
    assert counted.total_flops == 2 * 2 * 5 * 4 * 6 * (4 + 6)


def test_operations_of_attention_are_two_products() -> None:
    class Attention(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.scaled_dot_product_attention(x, x, x)

    assert work_of(Attention(), torch.ones(2, 3, 8, 16)).total_flops == 2 * 2 * 2 * 3 * 8 * 8 * 16


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.enable_grad])
def test_operations_of_multi_head_attention_are_equal_in_both_implementations(mode: Any) -> None:
    """Four projections of 6 x 8 numbers with 8 x 8 weights, and two products per head."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x, x, x, need_weights=False)[0]

    heads = 2 * 2 * (3 * 2 * 6 * 6 * 4)
    counted = work_of(Attention(), torch.ones(3, 6, 8), mode=mode)
    assert counted.total_flops == 4 * (2 * 3 * 6 * 8 * 8) + heads


def test_products_with_vectors_are_counted() -> None:
    class Vectors(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.mv(x, x[0]) + torch.dot(x[0], x[1]) + torch.addmv(x[:, 0], x, x[1])

    counted = work_of(Vectors(), torch.ones(5, 7))
    assert counted.total_flops == 2 * 5 * 7 + 2 * 7 + 2 * 5 * 7


VALUES = torch.tensor([1.0, 2.0, 3.0])


@pytest.mark.parametrize(
    ("matrix", "numbers"),
    [
        (torch.sparse_coo_tensor([[0, 2, 3], [1, 3, 0]], VALUES, (4, 5)), 2 * 3),
        # The ends of the four rows, or five columns, and the other place of each value.
        (torch.sparse_csr_tensor([0, 1, 1, 2, 3], [1, 3, 0], VALUES, (4, 5)), 5 + 3),
        (torch.sparse_csc_tensor([0, 1, 2, 2, 3, 3], [3, 0, 2], VALUES, (4, 5)), 6 + 3),
    ],
    ids=["coo", "csr", "csc"],
)
def test_a_sparse_matrix_has_the_bytes_of_its_indices_and_values(
    matrix: torch.Tensor, numbers: int
) -> None:
    assert _bytes(matrix) == sum(storages([matrix]).values()) == 8 * numbers + 4 * 3


def test_an_embedding_reads_the_rows_that_it_selects() -> None:
    counted = work_of(nn.Embedding(1000, 8), torch.tensor([[1, 2, 3]]))
    rows = 3 * 8 * 4
    assert (counted.bytes, counted.total_flops) == (rows + 3 * 8 + rows, 0)


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_an_embedding_bag_reads_one_row_per_index(mode: str) -> None:
    counted = work_of(nn.EmbeddingBag(1000, 8, mode=mode), torch.tensor([[1, 2, 3], [4, 5, 6]]))
    assert 6 * 8 * 4 <= counted.bytes < 1000, "the rows, and some indices, but not the table"
    assert counted.total_flops == 0


def test_operations_of_a_depthwise_convolution_are_those_of_its_groups() -> None:
    layer = nn.Conv2d(8, 16, 3, padding=1, groups=8, bias=False)
    assert work_of(layer, torch.ones(2, 8, 5, 5)).total_flops == 2 * (2 * 16 * 5 * 5) * (1 * 3 * 3)


def test_operations_of_grouped_queries_are_those_of_all_query_heads() -> None:
    class Attention(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            pairs = x[:, :2]
            return nn.functional.scaled_dot_product_attention(x, pairs, pairs, enable_gqa=True)

    assert work_of(Attention(), torch.ones(2, 4, 8, 16)).total_flops == 2 * 2 * 2 * 4 * 8 * 8 * 16


def test_views_move_no_bytes_and_copies_do() -> None:
    class Views(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.view(2, 8).t()[:4].unsqueeze(0)

    class Copies(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

    assert work_of(Views(), torch.ones(4, 4)).bytes == 0
    assert work_of(Copies(), torch.ones(4, 4)).bytes == 2 * 64


@pytest.mark.parametrize(
    "build", [torch.jit.script, lambda m: torch.jit.trace(m, torch.ones(2, 4))]
)
def test_operations_inside_torchscript_count(build: Any) -> None:
    model = build(nn.Sequential(nn.Linear(4, 3), nn.ReLU()).eval())
    assert work_of(model, torch.ones(2, 4)).total_flops == 2 * 2 * 4 * 3


def test_counting_restores_the_state_of_the_model() -> None:
    norm = nn.BatchNorm1d(4)
    before = norm.running_mean.clone()
    with torch.no_grad():
        forward_work(norm.train(), Batch((torch.arange(8.0).view(2, 4),), {}, 2, range(2)))
    assert torch.equal(norm.running_mean, before)


def test_types_are_counted_apart() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        counted = work_of(nn.Linear(4, 4), torch.ones(2, 4))
    assert {one.dtype: one.count for one in counted.flops} == {"bfloat16": 64}
