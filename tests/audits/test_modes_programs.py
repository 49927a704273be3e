"""Random programs of nested modes observe the same modes as a reference model of two flags.

A program is a tree of statements. One interpreter runs it twice, with the real guards and with a
reference model without torch, and every observation must be equal.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from itertools import cycle
from typing import Any, NamedTuple

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gradrun import modes
from gradrun.modes import assert_restored, grad_mode

EXAMPLES = int(os.environ.get("GRADRUN_EXAMPLES", "80"))


class State(NamedTuple):
    grad: bool
    inference: bool


class Boom(Exception):
    """What programs raise."""


# --- programs ----------------------------------------------------------------------------------

GRAD, NO_GRAD, INFERENCE = {"grad": True}, {"grad": False}, {"grad": False, "inference": True}
SETS = {
    "conditional_no_grad(condition)": NO_GRAD,
    "conditional_inference_mode(condition)": INFERENCE,
    "grad_mode('grad')": GRAD,
    "grad_mode('no_grad')": NO_GRAD,
    "grad_mode('inference_mode')": INFERENCE,
    "torch.no_grad()": NO_GRAD,
    "torch.enable_grad()": GRAD,
    "torch.set_grad_enabled(False)": NO_GRAD,
    "torch.set_grad_enabled(True)": GRAD,
    "torch.inference_mode()": INFERENCE,
    "torch.inference_mode(False)": {"grad": True, "inference": False},
}
"""The flags that each guard sets, where its condition holds."""

Guard = tuple[str, bool | str]
"""(how it is made, its condition); one that is "asked" answers from the program's list."""
SHARED = ("shared", True)  # the program's one instance for many places
OURS = [
    (made, condition)
    for made in SETS
    for condition in (True, False, "asked")
    if not made.startswith("torch") and (condition is True or "(condition)" in made)
]
TORCHS = [(made, True) for made in SETS if made.startswith("torch")]
Program = list[tuple[Any, ...]]

fresh = st.sampled_from(OURS)
ours = st.just(SHARED) | fresh
guards = ours | st.sampled_from(TORCHS)
leaves = st.sampled_from([("pause",), ("pause",), ("raise",), ("set", True), ("set", False)])
callers = st.lists(guards, min_size=1, max_size=4)


def nested(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    bodies = st.lists(inner, min_size=1, max_size=4)
    ending = bodies.map(lambda body: [("caught", [*body, ("pause",)])])  # looks where it is closed
    return (
        st.tuples(st.just("block"), guards, bodies)
        | st.tuples(st.just("caught"), bodies)
        | st.tuples(st.just("call"), ours, bodies)
        | st.tuples(st.just("generator"), ours, ending, callers, bodies)
    )


bodies = st.lists(st.recursive(leaves, nested, max_leaves=12), min_size=2, max_size=6)
programs = bodies.map(lambda body: [("caught", body)])
worlds = st.tuples(fresh, st.lists(st.booleans(), min_size=1, max_size=5))
"""(The shared guard, what the condition answers in turn)."""
outsides = st.builds(State, st.booleans(), st.booleans())


def run(world: Real | Model, program: Program) -> Iterator[None]:
    """Run a program, looking around at every statement; it is suspended where it pauses."""
    world.look()
    for statement in program:
        match statement:
            case ("pause",):
                yield
            case ("raise",):
                raise Boom
            case "set", flag:
                world.set(flag)
            case "block", guard, body:
                with world.block(guard):
                    yield from run(world, body)
            case "caught", body:
                try:
                    yield from run(world, body)
                except Boom:
                    pass
                finally:  # also where a generator is closed
                    world.look()
            case "call", guard, body:
                world.call(guard, body)
            case "generator", guard, body, callers, between:
                with closing(world.generator(guard, body)) as steps:
                    for caller in callers:
                        with world.block(caller):
                            ended = next(steps, "ended")
                        yield from run(world, between)
                        if ended:
                            break
        world.look()


# --- the two worlds ----------------------------------------------------------------------------


class Real:
    """The guards as they are, on this thread."""

    def __init__(self, shared: Guard, answers: list[bool]) -> None:
        self._answers, self._shared = cycle(answers), self.block(shared)
        self.seen: list[Any] = []

    def look(self) -> None:
        records = (torch.ones(1, requires_grad=True) * 2).requires_grad
        self.seen.append((*state(), records))

    def set(self, flag: bool) -> None:
        torch.set_grad_enabled(flag)

    def block(self, guard: Guard) -> Any:
        made, condition = guard
        names = {"condition": self._ask if condition == "asked" else condition}
        return self._shared if guard == SHARED else eval(made, vars(modes), names)

    def _ask(self) -> bool:
        self.seen.append("asked")
        return next(self._answers)

    def call(self, guard: Guard, body: Program) -> None:
        covered = self.block(guard)(lambda: list(run(self, body)))
        self.look()  # and nothing was asked yet
        covered()

    def generator(self, guard: Guard, body: Program) -> Any:
        @self.block(guard)
        def covered() -> Iterator[None]:
            yield from run(self, body)

        self.look()
        return covered()


def state() -> State:
    return State(torch.is_grad_enabled(), torch.is_inference_mode_enabled())


class Model:
    """What should come of it, in pure Python."""

    def __init__(self, shared: Guard, answers: list[bool], now: State) -> None:
        self._answers, self._shared, self.now = cycle(answers), shared, now
        self.seen: list[Any] = []

    def look(self) -> None:
        self.seen.append((*self.now, self.now.grad and not self.now.inference))

    def set(self, flag: bool) -> None:
        self.now = self.now._replace(grad=flag)

    def decided(self, guard: Guard) -> dict[str, bool]:
        """Return the flags that a guard sets after its condition is evaluated."""
        made, holds = self._shared if guard == SHARED else guard
        if holds == "asked":
            self.seen.append("asked")
            holds = next(self._answers)
        return SETS[made] if holds else {}

    @contextmanager
    def block(self, guard: Guard) -> Iterator[None]:
        sets, before = self.decided(guard), self.now
        self.now = before._replace(**sets)
        try:
            yield
        finally:
            self.now = before if "inference" in sets else self.now._replace(grad=before.grad)

    def call(self, guard: Guard, body: Program) -> None:
        self.look()
        with self.block(guard):
            list(run(self, body))

    def generator(self, guard: Guard, body: Program) -> Any:
        self.look()
        return self.resumed(guard, run(self, body))

    def resumed(self, guard: Guard, body: Any) -> Iterator[None]:
        """Run each step of a body in the mode of its guard, or in the mode it opened itself."""
        sets, given, own = self.decided(guard), self.now, None

        def resume(step: Callable[[], Any]) -> Any:
            nonlocal given, own
            outside = self.now
            given = given if own else outside._replace(**sets)
            self.now = own or given
            try:
                return step()
            finally:
                own = None if self.now == given else self.now
                self.now = outside

        try:
            while not resume(lambda: next(body, "ended")):
                yield
        finally:
            resume(body.close)


# --- they agree --------------------------------------------------------------------------------


def entered(outside: State) -> ExitStack:
    """A thread in that state, which must be in it again at the end."""
    stack = ExitStack()
    stack.enter_context(torch.inference_mode(outside.inference))
    stack.enter_context(torch.set_grad_enabled(outside.grad))
    stack.enter_context(assert_restored())
    return stack


repeatable = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="GRADRUN_EXAMPLES" not in os.environ,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@settings(repeatable, max_examples=2 * EXAMPLES)
@given(programs, guards, worlds, outsides)
def test_a_random_program_matches_the_reference_and_restores_the_mode(
    program: Program, around: Guard, world: tuple[Guard, list[bool]], outside: State
) -> None:
    real, model = Real(*world), Model(*world, outside)
    with entered(outside):
        list(run(real, [("block", around, program)]))
    list(run(model, [("block", around, program)]))
    assert real.seen == model.seen


@repeatable
@given(st.lists(st.tuples(st.booleans(), ours, programs, worlds), min_size=2, max_size=3), outsides)
def test_concurrent_tasks_match_the_reference_independently(
    tasks: list[Any], outside: State
) -> None:
    reals = [Real(*world) for *_, world in tasks]
    models = [Model(*world, outside) for *_, world in tasks]
    others = set()

    async def work(real: Real, is_generator: bool, guard: Guard, program: Program) -> None:
        async def coroutine() -> None:
            for _ in run(real, program):
                await asyncio.sleep(0)

        async def generator() -> AsyncIterator[None]:
            for _ in run(real, program):
                await asyncio.sleep(0)
                yield

        if not is_generator:
            await real.block(guard)(coroutine)()
            return
        async for _ in real.block(guard)(generator)():
            others.add(state())

    async def main() -> None:
        works = [(real, *task[:3]) for real, task in zip(reals, tasks, strict=True)]
        working = asyncio.gather(*(work(*of) for of in works))
        while not working.done():
            others.add(state())
            await asyncio.sleep(0)
        await working

    with entered(outside):
        asyncio.run(main())
    for model, (_, guard, program, _) in zip(models, tasks, strict=True):
        list(model.resumed(guard, run(model, program)))
    assert [real.seen for real in reals] == [model.seen for model in models]
    assert others == {outside}


def test_an_instance_can_be_used_while_it_is_active_in_a_paused_generator() -> None:
    shared = grad_mode("no_grad")

    @grad_mode("no_grad")
    def body() -> Iterator[None]:
        with shared:
            yield

    with entered(State(True, False)), closing(body()) as steps:
        with shared:
            next(steps)
        assert state() == (True, False)
