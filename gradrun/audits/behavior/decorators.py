"""What a mode covers as a decorator: torch's own, and beside them gradrun's guards.

Knows kinds of functions and what the thread is in while they run; no tensor.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import torch

from gradrun.audits.behavior.probe import (
    BLOCKS,
    Ask,
    Probe,
    current_mode,
    enter_other_mode,
    in_all_modes,
    outcome,
    yes,
)
from gradrun.core.grad_mode import GradMode
from gradrun.modes import grad_mode

Decorator = Callable[[Any], Any]
Run = Callable[[Decorator], str]
"""Decorates something, runs it, and says which mode its body was in."""

# --- kinds of functions ------------------------------------------------------------------------


def _generated() -> Iterator[str]:
    while True:
        yield current_mode()


async def _awaited() -> str:
    await asyncio.sleep(0)
    return current_mode()


async def _generated_async() -> AsyncIterator[str]:
    while True:
        await asyncio.sleep(0)
        yield current_mode()


class _Model:
    def __init__(self) -> None:
        self.made_in = current_mode()

    def method(self) -> str:
        return current_mode()


def _function(decorate: Decorator) -> str:
    seen: str = decorate(current_mode)()
    return seen


def _generator(decorate: Decorator) -> str:
    """At its second step: the first resume is what a decorator may miss."""
    steps: Iterator[str] = decorate(_generated)()
    next(steps)
    return next(steps)


def _between_steps(decorate: Decorator) -> str:
    steps: Iterator[str] = decorate(_generated)()
    next(steps)
    return current_mode()


def _coroutine(decorate: Decorator) -> str:
    seen: str = asyncio.run(decorate(_awaited)())
    return seen


def _async_generator(decorate: Decorator) -> str:
    async def second() -> str:
        steps: AsyncIterator[str] = decorate(_generated_async)()
        await anext(steps)
        return await anext(steps)

    return asyncio.run(second())


def _returned_generator(decorate: Decorator) -> str:
    steps: Iterator[str] = decorate(lambda: _generated())()
    return next(steps)


def _constructor(decorate: Decorator) -> str:
    made_in: str = decorate(_Model)().made_in
    return made_in


def _method(decorate: Decorator) -> str:
    seen: str = decorate(_Model)().method()
    return seen


# --- the questions -----------------------------------------------------------------------------


def _torch_covers(run: Run) -> Ask:
    return _covers(run, lambda mode: BLOCKS[mode]())


def _guard_covers(run: Run) -> Ask:
    return _covers(run, grad_mode)


def _covers(run: Run, decorator: Callable[[GradMode], Decorator]) -> Ask:
    def ask(mode: GradMode, device: torch.device) -> str:
        enter_other_mode(mode)
        return yes(run(decorator(mode)) == mode)

    return ask


def _torch_takes_a_number(mode: GradMode, device: torch.device) -> str:
    def call() -> str:
        BLOCKS[mode](3)
        return "no error"

    return outcome(call, "")


def _guard_refuses(given: Any) -> Ask:
    def ask(mode: GradMode, device: torch.device) -> str:
        return outcome(lambda: grad_mode(mode)(given), "decorates functions and methods")

    return ask


TORCH = (
    Probe(
        "a function",
        in_all_modes("yes"),
        _torch_covers(_function),
        "The plain case, and the one that the decorators are for.",
    ),
    Probe(
        "a generator function's steps",
        in_all_modes("yes"),
        _torch_covers(_generator),
        "torch enters the mode anew whenever the generator is resumed.",
    ),
    Probe(
        "its caller, between two steps",
        in_all_modes("no"),
        _torch_covers(_between_steps),
        "The mode is left at each yield, so the caller keeps its own.",
    ),
    Probe(
        "an async def function",
        in_all_modes("no"),
        _torch_covers(_coroutine),
        "Calling it only makes the coroutine, and the mode ends before the body begins: an async "
        "endpoint under @torch.no_grad() records its whole graph. gradrun's guards cover it.",
    ),
    Probe(
        "an async generator",
        in_all_modes("no"),
        _torch_covers(_async_generator),
        "Calling it only makes the generator, and the mode ends before the body begins.",
    ),
    Probe(
        "a function returning a generator",
        in_all_modes("no"),
        _torch_covers(_returned_generator),
        "The body runs after the function has returned, outside the mode; decorate the generator "
        "function itself.",
    ),
    Probe(
        "a class: its __init__",
        in_all_modes("yes"),
        _torch_covers(_constructor),
        "A class is called like a function, so what runs in the mode is the construction.",
    ),
    Probe(
        "a class: its methods",
        in_all_modes("no"),
        _torch_covers(_method),
        "Only the construction runs in the mode, and the class becomes a function that cannot be "
        "subclassed; decorate the methods.",
    ),
    Probe(
        "3, given by mistake",
        in_all_modes("no error"),
        _torch_takes_a_number,
        "torch takes what it is given for a function and returns a wrapper: no_grad(flag) never "
        "turns anything off or on, and says nothing.",
    ),
)

GUARD = (
    Probe(
        "a function",
        in_all_modes("yes"),
        _guard_covers(_function),
        "The plain case, as with torch's.",
    ),
    Probe(
        "a generator function's steps",
        in_all_modes("yes"),
        _guard_covers(_generator),
        "The mode is entered anew whenever the generator is resumed.",
    ),
    Probe(
        "its caller, between two steps",
        in_all_modes("no"),
        _guard_covers(_between_steps),
        "The mode is left at each yield, so the caller keeps its own.",
    ),
    Probe(
        "an async def function",
        in_all_modes("yes"),
        _guard_covers(_coroutine),
        "The mode is left at each await and entered again after it, so no other task sees it.",
    ),
    Probe(
        "an async generator",
        in_all_modes("yes"),
        _guard_covers(_async_generator),
        "The mode is left at each await and each yield and entered again after it.",
    ),
    Probe(
        "a function returning a generator",
        in_all_modes("no"),
        _guard_covers(_returned_generator),
        "The body runs after the function has returned; decorate the generator function itself.",
    ),
    Probe(
        "a class",
        in_all_modes("TypeError"),
        _guard_refuses(_Model),
        "Covering the construction alone is seldom meant: it is refused, decorate the methods.",
    ),
    Probe(
        "3, given by mistake",
        in_all_modes("TypeError"),
        _guard_refuses(3),
        "A guard that would silently do nothing is a bug that nobody sees.",
    ),
)
