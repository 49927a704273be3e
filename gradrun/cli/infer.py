"""`gradrun infer`."""

from __future__ import annotations

import os
import shlex
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gradrun.cli.console import command_output, fast_imports
from gradrun.cli.options import Debug, JsonFile, Quiet, Sets, Trust
from gradrun.cli.pipes import standard_input, standard_output
from gradrun.core.errors import ConfigError

if TYPE_CHECKING:
    from gradrun.config.overrides import OptionValue


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
        typer.Option(
            "--output",
            "-o",
            metavar="FOLDER",
            help="Output folder, for output.path; -: write lines of jsonl or csv to stdout.",
        ),
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
    to_stdout = output == Path("-")
    with ExitStack() as stack:
        stream = stack.enter_context(standard_output()) if to_stdout else None
        options = _options(engine, workers, address, stream.folder if stream else output)
        resume_command = _resume_command(config, example, sets or [], options, trust_code)
        out = stack.enter_context(
            command_output(
                debug=debug,
                json_file=json_file,
                quiet=quiet,
                resume_command=resume_command,
                to_stdout=to_stdout,
            )
        )
        from gradrun.config.load import load_config

        path, output_base = _choose_config(config, example)
        loaded = load_config(path, [*(sets or []), *options], output_base=output_base)
        with fast_imports():
            from gradrun.engines.infer import infer as run
        if overwrite and resume:
            raise ConfigError("--overwrite and --resume cannot be combined")
        if stream:
            if resume or json_file == "-":
                raise ConfigError(f"--output - and {'--resume' if resume else '--json -'} conflict")
            loaded = stream.changed(loaded)
        loaded = stack.enter_context(standard_input(loaded))
        with out.progress() as progress, stream or nullcontext():
            result = run(
                loaded,
                trust_code=trust_code,
                overwrite=overwrite,
                resume=resume,
                progress=stream.copying(progress) if stream else progress,
            )
        if stream:
            result = result.replace(files=(), info=result.info.replace(output_path=""))
        out.show_result(result)


def _options(
    engine: str | None, workers: str | None, address: str | None, output: Path | None
) -> list[OptionValue]:
    """Return the options that set keys of the config."""
    from gradrun.config.overrides import OptionValue

    values = []
    if engine or workers or address:
        # Without --engine, the other option decides.
        source = engine or ("ray" if address else "processes")
        by = "--engine" if engine else "--address" if address else "--workers"
        values.append(OptionValue(by, "engine.source", source, engine or address or workers or ""))
    if workers:
        number = int(workers) if workers.isascii() and workers.isdecimal() else workers
        values.append(OptionValue("--workers", "engine.workers", number, workers))
    if address:
        values.append(OptionValue("--address", "engine.address", address, address))
    if output:
        from gradrun.core.remote import is_address

        # Relative to the current folder, not to the config; symbolic links are kept.
        path = str(output) if is_address(output) else os.path.abspath(output)  # noqa: PTH100
        values.append(OptionValue("--output", "output.path", path, str(output)))
    return values


def _resume_command(
    config: Path | None,
    example: str | None,
    sets: list[str],
    options: list[OptionValue],
    trust_code: bool,
) -> str:
    words = ["gradrun", "infer", *([str(config)] if config else [])]
    words += ["--example", example] if example else []
    words += [word for override in sets for word in ("--set", override)]
    typed = {given.option: given.typed for given in options}
    words += [word for pair in typed.items() for word in pair]
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
