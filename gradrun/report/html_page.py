"""Reports as one self-contained HTML page.

Text from files and users is escaped, and the page's security policy forbids loading anything.
"""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Iterable, Sequence
from pathlib import Path

from gradrun.report import profile_plots, tune_plots
from gradrun.report.document import Document, describe
from gradrun.report.escaping import escape_html as _text
from gradrun.report.plots import Plot, plots
from gradrun.report.side_by_side import Named, side_by_side
from gradrun.report.tables import Cell, Column, Picture, Share, Status, Table
from gradrun.report.wording import Note
from gradrun.results.result import AnyResult, ProfileResult, TuneResult

_STYLE = Path(__file__).with_name("html_page.css")
_UNIT = re.compile(r"(?<=\d) (?=[nµm]?s\b|[KMGT]?i?B\b)")
"""The space before a unit, where a line must not break."""

_JPEG = b"\xff\xd8\xff"
"""First bytes of a JPEG file."""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
{body}
</body>
</html>
"""


def render(results: Sequence[Named]) -> str:
    """Write one page; several results are preceded by a table with a column each.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    documents = [describe(result) for _, result in results]
    parts = []
    if len(results) > 1:
        tables = "\n".join(map(_table, side_by_side(results)))
        heading = '<p class="over">gradrun</p><h1>Side by side</h1>'
        parts.append(f'<div class="beside">{heading}\n{tables}</div>')
    for i, (document, (name, result)) in enumerate(zip(documents, results, strict=True)):
        parts.append(_article(document, name, result, prefix=f"{i}-"))
    return _PAGE.format(
        title=_text(f"{', '.join(dict.fromkeys(d.title for d in documents))}: gradrun"),
        style=_STYLE.read_text(encoding="utf-8"),
        body="\n".join(parts),
    )


def _article(document: Document, name: str, result: AnyResult, prefix: str) -> str:
    drawn = "\n".join(map(_figure, _plots(result, prefix)))
    figures = f'<div class="plots">\n{drawn}\n</div>' if drawn else ""
    text = _UNIT.sub("&nbsp;", _text(document.verdict))
    verdict = f"<p{_class('verdict', document.tone)}>{text}</p>"
    notes = _list("", document.notes)
    # The notes of a check explain its verdict; others are warnings that limit all that follows.
    opening = (verdict, notes) if document.kind == "check" else (notes, verdict)
    machine = "\n".join(
        f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in document.machine
    )
    parts = [
        f'<p class="over">gradrun {document.kind} · {_text(name)}</p>',
        f"<h1>{_text(document.title)}</h1>",
        f'<p class="facts">{_text(document.subject)}</p>',
        *opening,
        _list("Findings", document.findings),
        *map(_table, document.leading_tables),
        figures,
        *map(_table, document.other_tables),
        f"<section><h2>Machine</h2><dl>\n{machine}\n</dl></section>",
    ]
    return "<article>\n" + "\n".join(filter(None, parts)) + "\n</article>"


def _plots(result: AnyResult, prefix: str) -> list[Plot]:
    if isinstance(result, ProfileResult):
        return profile_plots.plots(result, prefix)
    drawn = plots(result, prefix)
    return tune_plots.plots(result, prefix) + drawn if isinstance(result, TuneResult) else drawn


def _figure(plot: Plot) -> str:
    key = "".join(
        f'<li><i style="background: var(--series-{number})"></i><b>{_text(name)}</b> '
        f"{_text(text)}</li>"
        for number, name, text in plot.key
    )
    parts = (
        f"<h2>{_text(plot.title)}</h2>",
        plot.svg.replace("<svg", f'<svg role="img" aria-label="{_text(plot.title)}"', 1),
        f'<ul class="key">{key}</ul>' if key else "",
        f'<figcaption class="note">{_text(plot.note)}</figcaption>' if plot.note else "",
    )
    return f"<figure>{''.join(parts)}</figure>"


def _table(table: Table) -> str:
    heads = "".join(f"<th{_class(_words(c))}>{_text(c.title)}</th>" for c in table.columns)
    rows = "\n".join(
        f"<tr><th>{_content(name)}</th>{''.join(map(_cell, table.columns, cells))}</tr>"
        for name, *cells in table.rows
    )
    note = f'<p class="note">{_text(table.note)}</p>' if table.note else ""
    # On a phone, a row of many columns becomes a list.
    examples = any(isinstance(name, Picture) for name, *_ in table.rows)
    wide = "wide" if len(table.columns) > 2 or examples else ""
    head = f"<thead><tr><th>{_text(table.title)}</th>{heads}</tr></thead>"
    return (
        f'<section><div class="scrolls" tabindex="0"><table{_class(wide)}>\n{head}\n'
        f"<tbody>\n{rows}\n</tbody></table></div>{note}</section>"
    )


def _cell(column: Column, cell: Cell) -> str:
    tone = cell.tone if isinstance(cell, Status) else ""
    title = f' data-title="{_text(column.title)}"' if column.title else ""
    return f"<td{_class(_words(column), tone)}{title}>{_content(cell)}</td>"


def _content(cell: Cell) -> str:
    match cell:
        case Share(_, length):
            return f'{_text(cell)}<i class="bar"><b style="width: {length:.0%}"></b></i>'
        case Picture(name, jpeg) if jpeg.startswith(_JPEG):
            data = b64encode(jpeg).decode()
            return f'<img src="data:image/jpeg;base64,{data}" alt="">{_text(name)}'
        case _:
            return _text(cell)


def _words(column: Column) -> str:
    return "" if column.kind == "figure" else "words"


def _list(title: str, notes: Iterable[Note]) -> str:
    items = "\n".join(map(_item, notes))
    heading = f"<h2>{title}</h2>" if title else ""
    kind = "" if title else "notes"
    if not items:
        return ""
    return f'<section{_class(kind)}>{heading}<ul class="list">\n{items}\n</ul></section>'


def _item(note: Note) -> str:
    label = f"<b{_class(note.tone)}>{_text(note.label)}</b> " if note.label else ""
    location = f'<span class="from">{_text(note.location)}</span>' if note.location else ""
    return f"<li>{label}{_text(note.text)}{location}</li>"


def _class(*names: str) -> str:
    used = " ".join(filter(None, names))
    return f' class="{used}"' if used else ""
