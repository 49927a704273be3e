"""The line of an error of other code that a message contains."""

from __future__ import annotations

import pytest
import torch

from gradrun.core.errors import first_line


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


def test_the_first_line_of_an_error_is_its_reason() -> None:
    assert first_line(ValueError("\n one reason\nC++ frames\n")) == "one reason"
    assert first_line(ValueError()) == "ValueError"
    assert first_line(Mute()) == "Mute"


def test_the_reason_of_torchscript_follows_its_traceback() -> None:
    @torch.jit.script
    def halves(x: torch.Tensor) -> torch.Tensor:
        assert x.size(0) == 2, "not two"
        return x

    with pytest.raises(torch.jit.Error) as caught:
        halves(torch.ones(3))
    assert first_line(caught.value) == "RuntimeError: AssertionError: not two"
