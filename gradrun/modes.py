"""The gradient modes: torch's own objects, and guards that cover what torch's leave out.

Knows what a mode does to the thread, and nothing of models or measuring; imports torch alone.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from collections.abc import (
    AsyncGenerator,
    Awaitable,
    Callable,
    Coroutine,
    Generator,
)
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import (
    enable_grad,
    inference_mode,
    is_grad_enabled,
    is_inference_mode_enabled,
    no_grad,
    set_grad_enabled,
)
from torch.autograd.grad_mode import _enter_inference_mode, _exit_inference_mode

from gradrun.core.grad_mode import GradMode

__all__ = [
    "GradMode",
    "ModeGuard",
    "ModeState",
    "assert_restored",
    "conditional_inference_mode",
    "conditional_no_grad",
    "enable_grad",
    "grad_mode",
    "inference_mode",
    "is_grad_enabled",
    "is_inference_mode_enabled",
    "no_grad",
    "observe",
    "set_grad_enabled",
]

F = TypeVar("F", bound=Callable[..., Any])

Condition = bool | Callable[[], bool]
"""Whether a guard acts; a callable is asked at each entry or call."""


# --- what the thread is in ---------------------------------------------------------------------


@dataclass(frozen=True)
class ModeState:
    """The gradient mode of a thread."""

    grad: bool
    inference: bool
    forward_ad: bool
    thread: int
    """As threading.get_ident() says it."""

    @property
    def records(self) -> bool:
        """Whether operations are recorded for backward: inference mode overrules the grad flag."""
        return self.grad and not self.inference

    def __str__(self) -> str:
        flags = {
            (True, False): "grad",
            (False, False): "no_grad",
            (False, True): "inference_mode",
            (True, True): "inference_mode with the grad flag on",
        }
        return flags[self.grad, self.inference] + ("" if self.forward_ad else ", no forward AD")


def observe() -> ModeState:
    """The calling thread's state; changes nothing."""
    return ModeState(
        grad=torch.is_grad_enabled(),
        inference=torch.is_inference_mode_enabled(),
        forward_ad=torch._C._is_fwd_grad_enabled(),
        thread=threading.get_ident(),
    )


class assert_restored:  # noqa: N801 - used as a word, like pytest.raises
    """Fail when a `with` block leaves its thread in another gradient mode than it found.

    Not a decorator on purpose: over `async def` it would watch nothing, and never fail.

    Raises:
        AssertionError: at the end of the block, also of one that raised; names both states. The
            grad flag is put back first, so that the next test starts as this one did.
    """

    def __enter__(self) -> None:
        self._found = observe()

    def __exit__(self, *_: object) -> None:
        left, found = observe(), self._found
        if left != found:
            torch.set_grad_enabled(found.grad)
            if left.thread != found.thread:
                raise AssertionError("the block ended in another thread than it began in")
            raise AssertionError(f"the block found the thread in {found} and left it in {left}")


# --- guards ------------------------------------------------------------------------------------


def grad_mode(mode: GradMode | str) -> ModeGuard:
    """A fresh guard for `mode`, for a `with` block or as a decorator.

    Raises:
        ValueError: `mode` is no gradient mode.
    """
    return ModeGuard(_named(mode))


def conditional_no_grad(condition: Condition) -> ModeGuard:
    """Turn gradients off where the condition holds; where it does not, change nothing.

    `torch.set_grad_enabled(not condition)` differs: it turns gradients *on*, also for a caller
    who had turned them off.

    Args:
        condition: a bool, or a callable without arguments, which is asked at each entry of a
            `with` block and at each call of a decorated function, never at decoration.

    Raises:
        TypeError: the condition is neither.
    """
    return ModeGuard(GradMode.NO_GRAD, condition)


def conditional_inference_mode(condition: Condition) -> ModeGuard:
    """Run in inference mode where the condition holds; where it does not, change nothing.

    As `conditional_no_grad`; `torch.inference_mode(condition)` turns gradients on instead.
    """
    return ModeGuard(GradMode.INFERENCE_MODE, condition)


def _named(mode: GradMode | str) -> GradMode:
    if isinstance(mode, GradMode):
        return mode
    try:
        return GradMode(mode)
    except ValueError:
        known = ", ".join(GradMode)
        raise ValueError(f"{mode!r} is not a valid GradMode; choose of {known}") from None


class ModeGuard:
    """A gradient mode for a `with` block, or as a decorator of functions of every kind.

    One instance can be entered again and again, within itself and by several threads. On exit the
    grad flag is as it was at entry, whatever the block did to it.

    As a decorator it covers plain functions, methods, generators, `async def` and async
    generators. A body that is suspended and resumed has the mode whenever it runs, and its thread,
    with all other tasks, is as it was in between; a mode that the body itself is in across an
    `await` or `yield` (`with enable_grad(): await ...`) is kept for it in the same way. The
    condition of a call is asked once: for a generator when it is created. `inspect` then takes a
    decorated generator function for a plain one that returns a generator.

    torch.compile follows a `with` block over a guard that is made in the compiled function.
    """

    def __init__(self, mode: GradMode, condition: Condition = True) -> None:
        self._mode, self._condition = mode, condition
        # While torch.compile traces there is one thread, and neither a threading.local nor a look
        # at a signature can be traced.
        tracing = torch.compiler.is_compiling()
        self._entries: _Entries = _Entries() if tracing else _OF_THREAD
        if not tracing:
            _check(condition)

    def __enter__(self) -> None:
        holds = self._holds()
        grad, opened = torch.is_grad_enabled(), None
        if holds and self._mode is GradMode.INFERENCE_MODE:
            opened = _enter_inference_mode(True)  # type: ignore[no-untyped-call]
        elif holds:
            torch.set_grad_enabled(self._mode is GradMode.GRAD)
        self._entries.open.append((self, grad, opened))

    def __exit__(self, *_: object) -> None:
        entries = self._entries.open
        at = len(entries) - 1
        while entries[at][0] is not self:
            at -= 1
        grad, opened = entries.pop(at)[1:]
        if opened is not None:
            _exit_inference_mode(opened)  # type: ignore[no-untyped-call]
        torch.set_grad_enabled(grad)

    def __call__(self, function: F) -> F:
        """Cover a function; its name, signature and documentation stay.

        Raises:
            TypeError: it is a class (decorate its methods) or cannot be called.
        """
        covered: Any
        if isinstance(function, staticmethod | classmethod):
            covered = type(function)(self(function.__func__))
            return covered  # type: ignore[no-any-return]
        if inspect.isclass(function) or not callable(function):
            raise TypeError(f"a gradient mode decorates functions and methods, not {function!r}")
        cover = next((cover for is_kind, cover in _COVERS if is_kind(function)), _cover_plain)
        covered = cover(self, function)
        return covered  # type: ignore[no-any-return]

    def _holds(self) -> bool:
        condition = self._condition
        return condition if isinstance(condition, bool) else bool(condition())

    def _decided(self) -> ModeGuard:
        """The guard with its condition asked, once and for all."""
        return ModeGuard(self._mode, self._holds())


class _Entries:
    """What guards remember: it belongs to an entry, and entries nest within a thread."""

    def __init__(self) -> None:
        self.open: list[tuple[ModeGuard, bool, Any]] = []
        """(guard, grad flag before, what ends its inference mode), innermost last."""


class _EntriesOfThread(threading.local, _Entries):
    pass


_OF_THREAD = _EntriesOfThread()


def _check(condition: object) -> None:
    if isinstance(condition, bool):
        return
    wanted = "the condition is a bool or a callable without arguments"
    if not callable(condition):
        raise TypeError(f"{wanted}, not {condition!r}")
    if inspect.iscoroutinefunction(condition):
        raise TypeError(f"{wanted}; {condition!r} is async, and its answer would come too late")
    try:
        inspect.signature(condition).bind()
    except ValueError:  # a builtin may have no signature to look at
        return
    except TypeError as error:
        raise TypeError(f"{wanted}; {condition!r} takes some ({error})") from None


# --- decorators --------------------------------------------------------------------------------


def _cover_plain(guard: ModeGuard, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def covered(*args: Any, **kwargs: Any) -> Any:
        with guard:
            return function(*args, **kwargs)

    return covered


def _cover_generator(guard: ModeGuard, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def covered(*args: Any, **kwargs: Any) -> Any:
        return _resumed(function(*args, **kwargs), _Body(guard._decided()))

    return covered


def _cover_coroutine(guard: ModeGuard, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    async def covered(*args: Any, **kwargs: Any) -> Any:
        body = _Body(guard._decided())
        return await _Awaited(function(*args, **kwargs), body)

    return covered


def _cover_async_generator(guard: ModeGuard, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def covered(*args: Any, **kwargs: Any) -> Any:
        return _resumed_async(function(*args, **kwargs), _Body(guard._decided()))

    return covered


_COVERS: list[tuple[Callable[[Any], bool], Callable[[ModeGuard, Any], Any]]] = [
    (inspect.isasyncgenfunction, _cover_async_generator),
    (inspect.iscoroutinefunction, _cover_coroutine),
    (inspect.isgeneratorfunction, _cover_generator),
]


@dataclass(frozen=True)
class _Flags:
    """What a mode is made of, and autocast, which torch's inference guard resets on its way."""

    grad: bool
    inference: bool
    forward_ad: bool
    autocast: tuple[bool, ...]

    @classmethod
    def seen(cls) -> _Flags:
        state = observe()
        autocast = tuple(torch.is_autocast_enabled(kind) for kind in _DEVICES)
        return cls(state.grad, state.inference, state.forward_ad, autocast)

    def set(self) -> None:
        """Put the thread in this state, inference apart: that takes a guard."""
        torch.set_grad_enabled(self.grad)
        torch._C._set_fwd_grad_enabled(self.forward_ad)
        for kind, on in zip(_DEVICES, self.autocast, strict=True):
            if torch.is_autocast_enabled(kind) is not on:
                torch.set_autocast_enabled(kind, on)


_DEVICES = ("cpu", "cuda", "mps", "xpu")


class _Body:
    """The mode of a body that is suspended and resumed: the guard's, or one that it opened."""

    def __init__(self, guard: ModeGuard) -> None:
        self._guard = guard
        self._given: _Flags | None = None
        self._own: _Flags | None = None
        self._entries: list[Any] = []
        """Of guards that the body is inside of while it is suspended."""

    def resume(self, step: Callable[..., Any], *args: Any) -> Any:
        """Run the body to its next suspension, and leave the thread as it was."""
        wanted = self._own or _Flags.seen()
        # When this guard ends, it undoes all that the body may have left behind.
        with torch.inference_mode(wanted.inference):
            wanted.set()
            with nullcontext() if self._own else self._guard:
                if not self._own:
                    self._given = _Flags.seen()
                entries = _OF_THREAD.open
                outside = len(entries)
                entries += self._entries
                try:
                    return step(*args)
                finally:
                    left = _Flags.seen()
                    self._own = None if left == self._given else left
                    self._entries = entries[outside:]
                    del entries[outside:]


def _resumed(
    inner: Generator[Any, Any, Any] | Coroutine[Any, Any, Any], body: _Body
) -> Generator[Any, Any, Any]:
    """`inner` as it is to its caller: all that is sent, thrown, yielded and returned goes through.

    This is what `yield from` does (PEP 380), with the body's mode around each step.
    """
    step, value = inner.send, None
    while True:
        try:
            yielded = body.resume(step, value)
        except StopIteration as end:
            return end.value
        try:
            step, value = inner.send, (yield yielded)
        except GeneratorExit:
            body.resume(inner.close)
            raise
        except BaseException as thrown:  # a cancelled task throws CancelledError here
            step, value = inner.throw, thrown


class _Awaited:
    """An awaitable each of whose steps runs in the body's mode."""

    def __init__(self, inner: Any, body: _Body) -> None:
        self._inner, self._body = inner, body

    def __await__(self) -> Generator[Any, Any, Any]:
        return _resumed(self._inner, self._body)


async def _resumed_async(inner: AsyncGenerator[Any, Any], body: _Body) -> AsyncGenerator[Any, Any]:
    """As `_resumed`, for an async generator: it is suspended at `await` and at `yield`."""
    step = _unknown_to_the_loop(inner)
    while True:
        try:
            yielded = await _Awaited(step, body)
        except StopAsyncIteration:
            return
        try:
            step = inner.asend((yield yielded))
        except GeneratorExit:
            await _Awaited(inner.aclose(), body)
            raise
        except BaseException as thrown:
            step = inner.athrow(thrown)


def _unknown_to_the_loop(inner: AsyncGenerator[Any, Any]) -> Awaitable[Any]:
    """The first step. An event loop closes the generators that it knows of all at once when it
    ends: it is to close the one around, which closes this one.
    """
    hooks = sys.get_asyncgen_hooks()
    sys.set_asyncgen_hooks(None, None)
    try:
        return inner.asend(None)
    finally:
        sys.set_asyncgen_hooks(*hooks)
