"""The description of the machine in a result."""

from __future__ import annotations

import sys

import pytest
import torch

from gradrun.inference import environment
from tests.inference.test_device import CPUS


def test_the_environment_describes_versions_and_hardware() -> None:
    described = environment.current_environment(torch.device("cpu"))
    assert described.torch == torch.__version__
    assert described.python == ".".join(map(str, sys.version_info[:3]))
    assert 1 <= described.cpus <= CPUS
    assert described.cores >= 1
    assert described.memory > 2**27
    assert described.cpu
    assert (described.device, described.device_name) == ("cpu", None)


@pytest.mark.cuda
def test_the_environment_names_the_gpu() -> None:
    assert environment.current_environment(torch.device("cuda")).device_name


def test_the_environment_contains_only_plain_strings_and_numbers() -> None:
    values = environment.current_environment(torch.device("cpu")).as_dict()
    assert {type(value) for value in values.values()} <= {str, int, type(None)}
