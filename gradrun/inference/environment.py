"""Describe the machine that a result was measured on."""

from __future__ import annotations

import platform
from pathlib import Path

import numpy
import psutil
import torch

from gradrun.core.cpu import available_cpus
from gradrun.core.version import __version__
from gradrun.inference.allocator import current_allocator
from gradrun.results.peaks_cache import Machine
from gradrun.results.result import Environment


def current_environment(device: torch.device) -> Environment:
    """Return the versions and the hardware that two results must share to be comparable."""
    return Environment(
        gradrun=__version__,
        torch=str(torch.__version__),  # not torch's subclass of str, which needs torch to load
        numpy=numpy.__version__,
        python=platform.python_version(),
        platform=platform.platform(terse=True),
        cpu=cpu_model(),
        cores=psutil.cpu_count(logical=False) or available_cpus(),
        cpus=available_cpus(),
        threads=torch.get_num_threads(),
        allocator=current_allocator(),
        memory=psutil.virtual_memory().total,
        device=str(device),
        device_name=torch.cuda.get_device_name(device) if device.type == "cuda" else None,
    )


def current_machine(device: torch.device) -> Machine:
    """Return the properties of the machine on which the peaks of a device depend."""
    environment = current_environment(device)
    return Machine(
        cpu=environment.cpu,
        cores=environment.cores,
        cpus=environment.cpus,
        instructions=torch.backends.cpu.get_cpu_capability(),
        torch=environment.torch,
        device=" ".join(filter(None, (device.type, environment.device_name))),
    )


def cpu_model() -> str:
    """Return the name of the CPU model, or the machine type where the system gives none."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:  # not Linux
        pass
    return platform.processor() or platform.machine()
