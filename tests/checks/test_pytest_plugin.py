"""The pytest plugin, in separate processes: in this one, reimported modules would remain."""

from __future__ import annotations

from tests.conftest import ROOT

pytest_plugins = ["pytester"]

MODELS = """
import pytest
import torch
from torch import nn

def model():
    return nn.Sequential(nn.Linear(2, 2), nn.ReLU())
"""


def test_the_marker_fails_a_test_whose_model_retains_a_graph(pytester):
    pytester.makepyfile(
        MODELS
        + """
@pytest.mark.no_graph
def test_retains():
    model()(torch.ones(1, 2))

@pytest.mark.no_graph
@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_retains_none(guard):
    with guard():
        model()(torch.ones(1, 2))

@pytest.mark.no_graph
def test_a_graph_dropped_by_an_outer_model():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model()

        def forward(self, x):
            return self.inner(x).detach()

    Outer()(torch.ones(1, 2))

@pytest.mark.no_graph
def test_a_forward_that_raises():
    with pytest.raises(RuntimeError):
        model()(torch.ones(1, 3))
    model()(torch.ones(1, 2))

@pytest.mark.no_graph
def test_a_dict_of_outputs():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model()

        def forward(self, x):
            return {"logits": self.inner(x)}

    Outer()(torch.ones(1, 2))

@pytest.mark.no_graph
def test_its_own_failure():
    assert 1 == 2

def test_unmarked():
    model()(torch.ones(1, 2))
"""
    )
    done = pytester.runpytest_subprocess("--strict-markers")
    done.assert_outcomes(passed=4, failed=4)
    done.stdout.fnmatch_lines(["*1 output retains an autograd graph (first: Sequential)*"])
    done.stdout.fnmatch_lines(["*1 output retains an autograd graph (first: Outer)*"])
    done.stdout.fnmatch_lines(["*assert 1 == 2*"])


def test_the_fixture_fails_with_the_reasons_and_without_frames_of_gradrun(pytester):
    config = ROOT / "configs" / "digits.yaml"
    pytester.makefile(".yaml", wrong="model: {source: zoo, nam: mlp}\n")
    pytester.makepyfile(
        f"""
OPTIONS = {{"run.threads": 1, "data.batch_size": 100}}

def test_good(gradrun_check, tmp_path):
    result = gradrun_check({str(config)!r}, output={{"path": str(tmp_path / "run")}}, **OPTIONS)
    assert result.predictions == 500

def test_bad(gradrun_check, tmp_path):
    gradrun_check(
        {str(config)!r},
        output={{"path": str(tmp_path / "run")}},
        model={{"source": "zoo", "name": "mlp"}},
    )

def test_wrong(gradrun_check):
    gradrun_check('wrong.yaml')
"""
    )
    done = pytester.runpytest_subprocess()
    done.assert_outcomes(passed=1, failed=2)
    done.stdout.fnmatch_lines(["gradrun check:", "model runs: *failed*"])
    text = done.stdout.str()
    assert "unknown key; did you mean name?" in text
    assert "gradrun_check('wrong.yaml')" in text
    assert "config/load.py" not in text
    assert "checks/check.py" not in text


def test_the_plugin_does_not_import_torch_if_unused(pytester):
    pytester.makepyfile(
        """
import sys

def test_light():
    assert "torch" not in sys.modules
"""
    )
    pytester.runpytest_subprocess().assert_outcomes(passed=1)
