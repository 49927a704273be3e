"""Reports as GitHub Markdown, for comments on pull requests.

Text from files and users cannot become a link, a mention or a tag.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from gradrun.report.document import Document, describe
from gradrun.report.escaping import escape_control_chars
from gradrun.report.side_by_side import Named, side_by_side
from gradrun.report.tables import Cell, Status, Table

_SPECIAL = re.compile(r"[\\`*\[\]<>&|~#$!]|(?<![^\W_])_|_(?![^\W_])|(?<=://)|(?<=[wW]{3})(?=\.)")


def render(results: Sequence[Named]) -> str:
    """Write one section per result; several are preceded by a table with a column each."""
    parts: list[str] = []
    if len(results) > 1:
        parts += ["### Side by side", *map(_table, side_by_side(results))]
    for name, result in results:
        document = describe(result)
        content = _content(document)
        machine = "; ".join(f"{key} {value}" for key, value in document.machine)
        parts += [
            f"### {', '.join(_escape(word) for word in (document.title, name) if word)}",
            f"**{_escape(document.verdict)}**",
            _folded("Figures", content) if len(results) > 1 else content,
            _folded("Machine", _escape(machine)),
        ]
    return _join(parts) + "\n"


def render_error(message: str) -> str:
    """Write a message verbatim, as an indented code block."""
    return "".join(f"    {line}\n" for line in escape_control_chars(message).splitlines()) + "\n"


def _content(document: Document) -> str:
    findings = []
    for note in document.findings:
        text = _escape(": ".join(filter(None, (note.location, note.text))))
        findings.append(f"- **{note.label}** {text}" if note.label else f"- {text}")
    notes = [f"- {_escape(note.text)}" for note in document.notes]
    parts = [
        _escape(document.subject),
        *map(_table, document.leading_tables),
        "\n".join(findings),
        "\n".join(notes),
        *map(_table, document.other_tables),
    ]
    return _join(parts)


def _join(parts: Iterable[str]) -> str:
    return "\n\n".join(filter(None, parts))


def _folded(title: str, content: str) -> str:
    return f"<details><summary>{title}</summary>\n\n{content}\n\n</details>"


def _table(table: Table) -> str:
    alignment = ["--:" if column.kind == "figure" else ":--" for column in table.columns]
    lines = [
        _row([table.title, *(column.title for column in table.columns)]),
        f"| {' | '.join([':--', *alignment])} |",
        *map(_row, table.rows),
    ]
    return _join(["\n".join(lines), _escape(table.note)])


def _row(cells: Sequence[Cell]) -> str:
    return f"| {' | '.join(map(_cell, cells))} |"


def _cell(cell: Cell) -> str:
    text = _escape(str(cell))
    return f"**{text}**" if isinstance(cell, Status) and cell.tone in ("bad", "unsure") else text


def _escape(text: str) -> str:
    """Escape all markup, and join the lines."""
    line = " ".join(escape_control_chars(text).split())
    escaped = _SPECIAL.sub(lambda match: f"\\{match[0]}" if match[0] else "<!-- -->", line)
    # A backslash does not prevent a mention.
    return escaped.replace("@", "@<!-- -->")
