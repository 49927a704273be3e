"""Settings of the whole process: set inside the block, and restored at its end."""

from __future__ import annotations

import pytest
import torch

from gradrun.config.run import RunSection
from gradrun.core.errors import ConfigError
from gradrun.inference import process_settings as module
from gradrun.inference.process_settings import process_settings


def precisions() -> dict[str, str]:
    """Return the precision of the float32 operators of this torch."""
    backends = torch.backends
    operators = {"mkldnn": backends.mkldnn, "cudnn": backends.cudnn, "cuda": backends.cuda}
    return {
        f"{backend}.{name}": getattr(operators, name).fp32_precision
        for backend, operators in operators.items()
        for name in ("matmul", "conv")
        if hasattr(getattr(operators, name, None), "fp32_precision")
    }


needs_precision = pytest.mark.skipif(not precisions(), reason="needs torch 2.9 or newer")


@needs_precision
@pytest.mark.parametrize("precision", ["bf16", "tf32", "ieee"])
def test_operators_of_float32_have_the_precision_inside_the_block(precision: str) -> None:
    before = precisions()
    with process_settings(RunSection(float32_precision=precision)):
        inside = precisions()
    assert {inside["mkldnn.matmul"], inside["mkldnn.conv"]} == {precision}
    # CUDA has no bf16 for float32 operators; they stay exact.
    cuda = "ieee" if precision == "bf16" else precision
    assert {inside["cudnn.conv"], inside["cuda.matmul"]} == {cuda}
    assert precisions() == before


@needs_precision
def test_an_error_inside_the_block_restores_the_settings() -> None:
    before = precisions(), torch.backends.mha.get_fastpath_enabled()
    inside: list[bool] = []

    def fail() -> None:
        with process_settings(RunSection(float32_precision="ieee", fast_path=False)):
            inside.append(torch.backends.mha.get_fastpath_enabled())
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert inside == [False]
    assert (precisions(), torch.backends.mha.get_fastpath_enabled()) == before


def test_a_torch_without_the_setting_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_OPERATORS", ("none",))
    with (
        pytest.raises(ConfigError) as caught,
        process_settings(RunSection(float32_precision="bf16")),
    ):
        pass
    assert str(caught.value).startswith(f"torch {torch.__version__} has no fp32_precision")
