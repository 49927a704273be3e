"""`gradrun infer`."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import Annotated

import typer

from gradrun.cli.console import command_output, fast_imports
from gradrun.cli.options import Debug, JsonFile, Quiet, Sets, Trust
from gradrun.core.errors import ConfigError


def infer(
    config: Annotated[Path | None, typer.Argument(help="The YAML file of the run.")] = None,
    example: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Run a bundled example (digits); writes to the current folder."
        ),
    ] = None,
    sets: Sets = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FOLDER", help="Output folder, for output.path."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier run in the output folder.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume an unfinished run, if any.")
    ] = False,
    workers: Annotated[
        str | None,
        typer.Option(
            metavar="N", help="Spread the run over N worker processes; auto: as many as pay."
        ),
    ] = None,
    engine: Annotated[
        str | None, typer.Option(metavar="NAME", help="Engine of the workers: processes or ray.")
    ] = None,
    address: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Head of the Ray cluster, or auto.")
    ] = None,
    trust_code: Trust = False,
    json_file: JsonFile = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Run inference on all data; write predictions and measure."""
    sets = [*(sets or []), *_engine_overrides(engine, workers, address)]
    resume_command = _resume_command(config, example, sets, output, trust_code)
    with command_output(
        debug=debug, json_file=json_file, quiet=quiet, resume_command=resume_command
    ) as out:
        from gradrun.config.load import load_config

        path, output_base = _choose_config(config, example)
        overrides = [*sets, *([f"output.path={_quote(output)}"] if output else [])]
        loaded = load_config(path, overrides, output_base=output_base)
        with fast_imports():
            from gradrun.engines.infer import infer as run
        if overwrite and resume:
            raise ConfigError("--overwrite and --resume cannot be combined")
        with out.progress() as progress:
            result = run(
                loaded,
                trust_code=trust_code,
                overwrite=overwrite,
                resume=resume,
                progress=progress,
            )
        out.show_result(result)


def _engine_overrides(engine: str | None, workers: str | None, address: str | None) -> list[str]:
    """Return the options of the engine as overrides of its section."""
    given = {"source": engine, "workers": workers, "address": address}
    if not any(given.values()):
        return []
    given["source"] = engine or ("ray" if address else "processes")
    return [f"engine.{key}={value}" for key, value in given.items() if value]


def _resume_command(
    config: Path | None,
    example: str | None,
    sets: list[str],
    output: Path | None,
    trust_code: bool,
) -> str:
    words = ["gradrun", "infer", *([str(config)] if config else [])]
    words += ["--example", example] if example else []
    words += [word for override in sets for word in ("--set", override)]
    words += ["--output", str(output)] if output else []
    words += ["--trust-code"] if trust_code else []
    return shlex.join([*words, "--resume"])


def _choose_config(config: Path | None, example: str | None) -> tuple[Path, Path | None]:
    """Return the config's path, and the base of output.path if it is not the config's folder."""
    from gradrun.core.resources import bundled, examples
    from gradrun.core.suggest import suggest

    if config and example:
        raise ConfigError("a config and --example cannot be combined")
    if config:
        return config, None
    if not example:
        raise ConfigError("no config; pass a YAML file, or try --example digits")
    if example not in examples():
        raise ConfigError(f"unknown example {example!r}; {suggest(example, examples())}")
    return bundled("configs") / f"{example}.yaml", Path.cwd()


def _quote(folder: Path) -> str:
    """Return a YAML string of the path relative to the current folder, not to the config."""
    return json.dumps(os.path.abspath(folder))  # noqa: PTH100 - keep symbolic links
