"""The tracker of module calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from gradrun.inference.module_calls import track_module_calls


class Fails(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise ValueError("fails")


class Catches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fails, self.last = Fails(), nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        try:
            return self.fails(x)
        except ValueError:
            return self.last(x)


def names(stack: Any) -> list[str]:
    return [type(module).__name__ for module, _ in stack.calls]


def test_calls_are_entered_and_left_in_order_with_their_values() -> None:
    model, seen = nn.Sequential(nn.Linear(2, 3), nn.ReLU()), []
    with track_module_calls(
        lambda module, args: list(args[0].shape),
        lambda module, value, output: seen.append(
            (type(module).__name__, value, list(output.shape), names(stack))
        ),
    ) as stack:
        model(torch.ones(1, 2))
    model(torch.ones(1, 2))  # not tracked
    assert seen == [
        ("Linear", [1, 2], [1, 3], ["Sequential"]),
        ("ReLU", [1, 3], [1, 3], ["Sequential"]),
        ("Sequential", [1, 2], [1, 3], []),
    ]


@pytest.mark.parametrize("always_leave", [False, True])
def test_a_call_whose_error_was_caught_leaves_the_stack_with_the_call_around_it(
    always_leave: bool,
) -> None:
    left = []
    with track_module_calls(
        lambda *_: None,
        lambda module, _, output: left.append((type(module).__name__, output is None)),
        always_leave=always_leave,
    ) as stack:
        Catches()(torch.ones(1))
        assert stack.calls == []
    assert left == [
        *([("Fails", True)] if always_leave else []),
        ("ReLU", False),
        ("Catches", False),
    ]


def test_an_error_leaves_the_failing_calls_on_the_stack() -> None:
    model = nn.Sequential(nn.ReLU(), Fails())
    with (
        track_module_calls(lambda *_: None) as stack,
        pytest.raises(ValueError, match="fails"),
    ):
        model(torch.ones(1))
    assert names(stack) == ["Sequential", "Fails"]
    assert stack.innermost is model[1]


def test_the_hooks_do_not_disable_the_fused_path_of_a_transformer_layer() -> None:
    layer, called = nn.TransformerEncoderLayer(8, 2, batch_first=True).eval(), []
    with torch.no_grad(), track_module_calls(lambda module, _: called.append(module)):
        layer(torch.ones(1, 3, 8))
    assert called == [layer]
