"""The commands: words from the shell to the parts, and what they answer to the terminal.

The only importer of Typer, and the one place that catches GradrunError. Parts are imported inside
the commands, so that --help needs neither torch nor pydantic.
"""

from __future__ import annotations

import gc
import io
import json
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import (
    AbstractContextManager,
    contextmanager,
    nullcontext,
    redirect_stdout,
    suppress,
)
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
import typer.core

from gradrun.core.errors import (
    EXIT_CHECK_FAILED,
    EXIT_INCONCLUSIVE,
    ConfigError,
    GradrunError,
    Interrupted,
)
from gradrun.core.version import __version__

if TYPE_CHECKING:
    from rich.console import Console

    from gradrun.results.result import AnyResult, CheckResult

_ALL_MODES = "grad,no_grad,inference_mode"

app = typer.Typer(
    name="gradrun",
    help="Run a PyTorch model over data from one YAML file, and say what it truly cost.",
    no_args_is_help=True,
    # Plain help: Rich panels import Markdown and tracebacks, which doubles the time of --help.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={
        "help_option_names": ["-h", "--help"],
        # Off, where Typer has None: to read None it imports pydantic, the half of a short command.
        "default_map": dict.fromkeys(("help", "install_completion", "show_completion"), False),
    },
)

Sets = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change a key of the config, such as run.mode=no_grad; as often as wanted.",
    ),
]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust-code",
        help="Allow the config to run code: python targets, torchscript and exported files, code "
        "from Hugging Face.",
    ),
]
Json = Annotated[
    str | None,
    typer.Option("--json", metavar="FILE", help="Write the result as JSON; - is stdout."),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Options of gradrun itself."""
    if version:
        typer.echo(f"gradrun {__version__}")
        raise typer.Exit


@app.command()
def infer(
    config: Annotated[Path | None, typer.Argument(help="The YAML file of the run.")] = None,
    example: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Run a bundled example (digits) instead; writes here."),
    ] = None,
    sets: Sets = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FOLDER", help="Write here, not to output.path."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier run in the output folder.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an unfinished run, if there is one.")
    ] = False,
    trust_code: Trust = False,
    json_file: Json = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Run all data through the model; keep and measure everything."""
    resume_command = _resume_command(config, example, sets, output, trust_code)
    with _errors(debug, json_file, quiet, resume_command) as console:
        from gradrun.config.load import load_config

        path, output_base = _chosen_config(config, example)
        changes = [*(sets or []), *([f"output.path={_quoted(output)}"] if output else [])]
        settings = load_config(path, changes, output_base=output_base)
        with _quick_imports():
            from gradrun.inference.infer import infer as run
        from gradrun.report.progress import progress_bar

        if overwrite and resume:
            raise ConfigError("--overwrite begins anew, --resume goes on: choose one")
        with (
            _stdout_kept(json_file),
            progress_bar(_console(stderr=True, quiet=quiet)) as progress,
        ):
            result = run(
                settings,
                trust_code=trust_code,
                overwrite=overwrite,
                resume=resume,
                progress=progress,
            )
        _answer(result, console, json_file)


def _resume_command(
    config: Path | None,
    example: str | None,
    sets: list[str] | None,
    output: Path | None,
    trust_code: bool,
) -> str:
    """Return the command that continues this run."""
    words = ["gradrun", "infer", *([str(config)] if config else [])]
    words += ["--example", example] if example else []
    words += [word for change in sets or [] for word in ("--set", change)]
    words += ["--output", str(output)] if output else []
    words += ["--trust-code"] if trust_code else []
    return shlex.join([*words, "--resume"])


class _ModesMayBeBare(typer.core.TyperCommand):
    """Lets --modes stand alone, or before the config, and then mean all of them."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the list of all modes behind a --modes that has none."""
        words: list[str] = []
        for word, after in zip(args, [*args[1:], "--"], strict=False):
            words.append(word)
            if word == "--modes" and (after.startswith("-") or _is_config(after)):
                words.append(_ALL_MODES)
        return super().parse_args(ctx, words)


@app.command(cls=_ModesMayBeBare)
def compare(
    config: Annotated[
        Path | None, typer.Argument(help="The YAML file of the run; default: a bundled example.")
    ] = None,
    modes: Annotated[
        list[str] | None,
        typer.Option(
            "--modes", metavar="[LIST]", help="Which modes: grad,no_grad,inference_mode or fewer."
        ),
    ] = None,
    over: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=A,B", help="Compare along another key: run.threads=1,2."),
    ] = None,
    sets: Sets = None,
    trust_code: Trust = False,
    json_file: Json = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Put gradient modes side by side: time, memory, outputs, advice."""
    with _errors(debug, json_file, quiet) as console:
        from gradrun.config.load import load_config
        from gradrun.core.resources import bundled

        if over and modes:
            raise ConfigError("--over compares along one key, --modes along run.mode: name one")
        if over and len(over) > 1:
            raise ConfigError("--over compares along one key at a time; it was given twice")
        if config is None:
            _say(console, "no config named: this is the bundled example, digits.yaml")
        path = config or bundled("configs") / "digits.yaml"
        settings = load_config(path, sets or [], output_base=None if config else Path.cwd())
        listed = [mode for words in modes or [_ALL_MODES] for mode in words.split(",") if mode]
        from gradrun.comparison.compare import compare as run
        from gradrun.report.progress import progress_bar

        with progress_bar(_console(stderr=True, quiet=quiet)) as progress:
            compared = run(
                settings,
                listed,
                over=_axis(over[0] if over else None),
                trust_code=trust_code,
                progress=progress,
            )
        _answer(compared.result, console, json_file)


@app.command()
def audit(
    config: Annotated[Path, typer.Argument(help="The YAML file of the run.")],
    compile_too: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Look at torch.compile too.")
    ] = True,
    sets: Sets = None,
    trust_code: Trust = False,
    json_file: Json = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Find what is unsafe in a mode, and which module costs what."""
    with _errors(debug, json_file, quiet) as console:
        from gradrun.config.load import load_config

        settings = load_config(config, sets or [])
        with _quick_imports():
            from gradrun.audits.audit import audit as run
        from gradrun.report.progress import progress_bar
        from gradrun.results.safety import has_errors

        with _stdout_kept(json_file), progress_bar(_console(stderr=True, quiet=quiet)) as progress:
            result = run(settings, trust_code=trust_code, compile=compile_too, progress=progress)
        _answer(result, console, json_file)
        if has_errors(result):
            raise typer.Exit(EXIT_CHECK_FAILED)


@app.command()
def check(
    config: Annotated[Path, typer.Argument(help="The YAML file of the run.")],
    baseline: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Find regressions since this saved result."),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="CONFIG|REV", help="Measure a config or git revision beside this one."
        ),
    ] = None,
    save_baseline: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the result as a baseline.")
    ] = None,
    update_expected: Annotated[
        bool, typer.Option("--update-expected", help="Write the golden outputs anew.")
    ] = False,
    junit: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write JUnit XML for a CI server.")
    ] = None,
    inconclusive: Annotated[
        Literal["pass", "fail"] | None,
        typer.Option(help="How to end where a check cannot be decided; default: exit code 4."),
    ] = None,
    sets: Sets = None,
    trust_code: Trust = False,
    json_file: Json = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Guard a CI: limits, golden outputs and regressions.

    Ends with exit code 3 where one is broken, and 4 where one cannot be decided.
    """
    with _errors(debug, json_file, quiet) as console:
        for option, file in (("--junit", junit), ("--save-baseline", save_baseline)):
            _check_target(option, str(file) if file else None)
        with _quick_imports():
            from gradrun.checks.check import check as run
        from gradrun.report.progress import progress_bar
        from gradrun.report.terminal import display_path

        with (
            _refusal_told(junit),
            _stdout_kept(json_file),
            progress_bar(_console(stderr=True, quiet=quiet)) as progress,
        ):
            result = run(
                config,
                baseline=baseline,
                against=against,
                save_baseline=save_baseline,
                update_expected=update_expected,
                trust_code=trust_code,
                sets=sets or [],
                progress=progress,
            )
        _answer(result, console, json_file)
        held = update_expected and any(o.key == "check.expected" for o in result.outcomes)
        expected = result.config["check"]["expected"] if held else None
        for made in filter(None, (save_baseline, expected)):
            has_errors = made == save_baseline and result.status == "fail"
            _say(
                console,
                f"wrote {display_path(made)}{', of a check that failed' if has_errors else ''}",
            )
        _tell_ci(result, junit)
        undecided = {"pass": 0, "fail": EXIT_CHECK_FAILED, None: EXIT_INCONCLUSIVE}
        codes = {"fail": EXIT_CHECK_FAILED, "inconclusive": undecided[inconclusive]}
        if code := codes.get(result.status, 0):
            if quiet:
                missed = [o.check for o in result.outcomes if o.status == result.status]
                _say(_console(stderr=True), f"{result.status}: {', '.join(missed)}")
            raise typer.Exit(code)


def _tell_ci(result: CheckResult, junit: Path | None) -> None:
    """Say a check's outcomes to a CI server, in its own words."""
    from gradrun.report import github, written
    from gradrun.report.junit import xml

    if junit:
        _write(xml(result), junit, "--junit")
    _tell_github(github.commands(result), lambda: written([("", result)], "markdown"))


@contextmanager
def _refusal_told(junit: Path | None) -> Iterator[None]:
    """Say to a CI server too why a check could not begin or end."""
    try:
        yield
    except Interrupted:
        raise
    except GradrunError as error:
        from gradrun.report import github, markdown
        from gradrun.report.junit import refusal

        said = str(error)
        if junit:
            _write(refusal(said), junit, "--junit")
        _tell_github([github.refusal(said)], lambda: markdown.refusal(said))
        raise


def _tell_github(lines: Iterable[str], summary: Callable[[], str]) -> None:
    """Annotations for the runner, and a text for the step's summary, where there are such."""
    if os.environ.get("GITHUB_ACTIONS") == "true":
        for line in lines:
            sys.stderr.write(f"{line}\n")
    if place := os.environ.get("GITHUB_STEP_SUMMARY"):
        with Path(place).open("a", encoding="utf-8") as file:
            file.write(summary())


@app.command()
def modes(
    device: Annotated[
        str, typer.Option(metavar="NAME", help="Where to run it: auto, cpu, cuda, cuda:1, mps.")
    ] = "auto",
    json_file: Json = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Prove what each gradient mode does on the installed torch."""
    with _errors(debug, json_file, quiet) as console:
        with _quick_imports():
            from gradrun.audits.mode_behavior import mode_behavior
        from gradrun.report.modes import show

        proven = mode_behavior(device)
        show(proven, console)
        if json_file:
            _write_json(proven.to_json(), json_file)
        if proven.differing:
            raise typer.Exit(EXIT_CHECK_FAILED)


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="The output folder of a run.")],
    json_file: Json = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Hold a run's predictions against its journal's checksums.

    Says which samples are missing or differ; exit code 3 where there are such.
    """
    with _errors(debug, json_file, quiet) as console:
        from gradrun.output.verification import verify as run
        from gradrun.report.verified import show

        found = run(folder)
        show(found, console)
        if json_file:
            _write_json(json.dumps(found.to_dict(), indent=1), json_file)
        if not found.complete:
            raise typer.Exit(EXIT_CHECK_FAILED)


class _WordsAsTheyAre(typer.core.TyperCommand):
    """Parses as ever, but makes Paths of words without Typer's pydantic."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Leave to Typer what is no report: --help, completion, and a path too few."""
        told, _, _ = self.make_parser(ctx).parse_args(args=[*args])
        if ctx.resilient_parsing or "help" in told or not told.get("results"):
            return super().parse_args(ctx, args)
        told["results"] = [Path(word) for word in told["results"]]
        if told.get("output") is not None:
            told["output"] = Path(told["output"])
        ctx.params = told
        return []


@app.command(cls=_WordsAsTheyAre)
def report(
    results: Annotated[
        list[Path],
        typer.Argument(help="Folders of runs, or their result.json; several in columns."),
    ],
    form: Annotated[
        str | None,
        typer.Option("--format", metavar="NAME", help="table, markdown, csv, json or html."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="Write here; its suffix decides the format."
        ),
    ] = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show saved results again, in any form; nothing is run."""
    with _errors(debug, None, quiet) as console:
        with _quick_imports():
            from gradrun import report
            from gradrun.report.terminal import display_path
            from gradrun.results.ratios import recomputed
            from gradrun.results.result import RunResult

        chosen = _chosen_format(form, output, results)
        named = [(display_path(path), recomputed(RunResult.load(path))) for path in results]
        if chosen == "table" and output is None:
            report.show(named, console)
            return
        text = report.table(named) if chosen == "table" else report.written(named, chosen)
        if output is None:
            sys.stdout.write(text)
            return
        _write(text, output, "-o")
        _say(console, f"wrote {display_path(output)}")


def _chosen_format(form: str | None, output: Path | None, results: list[Path]) -> str:
    """The format that was named, or else the one of the file's suffix."""
    from gradrun.report import FORMATS, SUFFIXES

    if form is not None and form not in FORMATS:
        from gradrun.core.suggest import suggest

        raise ConfigError(f"there is no format {form!r}; {suggest(form, FORMATS)}")
    if output is None:
        return form or "table"
    if output.is_dir():
        raise ConfigError(f"-o {output}: a folder, where a file is wanted")
    if output.resolve() in {
        (path / "result.json" if path.is_dir() else path).resolve() for path in results
    }:
        raise ConfigError(f"-o {output} is the result itself; name another file")
    chosen = form or SUFFIXES.get(output.suffix.lower())
    if chosen is None:
        raise ConfigError(
            f"-o {output}: its suffix names no format ({', '.join(SUFFIXES)}); "
            f"say --format {'|'.join(FORMATS)}"
        )
    return chosen


@app.command()
def validate(
    configs: Annotated[list[Path], typer.Argument(help="YAML files to check.")],
    sets: Sets = None,
    json_file: Json = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Check configs without running them: every error, with its line."""
    with _errors(debug, json_file, quiet) as console:
        from gradrun.config.load import load_config

        checked: dict[str, Any] = {}
        problems: list[str] = []
        for path in configs:
            try:
                resolve_config = load_config(path, sets or []).config.model_dump(mode="json")
                checked[str(path)] = {"valid": True, "config": resolve_config}
                _say(console, f"{path}: valid (weights and shapes are checked by infer)")
            except ConfigError as error:
                checked[str(path)] = {"valid": False, "error": str(error)}
                problems.append(str(error))
        if json_file:
            _write_json(json.dumps(checked, indent=1), json_file)
        if problems:
            raise ConfigError("\n".join(problems))


@app.command()
def init(
    file: Annotated[Path, typer.Argument(help="The config to write.")] = Path("gradrun.yaml"),
    target: Annotated[
        str | None,
        typer.Option("--from", metavar="FILE.PY:NAME", help="A model of yours to fill in."),
    ] = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write a commented starter config; asks nothing."""
    with _errors(debug, None, quiet) as console:
        from gradrun.config.template import config_template

        if target:
            place, colon, name = target.rpartition(":")
            if not colon or not name.isidentifier():
                raise ConfigError(f"--from {target!r} is written FILE.PY:NAME, as nets/mine.py:Net")
            if place.endswith(".py"):
                if not Path(place).is_file():
                    raise ConfigError(f"--from {target!r}: there is no file {place}")
                target = f"{os.path.relpath(place, file.absolute().parent)}:{name}"
        try:
            with file.open("x", encoding="utf-8") as new:
                new.write(config_template(target))
        except FileExistsError as error:
            raise ConfigError(f"{file} exists already; name another file") from error
        except OSError as error:
            raise GradrunError(f"{file} cannot be written: {error.strerror}") from error
        first = "say in data.inputs what your model takes, then " if target else ""
        trust = " --trust-code" if target else ""
        _say(console, f"wrote {file}; next: {first}gradrun infer {file}{trust}")


@app.command()
def schema() -> None:
    """Print the JSON Schema of a config, for editors."""
    from gradrun.config.schema import RunConfig

    described = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    typer.echo(json.dumps(described | RunConfig.model_json_schema(), indent=1))


# --- what the commands share -------------------------------------------------------------------


def _chosen_config(config: Path | None, example: str | None) -> tuple[Path, Path | None]:
    """The config's path, and where a relative output.path starts if not beside the config."""
    from gradrun.core.resources import bundled, examples
    from gradrun.core.suggest import suggest

    if config and example:
        raise ConfigError("name a config or --example, not both")
    if config:
        return config, None
    if not example:
        raise ConfigError("no config; name a YAML file, or try --example digits")
    if example not in examples():
        raise ConfigError(f"there is no example {example!r}; {suggest(example, examples())}")
    return bundled("configs") / f"{example}.yaml", Path.cwd()


def _is_config(word: str) -> bool:
    return word.endswith((".yaml", ".yml")) or Path(word).is_file()


def _axis(over: str | None) -> tuple[str, list[str]] | None:
    """`"run.threads=1,2"` as the key and its values."""
    if over is None:
        return None
    key, equals, values = over.partition("=")
    if not equals or "," not in values:
        raise ConfigError(f"--over {over}: takes KEY=A,B with two values or more: run.threads=1,2")
    return key, values.split(",")


def _quoted(folder: Path) -> str:
    """A folder typed on the command line as YAML text, from here and not from the config."""
    return json.dumps(os.path.abspath(folder))  # noqa: PTH100 - a link stays a link


@contextmanager
def _quick_imports() -> Iterator[None]:
    """Import torch without collecting garbage, then never look at its modules again.

    torch makes some 500,000 objects that live to the end. Walking them during the import, in full
    collections of the run and at exit costs a fifth of a short run's whole time.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextmanager
def _errors(
    debug: bool, json_file: str | None, quiet: bool, resume_command: str = ""
) -> Iterator[Console]:
    """Give the console for people; turn a GradrunError into its sentence and exit code."""
    console = _console(stderr=json_file == "-", quiet=quiet)
    if quiet:
        warnings.simplefilter("ignore")
    try:
        _check_target("--json", json_file)
        try:
            yield console
        finally:
            if sys.stdout:
                sys.stdout.flush()  # what cannot be written fails here, not when Python ends
    except KeyboardInterrupt:
        _tell(Interrupted())
    except OSError as error:
        if debug or isinstance(error, BrokenPipeError):
            raise
        _drop_stdout()
        _tell(GradrunError(f"the report cannot be printed: {error.strerror or error}"))
    except GradrunError as error:
        if debug:
            raise
        if error.result is not None:
            # The first error is the one to tell, whatever ends the tables.
            with suppress(GradrunError, OSError, KeyboardInterrupt):
                _answer(error.result, console, json_file)
        _tell(error, resume_command)


def _drop_stdout() -> None:
    """Let what is still held for stdout go nowhere: Python would try it once more as it ends."""
    with suppress(OSError, ValueError, AttributeError):  # a notebook's has no descriptor
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _tell(error: GradrunError, resume_command: str = "") -> None:
    """Print an error's sentence, and end with its exit code."""
    from rich.text import Text

    from gradrun.report.escaping import escape_control_chars

    text = f"{error}\nto resume: {resume_command}" if error.resumable else str(error)
    _console(stderr=True).print(
        Text.assemble(("error: ", "bold red"), escape_control_chars(text)), soft_wrap=True
    )
    raise typer.Exit(error.exit_code) from None


def _check_target(option: str, file: str | None) -> None:
    """Find out that a file cannot be written before a long run, not after it."""
    if file is None or file == "-":
        return
    if Path(file).is_dir():
        raise ConfigError(f"{option} {file}: a folder, where a file is wanted")
    if not Path(file).absolute().parent.is_dir():
        raise ConfigError(f"{option} {file}: there is no folder {Path(file).parent}")


def _stdout_kept(json_file: str | None) -> AbstractContextManager[Any]:
    """With --json - what a model prints goes to stderr, so that stdout is JSON alone."""
    return redirect_stdout(sys.stderr) if json_file == "-" else nullcontext()


def _console(*, stderr: bool, quiet: bool = False) -> Console:
    """A console that NO_COLOR makes plain: no bold either (https://no-color.org)."""
    from rich.console import Console

    colors: Any = None if os.environ.get("NO_COLOR") else "auto"
    return Console(stderr=stderr, quiet=quiet, color_system=colors, highlight=False)


def _say(console: Console, text: str) -> None:
    from gradrun.report.escaping import escape_control_chars

    console.print(escape_control_chars(text), markup=False, highlight=False, soft_wrap=True)


def _answer(result: AnyResult, console: Console, json_file: str | None) -> None:
    from gradrun import report

    report.show([("", result)], console)
    if json_file:
        _write_json(result.to_json(), json_file)
    _tell_of_reports(result, console, json_file)


def _tell_of_reports(result: AnyResult, console: Console, json_file: str | None) -> None:
    """Print the command that shows a result otherwise, where it was saved."""
    from rich.text import Text

    from gradrun.report.escaping import escape_control_chars
    from gradrun.report.terminal import display_path

    saved = Path(result.info.output_path)
    if not (saved / "result.json").is_file():
        if json_file in (None, "-"):
            return
        saved = Path(str(json_file))
    page = f"{saved.stem or 'report'}.html"
    command = shlex.join(["gradrun", "report", display_path(saved), "-o", page])
    console.print(Text(escape_control_chars(f"more: {command}"), "dim"), soft_wrap=True)


def _write_json(text: str, file: str) -> None:
    if file == "-":
        sys.stdout.write(text + "\n")
        return
    _write(text + "\n", Path(file), "--json")


def _write(text: str, file: Path, option: str) -> None:
    from gradrun.core.files import replace_file

    try:
        if file.exists() and not file.is_file():  # a device or a pipe takes what it is given
            file.write_text(text, encoding="utf-8")
        else:
            replace_file(file, text)
    except OSError as error:
        raise GradrunError(f"{option} {file} cannot be written: {error.strerror}") from error


def main() -> None:
    """The console script."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a µ on an ASCII terminal
    try:
        app()
    except KeyboardInterrupt:  # before a command has begun
        sys.exit(Interrupted().exit_code)
