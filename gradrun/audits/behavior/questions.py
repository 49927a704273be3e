"""The questions of `gradrun modes`, read from questions.yaml."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from gradrun.core.grad_mode import GradMode


@dataclass(frozen=True)
class Question:
    """A question that running its code answers, in each mode or once."""

    topic: str
    text: str
    code: str
    expected: tuple[str, ...] | str
    """The answers in grad, no_grad and inference_mode; one text if the mode does not matter."""
    why: str
    error: str | None = None
    """Part of the message of an error whose type name is the answer; None if no error is one."""

    def cells(self) -> Iterator[tuple[GradMode | None, str]]:
        """Yield each mode with its expected answer; mode None if the mode does not matter."""
        if isinstance(self.expected, str):
            yield None, self.expected
        else:
            yield from zip(GradMode, self.expected, strict=True)


def _load() -> Iterator[Question]:
    topics = yaml.safe_load(Path(__file__).with_name("questions.yaml").read_text("utf-8"))
    for topic in topics:
        for row in topic["questions"]:
            expected = _expected(row)
            yield Question(
                topic=topic["topic"],
                text=row["question"],
                code=f"{topic.get('setup', '')}\n{row['code']}",
                expected=expected if isinstance(expected, str) else tuple(expected),
                why=row["why"].strip(),
                error=row.get("error"),
            )


def _expected(row: dict[str, Any]) -> list[str] | str:
    if torch.__version__ < "2.14" and "expected_before_2_14" in row:
        return row["expected_before_2_14"]  # type: ignore[no-any-return]
    return row["expected"]  # type: ignore[no-any-return]


QUESTIONS = tuple(_load())
"""In the order of the report."""
