"""Compare variants by whole runs, for settings that a run in one process does not have."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from gradrun.comparison.predictions import compare_predictions
from gradrun.comparison.protocol import Failure
from gradrun.comparison.session import SessionData, Variant
from gradrun.config.schema import RunConfig
from gradrun.core.errors import ConfigError, GradrunError
from gradrun.core.progress import Progress, ProgressCallback, ignore
from gradrun.engines.infer import infer
from gradrun.results.result import Equivalence, InferResult


class WholeRuns:
    """Runs all data once per variant and round, alternately; a round counts as a process.

    Starting the workers is not timed, as in `infer`.
    """

    def __init__(self, variants: Sequence[Variant], config: RunConfig, *, trust_code: bool) -> None:
        self.variants, self.measure, self.trust_code = list(variants), config.measure, trust_code
        self.data = SessionData()
        self._rounds = 0
        self._deadline = time.monotonic() + self.measure.budget

    def run(self, progress: ProgressCallback = ignore) -> SessionData:
        """Run rounds until the intervals are narrow or the budget is spent."""
        with tempfile.TemporaryDirectory(prefix="gradrun-") as name:
            while len(self.variants) > 1:
                total = max(self._rounds + 1, self.measure.processes)
                progress(Progress("timing whole runs", self._rounds, total))
                began = time.monotonic()
                self._run_round(Path(name))
                if self._is_done(time.monotonic() - began):
                    break
        return self.finalize()

    def _run_round(self, folder: Path) -> None:
        order = self.variants[:: -1 if self._rounds % 2 else 1]
        for variant in list(order):
            path = folder / str(self.variants.index(variant))
            config = variant.config.replace({"output.path": path, "metrics": ()})
            try:
                result = infer(config, trust_code=self.trust_code, overwrite=True)
            except ConfigError:
                raise
            except GradrunError as error:
                self._drop(variant, str(error))
                continue
            self._add(variant, result)
        if not self._rounds and self.variants:
            self._compare_outputs(folder)
        self._rounds += 1

    def _add(self, variant: Variant, result: InferResult) -> None:
        measured = result.measurements[0]
        self.data.environment = self.data.environment or result.environment
        self.data.measurements.append(
            measured.replace(
                variant=variant.name,
                process=self._rounds,
                batch_seconds=(measured.seconds,),
                batch_sizes=(measured.samples,),
                batch_elements=(),
            )
        )

    def _drop(self, variant: Variant, error: str) -> None:
        self.data.failures.append(Failure(variant=variant.name, batch=0, error=error))
        self.variants.remove(variant)

    def _compare_outputs(self, folder: Path) -> None:
        """Compare the predictions of each variant with those of the first."""
        baseline, *others = self.variants
        for number, variant in enumerate(others, 1):
            bitwise, difference, equal = compare_predictions(
                (folder / "0", folder / str(number)),
                baseline.config.output.format,
                rtol=self.measure.rtol,
                atol=self.measure.atol,
            )
            self.data.equivalence.append(
                Equivalence(
                    baseline=baseline.name,
                    candidate=variant.name,
                    bitwise=bitwise,
                    max_abs_diff=difference,
                    equal=equal,
                )
            )

    def _is_done(self, cost: float) -> bool:
        left = self._deadline - time.monotonic()
        return self.data.is_enough(self.measure, self._rounds, left, cost)

    def finalize(self, *, interrupted: bool = False) -> SessionData:
        """Return the collected data with comparisons and warnings."""
        self.data.conclude(self.measure, self._rounds, "round", interrupted=interrupted)
        return self.data
