"""`gradrun.prove_modes`: what each gradient mode does on the installed torch, run and seen.

Knows the order of the steps; the questions stand in probes/.
"""

from __future__ import annotations

from pydantic import ValidationError

from gradrun.audits.behavior import prove
from gradrun.config.schema import RunSection
from gradrun.core.errors import ConfigError
from gradrun.inference import device as machine
from gradrun.results.result import ModeFacts


def mode_behavior(device: str = "auto") -> ModeFacts:
    """Ask every question about the gradient modes by running it.

    Args:
        device: as `run.device`: auto, cpu, cuda, cuda:1 or mps.

    Returns:
        A fact for each question and mode, with what was expected and what was seen; `differing`
        holds those that torch answers otherwise.

    Raises:
        ConfigError: the device is not there, or is none.
    """
    try:
        RunSection(device=device)
    except ValidationError as error:
        raise ConfigError(
            f"there is no device {device!r}; choose of auto, cpu, cuda, cuda:1, mps"
        ) from error
    chosen = machine.resolve(device)
    environment = machine.environment(chosen)
    return ModeFacts(gradrun=environment.gradrun, environment=environment, facts=prove(chosen))
