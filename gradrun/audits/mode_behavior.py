"""`gradrun.mode_behavior`: the effects of each gradient mode on the installed torch."""

from __future__ import annotations

from pydantic import ValidationError

from gradrun.audits.behavior import measure_facts
from gradrun.config.run import RunSection
from gradrun.core.errors import ConfigError
from gradrun.inference.device import resolve_device
from gradrun.inference.environment import current_environment
from gradrun.results.result import ModeFacts


def mode_behavior(device: str = "auto") -> ModeFacts:
    """Answer every question about the gradient modes by running it on the installed torch.

    Args:
        device: as `run.device`: auto, cpu, cuda, cuda:1 or mps.

    Returns:
        One fact per question and mode, with the expected and the observed answer; `differing`
        contains the facts where the two differ.

    Raises:
        ConfigError: the device is not available, or the name is not valid.
    """
    try:
        RunSection(device=device)
    except ValidationError as error:
        raise ConfigError(
            f"unknown device {device!r}; choose auto, cpu, cuda, cuda:1 or mps"
        ) from error
    chosen = resolve_device(device)
    environment = current_environment(chosen)
    return ModeFacts(
        gradrun=environment.gradrun, environment=environment, facts=measure_facts(chosen)
    )
