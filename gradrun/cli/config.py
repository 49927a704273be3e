"""`gradrun validate`, `gradrun init` and `gradrun schema`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from gradrun.cli.console import command_output
from gradrun.cli.options import Debug, JsonFile, Quiet, Sets, Trust
from gradrun.core.errors import ConfigError, GradrunError


def validate(
    configs: Annotated[list[Path], typer.Argument(help="YAML files to validate.")],
    sets: Sets = None,
    explain: Annotated[
        bool,
        typer.Option("--explain", help="Open model and data, and state how they are interpreted."),
    ] = False,
    trust_code: Trust = False,
    json_file: JsonFile = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Validate configs without running them; list all errors."""
    with command_output(debug=debug, json_file=json_file, quiet=quiet) as out:
        from gradrun.config.load import load_config

        validated: dict[str, Any] = {}
        problems: list[str] = []
        for path in configs:
            try:
                loaded = load_config(path, sets or [])
                entry = {"valid": True, "config": loaded.config.model_dump(mode="json")}
                if explain:
                    from gradrun.engines.infer import explain as interpret
                    from gradrun.report.document import describe_interpretation
                    from gradrun.report.terminal import show

                    explained = interpret(loaded, trust_code=trust_code)
                    entry["interpretation"] = [s.as_dict() for s in explained.statements]
                    entry["warnings"] = [w.as_dict() for w in explained.warnings]
                    out.print(
                        f"{path}: valid; model and data can be opened "
                        "(infer also checks labels, shapes and outputs)\n"
                    )
                    show(describe_interpretation(*explained), out.console)
                else:
                    out.print(f"{path}: valid (weights and shapes are checked by infer)")
                validated[str(path)] = entry
            except ConfigError as error:
                validated[str(path)] = {"valid": False, "error": str(error)}
                problems.append(str(error))
        out.write_json(json.dumps(validated, indent=1))
        if problems:
            raise ConfigError("\n".join(problems))


def init(
    file: Annotated[Path, typer.Argument(help="The config to write.")] = Path("gradrun.yaml"),
    target: Annotated[
        str | None,
        typer.Option("--from", metavar="FILE.PY:NAME", help="A model in your code."),
    ] = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write a commented starter config."""
    with command_output(debug=debug, quiet=quiet) as out:
        from gradrun.config.template import config_template

        text = config_template(_relative_target(target, file) if target else None)
        try:
            with file.open("x", encoding="utf-8") as new:
                new.write(text)
        except FileExistsError as error:
            raise ConfigError(f"{file} already exists; choose another file") from error
        except OSError as error:
            raise GradrunError(f"{file} cannot be written: {error.strerror}") from error
        adapt = "set data.inputs to your model's inputs, then " if target else ""
        trust = " --trust-code" if target else ""
        out.print(f"wrote {file}; next: {adapt}gradrun infer {file}{trust}")


def _relative_target(target: str, config: Path) -> str:
    """Return FILE.PY:NAME with the file relative to the config's folder."""
    module, colon, name = target.rpartition(":")
    if not colon or not name.isidentifier():
        raise ConfigError(f"--from {target!r}: expected FILE.PY:NAME, such as nets/mine.py:Net")
    if not module.endswith(".py"):
        return target
    if not Path(module).is_file():
        raise ConfigError(f"--from {target!r}: file {module} does not exist")
    return f"{os.path.relpath(module, config.absolute().parent)}:{name}"


def schema() -> None:
    """Print the JSON Schema of a config, for editors."""
    from gradrun.config.schema import RunConfig

    version = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    typer.echo(json.dumps(version | RunConfig.model_json_schema(), indent=1))
