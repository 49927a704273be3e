"""Compare variants by whole runs, for settings that a run in one process does not have."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from gradrun.comparison.predictions import compare_predictions
from gradrun.comparison.session import RoundSession, SessionData, Variant
from gradrun.config.schema import RunConfig
from gradrun.core.errors import ConfigError, GradrunError
from gradrun.core.progress import ProgressCallback, ignore
from gradrun.engines.infer import infer
from gradrun.results.result import InferResult


class WholeRuns(RoundSession):
    """Runs all data once per variant and round, alternately; a round counts as a process.

    Starting the workers is not timed, as in `infer`.
    """

    stage, noun = "timing whole runs", "round"

    def __init__(self, variants: Sequence[Variant], config: RunConfig, *, trust_code: bool) -> None:
        super().__init__(variants, config.measure)
        self._trust_code, self._folder = trust_code, Path()

    def run(self, progress: ProgressCallback = ignore) -> SessionData:
        with TemporaryDirectory(prefix="gradrun-") as name:
            self._folder = Path(name)
            return super().run(progress)

    def run_round(self) -> None:
        order = self.variants[:: -1 if self.rounds % 2 else 1]
        for variant in list(order):
            path = self._folder / str(self.variants.index(variant))
            config = variant.config.replace({"output.path": path, "metrics": ()})
            try:
                result = infer(config, trust_code=self._trust_code, overwrite=True)
            except ConfigError:
                raise
            except GradrunError as error:
                self.drop(variant, error)
                continue
            self._add(variant, result)
        if not self.rounds and self.variants:
            self._compare_outputs()
        self.rounds += 1

    def _add(self, variant: Variant, result: InferResult) -> None:
        measured = result.measurements[0]
        self.data.environment = self.data.environment or result.environment
        self.data.measurements.append(
            measured.replace(
                variant=variant.name,
                process=self.rounds,
                batch_seconds=(measured.seconds,),
                batch_sizes=(measured.samples,),
                batch_elements=(),
            )
        )

    def _compare_outputs(self) -> None:
        """Compare the predictions of each variant with those of the first."""
        folder, measure = self._folder, self.measure
        baseline, *others = self.variants
        for number, variant in enumerate(others, 1):
            bitwise, difference, equal = compare_predictions(
                (folder / "0", folder / str(number)),
                baseline.config.output.format,
                rtol=measure.rtol,
                atol=measure.atol,
            )
            self.add_equivalence(variant, bitwise=bitwise, max_abs_diff=difference, equal=equal)
