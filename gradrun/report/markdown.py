"""Results as Markdown for a pull request's comment: the verdict first, the machine folded away.

Knows GitHub's Markdown. What comes from files and users is text in it: no link, mention or tag.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from gradrun.report import wording
from gradrun.report.escaping import escape_control_chars
from gradrun.report.side_by_side import Outputs, side_by_side
from gradrun.report.tables import Table, tables
from gradrun.results.result import AnyResult

_LOUD = {"fail", "inconclusive", "slower", "cannot run"}
_SPECIAL = re.compile(r"[\\`*\[\]<>&|~#$!]|(?<![^\W_])_|_(?![^\W_])|(?<=://)|(?<=[wW]{3})(?=\.)")


def text(results: Sequence[Outputs]) -> str:
    """One section a result; of several, a column each comes first, and the sections are folded."""
    parts: list[str] = []
    if len(results) > 1:
        parts += ["### Side by side", *map(_table, side_by_side(results))]
    for name, result in results:
        figures = _figures(result)
        title = ", ".join(_escaped(word) for word in (wording.model_name(result), name) if word)
        parts += [
            f"### {title}",
            f"**{_escaped(wording.verdict(result))}**",
            *([_folded("Figures", figures)] if len(results) > 1 else figures),
            _folded("Machine", [_machine(result)]),
        ]
    return "\n\n".join(filter(None, parts)) + "\n"


def refusal(said: str) -> str:
    """Why a check could not begin, as it stands; indented lines have no markup."""
    return "".join(f"    {line}\n" for line in escape_control_chars(said).splitlines()) + "\n"


def _figures(result: AnyResult) -> list[str]:
    about = ", ".join(filter(None, (wording.mode(result), wording.facts(result))))
    findings = [
        f"- **{severity}** {_escaped(': '.join(filter(None, (where, said))))}"
        for severity, where, said in wording.findings(result)
    ]
    notices = [f"- {_escaped(notice)}" for notice in wording.notices(result)]
    return [_escaped(about), *map(_table, tables(result)), "\n".join(findings), "\n".join(notices)]


def _machine(result: AnyResult) -> str:
    return _escaped("; ".join(f"{key} {value}" for key, value in wording.environment(result)))


def _folded(title: str, parts: list[str]) -> str:
    inside = "\n\n".join(filter(None, parts))
    return f"<details><summary>{title}</summary>\n\n{inside}\n\n</details>"


def _table(told: Table) -> str:
    figures = len(told.columns) - told.words
    heads = [told.title, *told.columns]
    lines = [
        _line([_escaped(head) for head in heads]),
        _line([":--", *["--:"] * figures, *[":--"] * told.words]),
        *(_line([_cell(cell) for cell in row]) for row in told.rows),
    ]
    note = f"\n\n{_escaped(told.note)}" if told.note else ""
    return "\n".join(lines) + note


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(cell: str) -> str:
    escaped = _escaped(cell)
    return f"**{escaped}**" if cell in _LOUD else escaped


def _escaped(said: str) -> str:
    """Text that no renderer takes for anything else, on one line."""
    line = " ".join(escape_control_chars(said).split())
    quiet = _SPECIAL.sub(lambda found: f"\\{found[0]}" if found[0] else "<!-- -->", line)
    # A mention would call people; a backslash does not stop it.
    return quiet.replace("@", "@<!-- -->")
