"""The gradient modes, as torch itself sees them."""

from __future__ import annotations

import pytest
import torch

from gradrun.config import GradMode
from gradrun.modes import grad_mode

INSIDE = {
    GradMode.GRAD: (True, False),
    GradMode.NO_GRAD: (False, False),
    GradMode.INFERENCE_MODE: (False, True),
}
"""mode -> (is_grad_enabled, is_inference_mode_enabled)."""


def state() -> tuple[bool, bool]:
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled()


@pytest.mark.parametrize("mode", GradMode)
@pytest.mark.parametrize("outside", [torch.enable_grad, torch.no_grad])
def test_a_mode_holds_inside_its_block_and_no_longer(mode: GradMode, outside: type) -> None:
    with outside():
        before = state()
        with grad_mode(mode):
            assert state() == INSIDE[mode]
        assert state() == before


@pytest.mark.parametrize("mode", GradMode)
def test_a_mode_ends_with_an_error_too(mode: GradMode) -> None:
    with pytest.raises(KeyError), grad_mode(mode):
        raise KeyError
    assert state() == (True, False)


@pytest.mark.parametrize("outer", GradMode)
@pytest.mark.parametrize("inner", GradMode)
def test_modes_nest(outer: GradMode, inner: GradMode) -> None:
    with grad_mode(outer):
        with grad_mode(inner):
            assert state()[0] is INSIDE[inner][0]
        assert state() == INSIDE[outer]
    assert state() == (True, False)


@pytest.mark.parametrize("mode", GradMode)
def test_each_guard_is_a_fresh_one(mode: GradMode) -> None:
    assert grad_mode(mode) is not grad_mode(mode)


@pytest.mark.parametrize("mode", GradMode)
def test_tensors_made_inside_are_of_the_mode(mode: GradMode) -> None:
    weight = torch.ones(1, requires_grad=True)
    with grad_mode(mode):
        made = weight * 2
    assert made.requires_grad is (mode is GradMode.GRAD)
    assert (made.grad_fn is not None) is (mode is GradMode.GRAD)
    assert made.is_inference() is (mode is GradMode.INFERENCE_MODE)


@pytest.mark.parametrize("mode", GradMode)
def test_a_mode_may_be_given_by_its_name(mode: GradMode) -> None:
    with grad_mode(mode.value):
        assert state() == INSIDE[mode]


@pytest.mark.parametrize("name", ["nograd", "", "GRAD"])
def test_an_unknown_mode_is_a_value_error(name: str) -> None:
    with pytest.raises(ValueError, match="not a valid GradMode"):
        grad_mode(name)
