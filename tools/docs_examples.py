"""Record the program's real output in README.md and docs/: `make docs-examples`.

A console block that follows `<!-- recorded: SCENARIO -->` or `<!-- checked: SCENARIO -->` shows
one command and its output. This script prepares the scenario's folder, runs the command in it and
rewrites the output. Tests run the commands of `checked` blocks and compare. The output of
`recorded` blocks depends on the machine or takes long, so tests only parse their commands.

`<!-- recorded: SCENARIO, section TEXT -->` keeps the one paragraph that starts with TEXT.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
HOME = "/home/me"
"""Stands for the folder in which commands run."""

_WIDTH = 80
_LONGEST_LINE = 96
_PICTURE = ROOT / "docs" / "images" / "infer.svg"
_PICTURE_COMMAND = "gradrun infer configs/digits.yaml"
_ATTEMPTS = 8


class Block(NamedTuple):
    """A fenced block of a page; `line` is that of its first line of code."""

    language: str
    code: str
    line: int
    kind: str = ""
    """`recorded` or `checked`, where a comment above the block says so."""
    scenario: str = ""
    section: str = ""


_BLOCK = re.compile(
    r"(?:^<!-- (?P<kind>recorded|checked): (?P<scenario>[\w-]+)"
    r"(?:, section (?P<section>.*))? -->\n)?"
    r"^(?P<indent> *)```(?P<language>\w*)\n(?P<code>(?s:.*?))^ *```$",
    re.MULTILINE,
)


def pages() -> list[Path]:
    """README.md and the written pages of the documentation."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks_of(text: str) -> list[Block]:
    """The fenced blocks of a page."""
    return [
        Block(
            match["language"],
            textwrap.dedent(match["code"]),
            text.count("\n", 0, match.start("code")) + 1,
            match["kind"] or "",
            match["scenario"] or "",
            match["section"] or "",
        )
        for match in _BLOCK.finditer(text)
    ]


# --- scenarios: the files that a command finds -------------------------------------------------


def prepare(scenario: str, folder: Path, page: str) -> None:
    """Fill an empty folder with the files of a scenario; `page` is the text around the block."""
    _SCENARIOS[scenario](folder, page)


def _examples(folder: Path, page: str) -> None:
    for name in ("configs", "models"):
        ignored = shutil.ignore_patterns("runs", "__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)


def _finished(folder: Path, page: str) -> None:
    """The examples, one of which has run."""
    _examples(folder, page)
    _run(["infer", "configs/digits.yaml", "--quiet"], folder)


def _page(folder: Path, page: str) -> None:
    """The files that earlier blocks of the page show."""
    for block in blocks_of(page):
        if file := re.match(r"# (\S+\.\w+)\n", block.code):
            path = folder / file[1]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.code, encoding="utf-8")


_TYPO = """\
model: {source: zoo, name: digits_cnn}
data:
  source: arrays
  path: configs/digits.npz
  batchsize: 64
run:
  mode: nograd
output: {path: runs/digits}
"""


def _typo(folder: Path, page: str) -> None:
    _examples(folder, page)
    (folder / "digits.yaml").write_text(_TYPO)


_INTERRUPTED_NET = """\
import os
import signal

from torch import nn


class Net(nn.Linear):
    done = 0

    def forward(self, x):
        self.done += len(x)
        if self.done == 10_000:
            os.kill(os.getpid(), signal.SIGINT)
        return super().forward(x)
"""

_NIGHT = """\
model: {source: python, target: net.py:Net, args: {in_features: 64, out_features: 4}}
data: {source: synthetic, inputs: {x: {shape: [64]}}, samples: 40000, batch_size: 40}
run: {warmup: 1}
output: {path: runs/night}
"""


def _night(folder: Path, page: str) -> None:
    (folder / "net.py").write_text(_INTERRUPTED_NET)
    (folder / "night.yaml").write_text(_NIGHT)


_NET = """\
from torch import nn


def Net():
    return nn.Sequential(nn.Linear(64, {width}), nn.ReLU(), nn.Linear({width}, {width}), nn.ReLU())
"""

_CHECK = """\
model: {source: python, target: net.py:Net}
data: {source: synthetic, inputs: {x: {shape: [64]}}, samples: 640, batch_size: 64}
run: {threads: 1}
output: {path: runs/net}
check:
  limits:
    forward_peak: 1 MiB
    speedup_over_grad: ">= 1.0"
"""


def _check(folder: Path, page: str) -> None:
    """A repository whose working tree makes the model slower and larger than on main."""
    identity = ["-c", "user.name=me", "-c", "user.email=me@example.com"]
    (folder / "gradrun.yaml").write_text(_CHECK)
    (folder / "net.py").write_text(_NET.format(width=256))
    (folder / ".gitignore").write_text("runs/\n__pycache__/\n")
    for words in (["init", "-q", "-b", "main"], ["add", "."], ["commit", "-q", "-m", "net"]):
        subprocess.run(["git", *identity, *words], cwd=folder, check=True)
    (folder / "net.py").write_text(_NET.format(width=320))


_SCENARIOS: dict[str, Callable[[Path, str], None]] = {
    "check": _check,
    "examples": _examples,
    "finished": _finished,
    "night": _night,
    "page": _page,
    "typo": _typo,
}


# --- recording ---------------------------------------------------------------------------------


def main() -> None:
    """Rewrite the blocks of all pages, or of the pages that are named, and the picture."""
    wanted = [Path(word).resolve() for word in sys.argv[1:]]
    for page in wanted or pages():
        if page.suffix == ".md":
            text = page.read_text(encoding="utf-8")
            recorded = _BLOCK.sub(partial(_rewritten, page=text), text)
            if recorded != text:
                page.write_text(recorded, encoding="utf-8")
    if not wanted or _PICTURE in wanted:
        _PICTURE.write_text(_picture(), encoding="utf-8")


def _rewritten(match: re.Match[str], page: str) -> str:
    if match["kind"] is None:
        return match[0]
    command = match["code"].partition("\n")[0].strip()
    print(command, file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(match["scenario"], folder, page)
        shown = clean(_run(shlex.split(command)[2:], folder), folder)
    code = "\n".join([command, *_kept(shown, match["section"] or "")])
    start, end = match.start("code") - match.start(), match.end("code") - match.start()
    code = textwrap.indent(code, match["indent"])
    return f"{match[0][:start]}{code}\n{match[0][end:]}"


def clean(text: str, folder: Path) -> str:
    """A command's output with the folder's name replaced, as pages show it."""
    return text.replace(str(folder.resolve()), HOME).replace(str(folder), HOME)


def _kept(text: str, section: str) -> Iterator[str]:
    lines = [line.rstrip() for line in text.strip("\n").split("\n")]
    if section:
        first = next((i for i, line in enumerate(lines) if line.startswith(section)), None)
        if first is None:
            sys.exit(f"no line of the output starts with {section!r}:\n{text}")
        last = next((i for i in range(first, len(lines)) if not lines[i]), len(lines))
        more = ["..."] if any(lines[last:]) else []
        lines = ["...", *lines[first:last], *more]
    for line in lines:
        yield from textwrap.wrap(line, _LONGEST_LINE) if len(line) > _LONGEST_LINE else [line]


def _run(words: list[str], folder: Path, **environment: str) -> str:
    """A command's output, both streams together."""
    done = subprocess.run(
        [sys.executable, "-m", "gradrun", *words],
        cwd=folder,
        env=_environment() | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.stdout


def _environment() -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in {"NO_COLOR", "GRADRUN_TRUST_CODE"}}
    return kept | {"PYTHONPATH": str(ROOT), "COLUMNS": str(_WIDTH), "HF_HUB_OFFLINE": "1"}


# Rich's own template loads a font from a CDN; the text is placed letter by letter in any font.
_SVG = """\
<svg class="rich-terminal" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
    <style>
    .{unique_id}-matrix {{
        font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
        font-size: {char_height}px;
        line-height: {line_height}px;
        font-variant-east-asian: full-width;
    }}
    .{unique_id}-title {{
        font-size: 18px;
        font-weight: bold;
        font-family: system-ui, sans-serif;
    }}
    {styles}
    </style>
    <defs>
    <clipPath id="{unique_id}-clip-terminal">
      <rect x="0" y="0" width="{terminal_width}" height="{terminal_height}" />
    </clipPath>
    {lines}
    </defs>
    {chrome}
    <g transform="translate({terminal_x}, {terminal_y})"
       clip-path="url(#{unique_id}-clip-terminal)">
    {backgrounds}
    <g class="{unique_id}-matrix">
    {matrix}
    </g>
    </g>
</svg>
"""


def _picture() -> str:
    """The terminal after a real run, as SVG."""
    from rich.console import Console
    from rich.text import Text

    print(_PICTURE_COMMAND, "(picture)", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _examples(folder, "")
        for _ in range(_ATTEMPTS):
            shown = subprocess.run(
                [sys.executable, "-m", *shlex.split(_PICTURE_COMMAND), "--overwrite"],
                cwd=folder,
                env=_environment() | {"FORCE_COLOR": "1", "TERM": "xterm-256color"},
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                check=True,
            ).stdout
            if "!" not in shown:  # no warning of a busy machine
                break
        else:
            sys.exit("the machine is busy: the picture was not recorded, try again later")
    console = Console(record=True, width=_WIDTH, file=open(os.devnull, "w"))  # noqa: SIM115, PTH123
    console.print(Text.assemble(("$ ", "bold green"), _PICTURE_COMMAND))
    console.print(Text.from_ansi(shown.rstrip("\n") + "\n"))
    svg = console.export_svg(title="gradrun", code_format=_SVG, unique_id="gradrun")
    return "\n".join(line.rstrip() for line in svg.splitlines()) + "\n"


if __name__ == "__main__":
    main()
