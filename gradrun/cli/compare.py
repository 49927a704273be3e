"""`gradrun compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from gradrun.cli.console import command_output
from gradrun.cli.options import Debug, JsonFile, Quiet, Sets, Trust
from gradrun.core.errors import ConfigError

_ALL_MODES = "grad,no_grad,inference_mode"


class BareModesCommand(typer.core.TyperCommand):
    """Accept `--modes` without a value, which means all modes."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Insert the list of all modes after a --modes without a value."""
        words: list[str] = []
        for word, following in zip(args, [*args[1:], "--"], strict=False):
            words.append(word)
            if word == "--modes" and (
                following.startswith("-")
                or following.endswith((".yaml", ".yml"))
                or Path(following).is_file()
            ):
                words.append(_ALL_MODES)
        return super().parse_args(ctx, words)


def compare(
    config: Annotated[
        Path | None, typer.Argument(help="The YAML file of the run; default: a bundled example.")
    ] = None,
    modes: Annotated[
        list[str] | None,
        typer.Option(
            "--modes", metavar="[LIST]", help="Modes to compare: grad,no_grad,inference_mode."
        ),
    ] = None,
    over: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=A,B", help="Compare values of a config key: run.threads=1,2."),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Compare with another config, which is the baseline."),
    ] = None,
    sets: Sets = None,
    trust_code: Trust = False,
    json_file: JsonFile = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compare gradient modes by time, memory and outputs."""
    with command_output(debug=debug, json_file=json_file, quiet=quiet) as out:
        from gradrun.config.load import load_config
        from gradrun.core.resources import bundled

        if over and modes:
            raise ConfigError("--over and --modes cannot be combined; choose one")
        if over and len(over) > 1:
            raise ConfigError("--over can be given only once")
        if against and (over or modes):
            raise ConfigError("--against cannot be combined with --over or --modes")
        if config is None:
            out.print("no config given; using the bundled example digits.yaml")
        path = config or bundled("configs") / "digits.yaml"
        loaded = load_config(path, sets or [], output_base=None if config else Path.cwd())
        names = [mode for words in modes or [_ALL_MODES] for mode in words.split(",") if mode]
        from gradrun.comparison.compare import compare as run

        with out.progress() as progress:
            comparisons = run(
                loaded,
                names,
                over=parse_over(over[0]) if over else None,
                against=load_config(against) if against else None,
                trust_code=trust_code,
                progress=progress,
            )
        out.show_result(comparisons.result)


def parse_over(over: str) -> tuple[str, list[str]]:
    """Split `"run.threads=1,2"` into the key and its values."""
    key, equals, values = over.partition("=")
    if not equals or "," not in values:
        raise ConfigError(f"--over {over}: expected KEY=A,B, such as run.threads=1,2")
    return key, values.split(",")
