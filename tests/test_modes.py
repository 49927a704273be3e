"""Gradient modes and guards, checked by torch's own flags."""

from __future__ import annotations

import asyncio
import functools
import inspect
import pickle
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

import gradrun
from gradrun import modes
from gradrun.core.grad_mode import GradMode
from gradrun.modes import (
    ModeGuard,
    assert_restored,
    conditional_inference_mode,
    conditional_no_grad,
    grad_mode,
    observe,
)
from tests.support.torch_version import needs_torch_2_13

State = tuple[bool, bool]
"""(is_grad_enabled, is_inference_mode_enabled)."""

GRAD, NO_GRAD, INFERENCE, BOTH = (True, False), (False, False), (False, True), (True, True)
INSIDE = {
    GradMode.GRAD: GRAD,
    GradMode.NO_GRAD: NO_GRAD,
    GradMode.INFERENCE_MODE: INFERENCE,
}


def state() -> State:
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled()


@pytest.fixture(autouse=True)
def restored_thread() -> Iterator[None]:
    """Check that each test restores its thread's mode."""
    with assert_restored():
        yield


# --- torch's modes -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "no_grad",
        "enable_grad",
        "set_grad_enabled",
        "inference_mode",
        "is_grad_enabled",
        "is_inference_mode_enabled",
    ],
)
def test_reexported_modes_are_torchs_own_objects(name: str) -> None:
    assert getattr(gradrun.modes, name) is getattr(torch, name)
    assert name in modes.__all__


def test_importing_modes_imports_only_torch() -> None:
    """Nothing but torch, the standard library and three small modules is imported."""
    code = (
        "import sys, torch; before = set(sys.modules); import gradrun.modes; "
        "print(*sorted(set(sys.modules) - before))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
    )
    assert set(done.stdout.split()) <= {
        "gradrun",
        "gradrun.core",
        "gradrun.core.grad_mode",
        "gradrun.core.version",
        "gradrun.modes",
    }


# --- grad_mode ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", GradMode)
@pytest.mark.parametrize("outside", [torch.enable_grad, torch.no_grad])
def test_a_mode_applies_inside_its_block_only(mode: GradMode, outside: type) -> None:
    with outside():
        before = state()
        with grad_mode(mode):
            assert state() == INSIDE[mode]
        assert state() == before


@pytest.mark.parametrize("mode", GradMode)
def test_a_mode_ends_when_the_block_raises(mode: GradMode) -> None:
    with pytest.raises(KeyError), grad_mode(mode):
        raise KeyError
    assert state() == GRAD


@pytest.mark.parametrize("outer", GradMode)
@pytest.mark.parametrize("inner", GradMode)
def test_modes_nest(outer: GradMode, inner: GradMode) -> None:
    with grad_mode(outer):
        with grad_mode(inner):
            assert state()[0] is INSIDE[inner][0]
        assert state() == INSIDE[outer]
    assert state() == GRAD


@pytest.mark.parametrize("mode", GradMode)
def test_grad_mode_returns_a_new_guard(mode: GradMode) -> None:
    assert grad_mode(mode) is not grad_mode(mode)


@pytest.mark.parametrize("mode", GradMode)
def test_tensors_created_inside_have_the_mode(mode: GradMode) -> None:
    weight = torch.ones(1, requires_grad=True)
    with grad_mode(mode):
        made = weight * 2
    assert made.requires_grad is (mode is GradMode.GRAD)
    assert (made.grad_fn is not None) is (mode is GradMode.GRAD)
    assert made.is_inference() is (mode is GradMode.INFERENCE_MODE)


@pytest.mark.parametrize("mode", GradMode)
def test_a_mode_can_be_named_by_text(mode: GradMode) -> None:
    with grad_mode(mode.value):
        assert state() == INSIDE[mode]


@pytest.mark.parametrize("name", ["nograd", "", "GRAD"])
def test_an_unknown_mode_raises_value_error_with_the_allowed_names(name: str) -> None:
    with pytest.raises(ValueError, match="not a valid GradMode; allowed: grad, no_grad, infer"):
        grad_mode(name)


# --- the condition -----------------------------------------------------------------------------

CONDITIONAL: list[tuple[Callable[[Any], ModeGuard], State]] = [
    (conditional_no_grad, NO_GRAD),
    (conditional_inference_mode, INFERENCE),
]
both = pytest.mark.parametrize(("make", "inside"), CONDITIONAL)


@both
def test_a_true_condition_activates_the_mode(make: Any, inside: State) -> None:
    with make(True):
        assert state() == inside
    with make(False):
        assert state() == GRAD


@both
def test_a_false_condition_changes_nothing(make: Any, inside: State) -> None:
    with torch.no_grad(), make(False):
        assert state() == NO_GRAD
    with torch.inference_mode(), make(False):
        assert state() == INFERENCE
    with torch.inference_mode(), torch.enable_grad(), make(False):
        assert state() == BOTH


@both
def test_a_callable_condition_is_evaluated_at_each_entry(make: Any, inside: State) -> None:
    answers = iter([True, False, True])
    guard = make(lambda: next(answers))
    for expected in (inside, GRAD, inside):
        with guard:
            assert state() == expected


@both
def test_a_callable_condition_is_evaluated_at_calls_not_at_decoration(
    make: Any, inside: State
) -> None:
    evaluations: list[bool] = []

    def condition() -> bool:
        evaluations.append(len(evaluations) % 2 == 0)
        return evaluations[-1]

    decorated = make(condition)(state)
    assert evaluations == []
    assert [decorated(), decorated(), decorated()] == [inside, GRAD, inside]
    assert evaluations == [True, False, True]


class _Answer:
    def __call__(self) -> bool:
        return True

    def of_a_method(self) -> bool:
        return True


@both
@pytest.mark.parametrize(
    "condition",
    [
        lambda: True,
        lambda flag=True: flag,
        lambda *flags: not flags,
        functools.partial(bool, 1),
        torch.is_grad_enabled,
        _Answer(),
        _Answer().of_a_method,
    ],
)
def test_callables_without_arguments_are_conditions(
    make: Any, inside: State, condition: Any
) -> None:
    with make(condition):
        assert state() == inside


async def _too_late() -> bool:
    return True


@both
@pytest.mark.parametrize(
    "condition",
    [1, 0, None, "yes", [], torch.tensor(True), lambda x: True, _too_late],
)
def test_an_invalid_condition_raises_type_error(make: Any, inside: State, condition: Any) -> None:
    with pytest.raises(TypeError, match="a bool or a callable without arguments"):
        make(condition)


@both
def test_decorating_without_a_condition_raises_type_error(make: Any, inside: State) -> None:
    with pytest.raises(TypeError, match="a bool or a callable without arguments"):

        @make
        def forward(x: int) -> int:
            return x


@both
def test_a_condition_that_raises_changes_nothing(make: Any, inside: State) -> None:
    def broken() -> bool:
        raise KeyError("condition")

    guard = make(broken)
    with pytest.raises(KeyError), guard:
        pass
    assert state() == GRAD
    with pytest.raises(KeyError):
        guard(state)()


def test_set_grad_enabled_is_not_equivalent() -> None:
    """What conditional_no_grad is for: set_grad_enabled(not condition) turns gradients on."""
    with torch.no_grad(), torch.set_grad_enabled(not False):
        assert state() == GRAD
    with torch.no_grad(), conditional_no_grad(False):
        assert state() == NO_GRAD


# --- restoring ---------------------------------------------------------------------------------

OUTSIDE = [GRAD, NO_GRAD, INFERENCE, BOTH]


def entered(flags: State) -> ExitStack:
    stack = ExitStack()
    stack.enter_context(torch.inference_mode() if flags[1] else torch.enable_grad())
    stack.enter_context(torch.set_grad_enabled(flags[0]))
    return stack


@both
@pytest.mark.parametrize("holds", [True, False])
@pytest.mark.parametrize("outside", OUTSIDE)
@pytest.mark.parametrize("changed", [True, False, None])
@pytest.mark.parametrize("raises", [True, False])
def test_the_state_at_entry_is_restored(
    make: Any, inside: State, holds: bool, outside: State, changed: bool | None, raises: bool
) -> None:
    with entered(outside):
        with suppress(KeyError), make(holds):
            if changed is not None:
                torch.set_grad_enabled(changed)
            if raises:
                raise KeyError
        assert state() == outside


@pytest.mark.parametrize("flags", [INFERENCE, BOTH])
def test_in_inference_mode_only_the_grad_flag_changes(flags: State) -> None:
    with entered(flags), conditional_no_grad(True):
        assert state() == INFERENCE
        assert torch.ones(1).is_inference()


def test_no_grad_does_not_change_the_forward_ad_flag() -> None:
    with conditional_no_grad(True):
        assert observe().forward_ad
    with torch.inference_mode():
        assert not observe().forward_ad


# --- reuse, reentrance, threads ----------------------------------------------


@pytest.mark.parametrize("guard", [grad_mode("no_grad"), conditional_no_grad(True)])
def test_a_guard_is_reusable_and_reentrant(guard: ModeGuard) -> None:
    for _ in range(2):
        with guard:
            with guard, torch.enable_grad(), guard:
                assert state() == NO_GRAD
            assert state() == NO_GRAD
        assert state() == GRAD


@both
def test_each_entry_of_a_guard_has_its_own_state(make: Any, inside: State) -> None:
    answers = iter([True, False, True])
    guard = make(lambda: next(answers))
    with guard, torch.set_grad_enabled(True):
        outer = state()
        with guard:
            assert state() == outer
            with guard:
                assert state()[0] is False
            assert state() == outer
    assert state() == GRAD


@both
def test_a_decorated_function_can_recurse(make: Any, inside: State) -> None:
    seen = []

    @make(True)
    def down(depth: int) -> None:
        seen.append(state())
        if depth:
            with torch.enable_grad():
                down(depth - 1)
            seen.append(state())

    down(3)
    assert seen == [inside] * 7
    assert state() == GRAD


@both
def test_threads_can_share_a_guard(make: Any, inside: State) -> None:
    guard, here = make(True), threading.Barrier(4, timeout=20)
    seen: dict[int, list[State]] = {}

    def work(number: int) -> None:
        own = seen.setdefault(number, [])
        with torch.set_grad_enabled(number % 2 == 0):
            here.wait()
            with guard:
                here.wait()
                own.append(state())
                for _ in range(number):  # the threads leave one after the other
                    here.wait()
            own.append(state())
            for _ in range(4 - number):
                here.wait()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    for number, (within, after) in seen.items():
        assert within == inside
        assert after == (number % 2 == 0, False)


def test_a_mode_does_not_apply_to_other_threads() -> None:
    with conditional_no_grad(True), ThreadPoolExecutor(1) as pool:
        assert pool.submit(state).result() == GRAD
        assert state() == NO_GRAD


# --- decorators ----------------------------------------------------------------


def plain(x: int, *, y: str = "y") -> State:
    """Say the state."""
    return state()


def generator(x: int = 2, *, y: str = "y") -> Iterator[State]:
    """Yield the state."""
    for _ in range(x):
        yield state()


async def coroutine(x: int = 2, *, y: str = "y") -> list[State]:
    """Return the states."""
    seen = []
    for _ in range(x):
        seen.append(state())
        await asyncio.sleep(0)
    return [*seen, state()]


async def async_generator(x: int = 2, *, y: str = "y") -> AsyncIterator[State]:
    """Yield the states."""
    for _ in range(x):
        await asyncio.sleep(0)
        yield state()


KINDS = [plain, generator, coroutine, async_generator]
guards = pytest.mark.parametrize(
    ("guard", "inside"),
    [
        (grad_mode("no_grad"), NO_GRAD),
        (grad_mode("inference_mode"), INFERENCE),
        (conditional_no_grad(lambda: True), NO_GRAD),
        (conditional_inference_mode(True), INFERENCE),
    ],
)


@pytest.mark.parametrize("function", KINDS)
def test_a_decorated_function_keeps_its_signature_documentation_and_kind(function: Any) -> None:
    decorated = conditional_no_grad(True)(function)
    assert inspect.signature(decorated) == inspect.signature(function)
    assert (decorated.__name__, decorated.__doc__) == (function.__name__, function.__doc__)
    assert decorated.__wrapped__ is function
    kinds = (
        inspect.isgeneratorfunction,
        inspect.iscoroutinefunction,
        inspect.isasyncgenfunction,
        asyncio.iscoroutinefunction,
    )
    assert [is_kind(decorated) for is_kind in kinds] == [is_kind(function) for is_kind in kinds]


@guards
def test_functions_and_methods_can_be_decorated(guard: ModeGuard, inside: State) -> None:
    class Holder:
        @guard
        def method(self, x: int) -> tuple[State, int]:
            return state(), x

        @classmethod
        @guard
        def of_class(cls) -> State:
            return state()

        @guard
        @classmethod
        def of_class_outside(cls) -> State:
            return state()

        @guard
        @staticmethod
        def static(x: int) -> State:
            return state()

    assert guard(plain)(1) == inside
    assert Holder().method(3) == (inside, 3)
    assert Holder.of_class() == Holder.of_class_outside() == Holder.static(1) == inside
    assert state() == GRAD


@pytest.mark.parametrize("what", [torch.nn.Linear, int, 3, None])
def test_decorating_a_class_or_a_value_raises_type_error(what: Any) -> None:
    with pytest.raises(TypeError, match="decorates functions and methods"):
        grad_mode("no_grad")(what)


# --- generators --------------------------------------------------------------------------------


@guards
def test_a_generator_runs_in_the_mode_and_its_caller_does_not(
    guard: ModeGuard, inside: State
) -> None:
    for within in guard(generator)(3):
        assert within == inside
        assert state() == GRAD


@guards
def test_a_generator_forwards_send_throw_and_return(guard: ModeGuard, inside: State) -> None:
    @guard
    def echo() -> Any:
        got = yield "first"
        while got != "end":
            try:
                got = yield (got, state())
            except KeyError as error:
                got = yield (repr(error), state())
        return state()

    talk = echo()
    assert next(talk) == "first"
    assert talk.send("a") == ("a", inside)
    assert talk.throw(KeyError("b")) == ("KeyError('b')", inside)
    assert state() == GRAD
    with pytest.raises(StopIteration) as ended:
        talk.send("end")
    assert ended.value.value == inside


@guards
def test_closing_a_generator_runs_its_cleanup_in_the_mode(guard: ModeGuard, inside: State) -> None:
    seen = []

    @guard
    def suspended() -> Iterator[int]:
        try:
            yield 1
        finally:
            seen.append(state())

    open_one = suspended()
    next(open_one)
    open_one.close()
    assert seen == [inside]
    with pytest.raises(StopIteration):
        next(open_one)


def test_a_generator_that_raises_restores_the_state() -> None:
    @conditional_no_grad(True)
    def failing() -> Iterator[int]:
        yield 1
        raise KeyError

    with pytest.raises(KeyError):
        list(failing())
    assert state() == GRAD


@both
def test_the_condition_of_a_generator_is_evaluated_at_the_first_next(
    make: Any, inside: State
) -> None:
    active = False
    decorated = make(lambda: active)(generator)
    first, second = decorated(2), decorated(2)
    active = True
    assert next(first) == inside
    active = False
    assert list(first) == [inside]
    assert list(second) == [GRAD] * 2


@guards
def test_a_decorated_generator_function_works_as_a_context_manager(
    guard: ModeGuard, inside: State
) -> None:
    states = []

    @contextmanager
    @guard
    def resource() -> Iterator[State]:
        try:
            yield state()
        except KeyError:
            states.append(state())

    with resource() as within:
        assert (within, state()) == (inside, GRAD)
        raise KeyError
    assert states == [inside]


@pytest.fixture
@conditional_no_grad(True)
def state_in_fixture() -> Iterator[State]:
    yield state()
    assert state() == NO_GRAD


def test_a_decorated_generator_function_works_as_a_fixture(state_in_fixture: State) -> None:
    assert (state_in_fixture, state()) == (NO_GRAD, GRAD)


@both
def test_a_generator_with_a_false_condition_runs_in_its_callers_mode(
    make: Any, inside: State
) -> None:
    one = make(False)(generator)(3)
    assert next(one) == GRAD
    with torch.no_grad():
        assert next(one) == NO_GRAD
    with torch.inference_mode():
        assert next(one) == INFERENCE


def test_interleaved_generators_are_independent() -> None:
    one, other = (
        grad_mode(mode)(generator)(3) for mode in (GradMode.NO_GRAD, GradMode.INFERENCE_MODE)
    )
    for first, second in zip(one, other, strict=True):
        assert (first, second, state()) == (NO_GRAD, INFERENCE, GRAD)


@guards
def test_a_mode_opened_across_a_yield_applies_to_the_body_only(
    guard: ModeGuard, inside: State
) -> None:
    @guard
    def body() -> Iterator[State]:
        with torch.enable_grad():
            yield state()
            yield state()
        yield state()
        torch.set_grad_enabled(True)
        yield state()

    with_flag = (True, inside[1])
    seen = []
    for within in body():
        seen.append(within)
        assert state() == GRAD
        with torch.no_grad():
            pass
    assert seen == [with_flag, with_flag, inside, with_flag]


def test_leaving_inference_mode_across_a_yield_affects_the_body_only() -> None:
    @grad_mode("inference_mode")
    def body() -> Iterator[State]:
        with torch.inference_mode(False):
            yield state()
            yield state()
        yield state()

    seen = []
    for within in body():
        seen.append(within)
        assert state() == GRAD
    assert seen == [GRAD, GRAD, INFERENCE]


# --- async -------------------------------------------------------------------------------------


@guards
def test_a_coroutine_has_the_mode_at_every_resume_and_other_tasks_do_not(
    guard: ModeGuard, inside: State
) -> None:
    async def main() -> None:
        results = await asyncio.gather(guard(coroutine)(5), coroutine(5), guard(coroutine)(3))
        assert results == [[inside] * 6, [GRAD] * 6, [inside] * 4]
        assert state() == GRAD

    asyncio.run(main())


def test_tasks_in_different_modes_are_independent() -> None:
    async def main() -> None:
        kinds = [grad_mode(mode)(coroutine)(7) for mode in GradMode]
        with torch.no_grad():
            results = await asyncio.gather(*kinds, coroutine(7))
        assert results == [*([INSIDE[mode]] * 8 for mode in GradMode), results[3]]

    asyncio.run(main())


@guards
def test_a_cancelled_coroutine_cleans_up_in_its_mode(guard: ModeGuard, inside: State) -> None:
    seen = []

    @guard
    async def long() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            seen.append(state())
            await asyncio.sleep(0)
            seen.append(state())
            raise

    async def main() -> None:
        task = asyncio.create_task(long())
        await asyncio.sleep(0)
        assert state() == GRAD
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert task.cancelled()
        assert state() == GRAD

    asyncio.run(main())
    assert seen == [inside, inside]


@guards
def test_an_error_in_a_coroutine_restores_the_state(guard: ModeGuard, inside: State) -> None:
    @guard
    async def failing() -> None:
        await asyncio.sleep(0)
        raise KeyError(state())

    async def main() -> None:
        with pytest.raises(KeyError) as raised:
            await failing()
        assert raised.value.args == (inside,)
        assert state() == GRAD

    asyncio.run(main())


@guards
def test_a_closed_coroutine_cleans_up_in_its_mode(guard: ModeGuard, inside: State) -> None:
    seen = []

    class Never:
        def __await__(self) -> Iterator[None]:
            yield

    @guard
    async def suspended() -> None:
        try:
            await Never()
        finally:
            seen.append(state())

    one = suspended()
    one.send(None)
    one.close()
    assert seen == [inside]
    assert state() == GRAD


@both
def test_the_condition_of_a_coroutine_is_evaluated_once(make: Any, inside: State) -> None:
    evaluations = []

    @make(lambda: evaluations.append(1) or True)
    async def body() -> list[State]:
        return await coroutine(4)

    assert evaluations == []
    assert asyncio.run(body()) == [inside] * 5
    assert evaluations == [1]


def test_a_mode_opened_across_an_await_applies_to_the_coroutine_only() -> None:
    @conditional_no_grad(True)
    async def body() -> list[State]:
        with torch.enable_grad():
            seen = await coroutine(3)
        return [*seen, state()]

    async def main() -> None:
        first, second = await asyncio.gather(body(), coroutine(5))
        assert first == [GRAD] * 4 + [NO_GRAD]
        assert second == [GRAD] * 6

    asyncio.run(main())


@guards
def test_an_async_generator_runs_in_the_mode_and_its_caller_does_not(
    guard: ModeGuard, inside: State
) -> None:
    async def main() -> None:
        async def consume() -> None:
            async for within in guard(async_generator)(4):
                assert within == inside
                assert state() == GRAD

        _, _, other_task = await asyncio.gather(consume(), consume(), coroutine(6))
        assert other_task == [GRAD] * 7

    asyncio.run(main())


@guards
def test_an_async_generator_forwards_send_and_throw(guard: ModeGuard, inside: State) -> None:
    @guard
    async def echo() -> Any:
        got = yield "first"
        while True:
            await asyncio.sleep(0)
            try:
                got = yield (got, state())
            except KeyError as error:
                got = repr(error)

    async def main() -> None:
        talk = echo()
        assert await anext(talk) == "first"
        assert await talk.asend("a") == ("a", inside)
        assert await talk.athrow(KeyError("b")) == ("KeyError('b')", inside)
        with pytest.raises(ValueError, match="c"):
            await talk.athrow(ValueError("c"))
        with pytest.raises(StopAsyncIteration):
            await anext(talk)
        assert state() == GRAD

    asyncio.run(main())


@guards
@pytest.mark.parametrize("how", ["aclose", "cancel"])
def test_closing_an_async_generator_runs_its_cleanup_in_the_mode(
    guard: ModeGuard, inside: State, how: str
) -> None:
    seen = []

    @guard
    async def suspended() -> AsyncIterator[int]:
        try:
            yield 1
            await asyncio.sleep(60)
        finally:
            seen.append(state())
            await asyncio.sleep(0)
            seen.append(state())

    async def consume(stop_at_once: bool) -> None:
        open_one = suspended()
        async for _ in open_one:
            assert state() == GRAD
            if stop_at_once:
                break
        await open_one.aclose()

    async def main() -> None:
        task = asyncio.create_task(consume(how == "aclose"))
        for _ in range(5):
            await asyncio.sleep(0)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        assert state() == GRAD

    asyncio.run(main())
    assert seen == [inside, inside]


@both
def test_the_condition_of_an_async_generator_is_evaluated_at_the_first_step(
    make: Any, inside: State
) -> None:
    active = True
    decorated = make(lambda: active)(async_generator)

    async def main() -> None:
        nonlocal active
        first = decorated(2)
        assert await anext(first) == inside
        active = False
        assert [seen async for seen in first] == [inside]
        assert [seen async for seen in decorated(2)] == [GRAD] * 2

    asyncio.run(main())


def test_an_abandoned_async_generator_is_closed_by_the_loop() -> None:
    seen = []

    @conditional_no_grad(True)
    async def suspended() -> AsyncIterator[int]:
        try:
            yield 1
        finally:
            await asyncio.sleep(0)
            seen.append(state())

    async def main() -> None:
        async for _ in suspended():
            break
        await asyncio.sleep(0.01)

    asyncio.run(main())
    assert seen == [NO_GRAD]


def test_a_loop_that_ends_closes_async_generators_once(caplog: pytest.LogCaptureFixture) -> None:
    seen = []

    @conditional_no_grad(True)
    async def suspended() -> AsyncIterator[int]:
        try:
            yield 1
        finally:
            await asyncio.sleep(0)
            seen.append(state())

    open_generators = []

    async def main() -> None:
        open_generators.append(suspended())
        await anext(open_generators[0])

    asyncio.run(main())
    assert seen == [NO_GRAD]
    assert not caplog.records


def test_torch_does_not_cover_coroutines_and_async_generators() -> None:
    """Why there are decorators of our own; when this fails, torch has learned it."""

    async def main() -> None:
        assert await torch.no_grad()(coroutine)(2) == [GRAD] * 3
        assert [seen async for seen in torch.no_grad()(async_generator)(2)] == [GRAD] * 2

    asyncio.run(main())


@both
def test_autocast_opened_by_a_coroutine_applies_to_it_only(make: Any, inside: State) -> None:
    @make(True)
    async def body() -> list[torch.dtype]:
        ones, kinds = torch.ones(2, 2), []
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for _ in range(3):
                kinds.append((ones @ ones).dtype)
                await asyncio.sleep(0)
        return [*kinds, (ones @ ones).dtype]

    async def other() -> set[torch.dtype]:
        kinds = set()
        for _ in range(4):
            kinds.add((torch.ones(2, 2) @ torch.ones(2, 2)).dtype)
            await asyncio.sleep(0)
        return kinds

    async def main() -> None:
        first, second = await asyncio.gather(body(), other())
        assert first == [torch.bfloat16] * 3 + [torch.float32]
        assert second == {torch.float32}

    asyncio.run(main())


def test_inference_mode_opened_across_a_yield_applies_to_the_body_only() -> None:
    @conditional_no_grad(True)
    def body() -> Iterator[State]:
        with torch.inference_mode():
            yield state()
            yield state()
        yield state()

    seen = []
    for within in body():
        seen.append(within)
        assert state() == GRAD
    assert seen == [INFERENCE, INFERENCE, NO_GRAD]


# --- torch.compile -----------------------------------------------------------------------------


class Counted:
    """A backend that runs graphs as they are and counts them."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.graphs += 1
        return graph.forward


@pytest.fixture
def backend() -> Iterator[Counted]:
    torch._dynamo.reset()
    yield Counted()
    torch._dynamo.reset()


GUARDS_IN_GRAPHS: list[tuple[Callable[[], Any], bool, bool]] = [
    (lambda: conditional_no_grad(True), False, False),
    (lambda: conditional_no_grad(False), True, False),
    (lambda: conditional_no_grad(lambda: True), False, False),
    (lambda: conditional_inference_mode(True), False, True),
    (lambda: grad_mode("no_grad"), False, False),
    (lambda: grad_mode("grad"), True, False),
    (lambda: grad_mode(GradMode.INFERENCE_MODE), False, True),
]


@needs_torch_2_13
@pytest.mark.parametrize(("make", "requires_grad", "inference"), GUARDS_IN_GRAPHS)
def test_a_block_compiles_to_one_graph(
    backend: Counted, make: Callable[[], Any], requires_grad: bool, inference: bool
) -> None:
    weight = torch.ones(3, requires_grad=True)

    @torch.compile(fullgraph=True, backend=backend)
    def compiled(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with make():
            within = x * weight
        return within, x * weight

    for _ in range(2):
        within, after = compiled(torch.full((3,), 2.0))
        assert within.requires_grad is requires_grad
        assert within.is_inference() is inference
        assert after.requires_grad
        assert torch.equal(within, after)
    assert backend.graphs == 1
    assert state() == GRAD


@needs_torch_2_13
def test_a_compiled_block_restores_inside_an_outer_no_grad(backend: Counted) -> None:
    weight = torch.ones(3, requires_grad=True)

    @torch.compile(fullgraph=True, backend=backend)
    def compiled(x: torch.Tensor) -> torch.Tensor:
        with conditional_no_grad(False):
            return x * weight

    with torch.no_grad():
        assert not compiled(torch.ones(3)).requires_grad
        assert state() == NO_GRAD
    assert compiled(torch.ones(3)).requires_grad
    assert backend.graphs == 2  # each mode costs one compile


@needs_torch_2_13
def test_a_decorated_function_can_call_a_compiled_one(backend: Counted) -> None:
    weight = torch.ones(3, requires_grad=True)
    compiled = torch.compile(lambda x: x * weight, fullgraph=True, backend=backend)
    assert not conditional_no_grad(True)(compiled)(torch.ones(3)).requires_grad
    assert compiled(torch.ones(3)).requires_grad


# --- observe and assert_restored ---------------------------------------------------------------


@pytest.mark.parametrize("flags", OUTSIDE)
def test_observe_returns_the_state_without_changing_it(flags: State) -> None:
    with entered(flags):
        seen = observe()
        assert (seen.grad, seen.inference) == flags == state()
        assert seen.thread == threading.get_ident()
        assert seen.records is (flags == GRAD)
        assert (torch.ones(1, requires_grad=True) * 2).requires_grad is seen.records


def test_a_state_has_a_readable_name() -> None:
    assert str(observe()) == "grad"
    with torch.inference_mode():
        assert str(observe()) == "inference_mode, no forward AD"


def test_observe_returns_the_current_thread() -> None:
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(observe).result().thread != observe().thread


def test_a_block_that_restores_passes() -> None:
    with assert_restored(), torch.no_grad(), conditional_no_grad(True):
        pass


def test_a_block_that_does_not_restore_fails_and_the_flag_is_restored() -> None:
    with (
        pytest.raises(AssertionError, match=r"was grad before the block and no_grad after"),
        assert_restored(),
    ):
        torch.set_grad_enabled(False)
    assert state() == GRAD


def test_a_leak_is_reported_even_if_the_block_raised() -> None:
    with pytest.raises(AssertionError, match="no_grad") as raised, assert_restored():  # noqa: PT012
        torch.set_grad_enabled(False)
        raise KeyError("first")
    assert isinstance(raised.value.__context__, KeyError)
    assert state() == GRAD


def test_an_error_without_a_leak_is_not_replaced() -> None:
    with pytest.raises(KeyError), assert_restored(), torch.no_grad():
        raise KeyError


def test_the_leak_of_a_reentered_torch_guard_is_detected() -> None:
    """One instance of torch's entered twice, nested, leaks its state."""
    guard = torch.no_grad()
    with pytest.raises(AssertionError), assert_restored(), guard, guard:
        pass


def test_assert_restored_is_not_a_decorator() -> None:
    assert not callable(assert_restored())


def test_states_can_be_compared_and_pickled() -> None:
    seen = observe()
    assert pickle.loads(pickle.dumps(seen)) == seen
