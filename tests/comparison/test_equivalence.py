"""Output comparison and the first differing module, on small models."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.modules import module as torch_module

from gradrun.comparison.equivalence import equivalence, first_differing_module
from gradrun.config.schema import RunConfig
from gradrun.core.errors import ConfigError
from gradrun.data.batch import Batch
from gradrun.modes import grad_mode
from gradrun.report.tables import outputs_status


def config(mode: str, **measure: float) -> RunConfig:
    written = {
        "model": {"source": "zoo", "name": "mlp"},
        "data": {"source": "synthetic", "inputs": {"x": {"shape": [4]}}, "samples": 8},
        "run": {"mode": mode},
        "measure": measure,
        "output": {"path": "out"},
    }
    return RunConfig.model_validate(written, strict=False)


@dataclass
class ComparableModel:
    """A variant without a worker."""

    name: str
    model: nn.Module
    config: RunConfig
    batches: list[Batch]

    @contextmanager
    def execution_context(self) -> Iterator[None]:
        with grad_mode(self.config.run.mode):
            yield

    def run_batch(self, number: int) -> Any:
        return self.model(*self.batches[number].args)


def sides(
    model: nn.Module, *modes: str, shape: tuple[int, ...] = (4, 4), **measure: float
) -> tuple[ComparableModel, ComparableModel]:
    torch.manual_seed(7)
    size = shape[0]
    batches = [Batch((torch.randn(shape),), {}, size, range(at, at + size)) for at in (0, size)]
    one, other = modes or ("grad", "inference_mode")
    return (
        ComparableModel(one, model.eval(), config(one, **measure), batches),
        ComparableModel(other, model.eval(), config(other, **measure), batches),
    )


class InGrad(nn.Module):
    """Changes its input only if gradients are enabled."""

    def __init__(self, change: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.change = change

    def forward(self, x: torch.Tensor) -> Any:
        return self.change(x) if torch.is_grad_enabled() else x


class Complex(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.complex(x, x)


def off_by(difference: float) -> InGrad:
    return InGrad(lambda x: x + difference)


def test_equal_outputs_are_bitwise_equal() -> None:
    found = equivalence(*sides(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Softmax(-1))))
    assert (found.baseline, found.candidate) == ("grad", "inference_mode")
    assert (found.bitwise, found.equal, found.max_abs_diff) == (True, True, 0.0)
    assert found.first_module is None


def test_a_difference_has_its_size_and_first_module() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), off_by(0.5)), nn.Linear(4, 4))
    found = equivalence(*sides(nn.Sequential(nn.Linear(4, 4), off_by(0.5))))
    assert not found.bitwise
    assert not found.equal
    assert found.max_abs_diff == pytest.approx(0.5, rel=1e-6)
    assert first_differing_module(*sides(model)) == "1.1 (InGrad)"


@pytest.mark.parametrize(("tolerance", "equal"), [(1e-2, True), (1e-4, False)])
def test_a_small_difference_is_judged_by_the_tolerance(tolerance: float, equal: bool) -> None:
    found = equivalence(*sides(off_by(1e-3), rtol=0.0, atol=tolerance))
    assert (found.bitwise, found.equal) == (False, equal)
    assert found.max_abs_diff == pytest.approx(1e-3, rel=1e-3)


def test_a_difference_in_a_later_batch_counts() -> None:
    base, other = sides(nn.Identity())
    base.model = InGrad(lambda x: x + float(x is base.batches[1].args[0]))
    other.model = base.model
    assert equivalence(base, other).max_abs_diff == pytest.approx(1.0)


def test_a_difference_in_any_output_counts() -> None:
    class Two(nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"same": x, "other": x + (2.0 if torch.is_grad_enabled() else 0.0)}

    assert equivalence(*sides(Two())).max_abs_diff == pytest.approx(2.0)


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_equal_nan_or_infinity_is_not_a_difference(odd: float) -> None:
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.masked_fill(x > 0, odd)

    found = equivalence(*sides(Odd()))
    assert (found.bitwise, found.max_abs_diff) == (True, 0.0)


@pytest.mark.parametrize("odd", [math.nan, math.inf])
def test_nan_or_infinity_on_one_side_is_an_infinite_difference(odd: float) -> None:
    found = equivalence(*sides(InGrad(lambda x: x.masked_fill(x > 0, odd))))
    assert (found.bitwise, found.equal, found.max_abs_diff) == (False, False, math.inf)


def test_nan_differs_from_zero() -> None:
    model = nn.Sequential(nn.ReLU(), InGrad(lambda x: x.masked_fill(x == 0, math.nan)))
    found = equivalence(*sides(model))
    assert (found.bitwise, found.equal) == (False, False)
    assert found.first_module == "1 (InGrad)"


def test_complex_outputs_are_compared() -> None:
    model = nn.Sequential(Complex(), InGrad(lambda x: x + 0.25j))
    found = equivalence(*sides(model))
    assert (found.equal, found.max_abs_diff) == (False, pytest.approx(0.25))


def test_complex_and_real_outputs_are_compared_as_numbers() -> None:
    found = equivalence(*sides(InGrad(lambda x: torch.complex(x, torch.full_like(x, 0.25)))))
    assert (found.equal, found.max_abs_diff) == (False, pytest.approx(0.25))


@pytest.mark.parametrize("change", [lambda x: x[:, :2], lambda x: (x, x), lambda x: {"y": x}])
def test_other_shapes_or_names_are_an_infinite_difference(change: Any) -> None:
    found = equivalence(*sides(InGrad(change)))
    assert (found.bitwise, found.equal, found.max_abs_diff) == (False, False, math.inf)


def test_equal_values_of_another_dtype_are_not_bitwise_equal() -> None:
    found = equivalence(*sides(InGrad(lambda x: x.double())))
    assert (found.bitwise, found.equal, found.max_abs_diff) == (False, True, 0.0)


def test_both_sides_draw_the_same_dropout() -> None:
    base, other = sides(nn.Sequential(nn.Dropout(0.5)))
    base.model.train()
    assert equivalence(base, other).bitwise


def test_a_counter_in_a_buffer_is_not_a_difference() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return x * self.calls

    model = Counting()
    assert equivalence(*sides(model)).bitwise
    assert model.calls == 0


def test_the_fused_path_of_a_transformer_layer_is_named() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    found = equivalence(*sides(nn.TransformerEncoder(layer, 2), shape=(4, 8, 16)))
    assert not found.bitwise
    assert found.equal
    assert found.first_module == "layers.0 (TransformerEncoderLayer)"


def test_nested_outputs_of_modules_are_compared() -> None:
    """With a padding mask, the layers of the fused path return nested tensors."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            lengths = torch.arange(2, 2 + len(x))
            mask = torch.arange(x.shape[1])[None] >= lengths[:, None]
            out: torch.Tensor = self.encoder(x, src_key_padding_mask=mask)
            return out

    torch.manual_seed(0)
    model = Masked()
    one, other = sides(model, shape=(4, 6, 8))
    outputs = {}
    for side in (one, other):
        with side.execution_context():
            outputs[side.name] = [side.run_batch(number).detach().clone() for number in (0, 1)]
    pairs = zip(outputs["grad"], outputs["inference_mode"], strict=True)
    expected = max(float((dense - padded).abs().max()) for dense, padded in pairs)
    found = equivalence(one, other)
    assert found.max_abs_diff == expected > 0.1
    assert found.first_module == "encoder.layers.0 (TransformerEncoderLayer)"


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_outputs_are_compared(layout: torch.layout) -> None:
    def ragged(x: torch.Tensor) -> torch.Tensor:
        parts = [row[: index + 1] for index, row in enumerate(x)]
        return torch.nested.nested_tensor(parts, layout=layout)

    class Ragged(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return ragged(x + 0.25 * torch.is_grad_enabled())

    found = equivalence(*sides(Ragged()))
    assert found.max_abs_diff == pytest.approx(0.25)
    assert not found.equal


def test_hooks_are_removed() -> None:
    def hooks() -> int:
        return len(torch_module._global_forward_hooks)

    before = hooks()
    assert first_differing_module(*sides(off_by(1.0)))
    broken = sides(nn.Linear(4, 4), shape=(4, 3))
    with pytest.raises(RuntimeError):
        first_differing_module(*broken)
    assert hooks() == before


def test_a_module_that_one_side_does_not_call_is_skipped() -> None:
    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.careful, self.last = nn.Identity(), nn.Identity()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if torch.is_grad_enabled():
                return self.last(self.careful(x + 1.0))
            return self.last(x)

    assert first_differing_module(*sides(Skips())) == "last (Identity)"


def test_a_difference_in_the_root_module_is_named_the_model() -> None:
    assert first_differing_module(*sides(off_by(1.0))) == "(the model) (InGrad)"


def test_in_place_changes_of_the_input_do_not_reach_the_other_side() -> None:
    class InPlace(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mul_(2.0)

    base, other = sides(InPlace())
    value = base.batches[0].args[0].clone()
    assert equivalence(base, other).bitwise
    assert torch.equal(base.batches[0].args[0], value)


# --- different batches ---------------------------------------------------------------------------


def in_batches(side: ComparableModel, *sizes: int) -> ComparableModel:
    """The same samples in batches of other sizes."""
    whole = torch.cat([batch.args[0] for batch in side.batches])
    ends = list(itertools.accumulate(sizes))
    batches = [
        Batch((whole[end - size : end],), {}, size, range(end - size, end))
        for size, end in zip(sizes, ends, strict=True)
    ]
    return ComparableModel(side.name, side.model, side.config, batches)


def test_samples_are_matched_if_batch_sizes_differ() -> None:
    one, other = sides(nn.Linear(4, 3), "no_grad", "no_grad")
    found = equivalence(one, in_batches(other, 2, 2, 2, 2))
    assert found.equal
    assert found.max_abs_diff < 1e-5
    assert found.first_module is None


def test_variants_without_a_common_sample_are_not_equal() -> None:
    one, other = sides(nn.Linear(4, 3), "no_grad", "no_grad")
    strangers = [batch._replace(ids=[f"x{n}" for n in batch.ids]) for batch in other.batches]
    found = equivalence(one, ComparableModel(other.name, other.model, other.config, strangers))
    assert (found.compared, found.equal, found.bitwise) == (False, False, False)
    assert found.first_module is None
    assert outputs_status(found).text == "no common sample"


def test_a_difference_is_found_if_batch_sizes_differ() -> None:
    one, other = sides(InGrad(lambda x: x + 1), "grad", "no_grad")
    found = equivalence(one, in_batches(other, 3, 5))
    assert not found.equal
    assert found.max_abs_diff == pytest.approx(1.0)


class Boxes(nn.Module):
    """Returns a text and as many boxes per sample as the input has numbers above 0."""

    def __init__(self, shift: float = 0.0, name: str = "boxes") -> None:
        super().__init__()
        self.shift, self.name = shift, name

    def forward(self, x: torch.Tensor) -> Any:
        return [
            {self.name: row[row > 0, None] + self.shift, "text": f"{row.sum():.3f}", "none": None}
            for row in x
        ]


def as_model(side: ComparableModel, model: nn.Module) -> ComparableModel:
    return ComparableModel(side.name, model, side.config, side.batches)


def test_values_of_any_size_are_matched_by_sample() -> None:
    one, other = sides(Boxes(), "no_grad", "no_grad")
    assert equivalence(one, other).bitwise
    assert equivalence(one, in_batches(other, 3, 5)).bitwise
    shifted = as_model(other, Boxes(0.25))
    for side in (shifted, in_batches(shifted, 3, 5)):
        assert equivalence(one, side).max_abs_diff == pytest.approx(0.25)
    for side in (
        as_model(other, Boxes(name="x")),
        as_model(in_batches(other, 3, 5), Boxes(name="x")),
    ):
        found = equivalence(one, side)
        assert not found.equal
        assert found.max_abs_diff == torch.inf


def test_outputs_of_other_names_or_dimensions_differ_in_batches_of_other_sizes() -> None:
    one, other = sides(Twice(), "no_grad", "no_grad")
    several = in_batches(other, 3, 5)
    for change in (lambda x: {"other": 2 * x}, lambda x: 2 * x[..., None]):
        found = equivalence(one, as_model(several, Applied(change)))
        assert (found.equal, found.max_abs_diff) == (False, torch.inf)


def test_a_model_without_tensors_cannot_be_compared() -> None:
    one, other = sides(Applied(lambda x: 3), "no_grad", "no_grad")
    with pytest.raises(ConfigError, match="the model returned int instead of one or more tensors"):
        equivalence(one, other)


class Applied(nn.Module):
    """Applies a function."""

    def __init__(self, change: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.change = change

    def forward(self, x: torch.Tensor) -> Any:
        return self.change(x)


class Twice(nn.Module):
    """Like a text model: samples are padded to the longest of their batch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


@pytest.mark.parametrize(("changed", "equal"), [(0.0, True), (0.5, False)])
def test_samples_are_matched_by_id_in_any_order_and_padding(changed: float, equal: bool) -> None:
    one, other = sides(Twice(), "grad", "grad")
    torch.manual_seed(0)
    texts = [torch.rand(length, 3) for length in (4, 1, 3, 2)]

    def batch(*which: int, pad: int) -> Batch:
        rows = torch.stack(
            [functional.pad(texts[i], (0, 0, 0, pad - len(texts[i]))) for i in which]
        )
        return Batch((rows,), {}, len(which), list(which))

    one.batches = [batch(0, 1, pad=4), batch(2, 3, pad=3)]
    other.batches = [batch(0, 2, pad=4), batch(3, 1, pad=2)]
    assert equivalence(one, other).equal
    texts[2][0, 0] += changed
    other.batches = [batch(0, 2, pad=4), batch(3, 1, pad=2)]
    found = equivalence(one, other)
    assert found.equal is equal
    assert found.max_abs_diff == pytest.approx(2 * changed)


def test_requires_grad_of_the_input_is_restored() -> None:
    class Marks(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.requires_grad_() * 2

    one, other = sides(Marks(), "grad", "grad")
    assert equivalence(one, other).bitwise
    assert not any(batch.args[0].requires_grad for batch in one.batches)


@pytest.mark.parametrize(
    ("kinds", "equal"),
    [
        (("bfloat16", "bfloat16"), True),
        (("bfloat16", None), True),
        ((None, "bfloat16"), True),
        ((None, None), False),
    ],
)
def test_the_tolerance_follows_the_lower_precision(
    kinds: tuple[str | None, str | None], equal: bool
) -> None:
    sided = sides(InGrad(lambda x: x * 1.005), "grad", "no_grad")
    for side, kind in zip(sided, kinds, strict=True):
        model = side.config.model.model_copy(update={"dtype": kind})
        side.config = side.config.model_copy(update={"model": model})
    assert equivalence(*sided).equal is equal


def test_an_infinite_output_does_not_make_the_tolerance_infinite() -> None:
    class Masked(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            scores = x * (1.5 if torch.is_grad_enabled() else 1.0)
            return torch.cat([scores, torch.full_like(scores, -torch.inf)], 1)

    sided = sides(Masked(), "grad", "no_grad")
    for side in sided:
        model = side.config.model.model_copy(update={"dtype": "bfloat16"})
        side.config = side.config.model_copy(update={"model": model})
    assert not equivalence(*sided).equal
