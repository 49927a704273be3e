"""The table of `gradrun modes`: questions about gradient modes, answered by running them."""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor

import torch

from gradrun.audits.behavior import questions
from gradrun.audits.behavior.snippet import Unavailable, run_snippet
from gradrun.core.errors import first_line
from gradrun.core.grad_mode import GradMode
from gradrun.results.result import Fact


def measure_facts(device: torch.device) -> tuple[Fact, ...]:
    """Answer every question now, on `device`; the calling thread's mode does not change."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some of the functions shown are deprecated
        return tuple(
            _answer(question, mode, expected, device)
            for question in questions.QUESTIONS
            for mode, expected in question.cells()
        )


def _answer(
    question: questions.Question, mode: GradMode | None, expected: str, device: torch.device
) -> Fact:
    observed, unavailable = None, ""
    # A new thread starts in grad mode, and a mode that the snippet leaks ends with the thread.
    with ThreadPoolExecutor(1) as thread:
        try:
            answer = thread.submit(
                run_snippet, question.code, mode or GradMode.GRAD, device, question.error
            )
            observed = answer.result()
        except Unavailable as reason:
            unavailable = str(reason)
        except Exception as error:  # an unexpected error is an observation too
            observed = f"raises {type(error).__name__}: {first_line(error)}"
    return Fact(
        topic=question.topic,
        question=question.text,
        mode=mode,
        expected=expected,
        observed=observed,
        why=question.why,
        unavailable=unavailable,
    )
