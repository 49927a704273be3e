"""MkDocs hooks that generate pages from the program at every build.

Generated pages: the configuration reference (from the JSON Schema), the command reference (from the
Typer commands), the index of decision records, and copies of CONTRIBUTING.md and CHANGELOG.md.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # document this checkout, not an installed gradrun

from tools.docs_cli import cli_page  # noqa: E402
from tools.docs_config import config_page  # noqa: E402

_REPOSITORY = "https://github.com/gradrun/gradrun/blob/main"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """List every decision record in the navigation."""
    records = [{title: f"adr/{path.name}"} for path, title in _records()]
    _fill(config.nav, "Decisions", [{"Overview": "adr/index.md"}, *records])
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    pages = {
        "reference/configuration.md": config_page(),
        "reference/cli.md": cli_page(),
        "contributing.md": included("CONTRIBUTING.md"),
        "changelog.md": included("CHANGELOG.md"),
        "adr/index.md": _records_page(),
    }
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    return files


def included(name: str) -> str:
    """A Markdown file of the repository's root, with its links rewritten for the site."""

    def rewrite(match: re.Match[str]) -> str:
        label, target = match[1], match[2]
        if re.match(r"[a-z]+:|#", target):
            return match[0]
        if target.startswith("docs/"):
            page = target.removeprefix("docs/")
            return f"[{label}]({page}{'index.md' if page.endswith('/') else ''})"
        return f"[{label}]({_REPOSITORY}/{target})"

    text = (ROOT / name).read_text(encoding="utf-8")
    return re.sub(r"\[([^\]]*)\]\(([^)\s]+)\)", rewrite, text)


def _records() -> Iterator[tuple[Path, str]]:
    for path in sorted((ROOT / "docs" / "adr").glob("[0-9]*.md")):
        heading = path.read_text(encoding="utf-8").partition("\n")[0]
        number = path.name.partition("-")[0]
        title = heading.lstrip("# ").removeprefix(number).lstrip(".: ")
        yield path, f"{number} {title}"


def _records_page() -> str:
    lines = [
        "# Decisions",
        "",
        "An architecture decision record (ADR) describes one decision: its context, the decision "
        "and its consequences. Add a record when you depart from [the architecture]"
        "(../architecture.md) or choose between designs that a later reader will ask about.",
        "",
        *(f"- [{title}]({path.name})" for path, title in _records()),
    ]
    return "\n".join(lines) + "\n"


def _fill(nav: Any, title: str, entries: list[dict[str, str]]) -> None:
    """Replace the empty navigation section called `title`."""
    for entry in nav:
        for key, value in entry.items():
            if key == title:
                entry[key] = json.loads(json.dumps(entries))
            elif isinstance(value, list):
                _fill(value, title, entries)
