"""The pytest plugin, in test runs and processes of its own.

In this process they would leave modules of gradrun behind that are not those of other tests.
"""

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


def test_the_marker_fails_a_test_whose_model_keeps_a_graph(pytester):
    pytester.makepyfile(
        MODELS
        + """
@pytest.mark.no_graph
def test_keeps():
    model()(torch.ones(1, 2))

@pytest.mark.no_graph
@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_keeps_none(guard):
    with guard():
        model()(torch.ones(1, 2))

@pytest.mark.no_graph
def test_what_another_model_drops_is_no_output():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model()

        def forward(self, x):
            return self.inner(x).detach()

    Outer()(torch.ones(1, 2))

@pytest.mark.no_graph
def test_a_forward_that_raises_hides_nothing():
    with pytest.raises(RuntimeError):
        model()(torch.ones(1, 3))
    model()(torch.ones(1, 2))

@pytest.mark.no_graph
def test_a_dict_has_outputs_too():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model()

        def forward(self, x):
            return {"logits": self.inner(x)}

    Outer()(torch.ones(1, 2))

@pytest.mark.no_graph
def test_its_own_failure_is_told():
    assert 1 == 2

def test_unmarked():
    model()(torch.ones(1, 2))
"""
    )
    done = pytester.runpytest_subprocess("--strict-markers")
    done.assert_outcomes(passed=4, failed=4)
    done.stdout.fnmatch_lines(["*1 output keeps a graph, the first of Sequential*"])
    done.stdout.fnmatch_lines(["*1 output keeps a graph, the first of Outer*"])
    done.stdout.fnmatch_lines(["*assert 1 == 2*"])


def test_the_fixture_fails_with_the_reasons(pytester):
    config = ROOT / "configs" / "digits.yaml"
    pytester.makepyfile(
        f"""
def test_good(gradrun_check, tmp_path):
    result = gradrun_check({str(config)!r}, output={{"path": str(tmp_path / "run")}})
    assert result.predictions == 500

def test_bad(gradrun_check, tmp_path):
    gradrun_check(
        {str(config)!r},
        output={{"path": str(tmp_path / "run")}},
        check={{"limits": {{"forward_peak": "1 KiB"}}}},
    )
"""
    )
    done = pytester.runpytest_subprocess()
    done.assert_outcomes(passed=1, failed=1)
    done.stdout.fnmatch_lines(["gradrun check:", "forward peak: * too much*"])


def test_what_is_wrong_with_a_config_is_a_sentence_and_no_tour_of_gradrun(pytester):
    pytester.makefile(".yaml", wrong="model: {source: zoo, nam: mlp}\n")
    pytester.makepyfile("def test_wrong(gradrun_check):\n    gradrun_check('wrong.yaml')\n")
    found = pytester.runpytest_subprocess()
    found.assert_outcomes(failed=1)
    text = found.stdout.str()
    assert "unknown key; did you mean name?" in text
    assert "gradrun_check('wrong.yaml')" in text
    assert "yamlfile.py" not in text
    assert "jobs/check.py" not in text


def test_the_plugin_costs_no_torch_where_nobody_asks(pytester):
    pytester.makepyfile(
        """
import sys

def test_light():
    assert "torch" not in sys.modules
"""
    )
    pytester.runpytest_subprocess().assert_outcomes(passed=1)
