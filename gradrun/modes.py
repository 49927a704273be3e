"""Gradient modes: torch's own context managers, and guards for cases they do not cover."""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Generator
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
"""Whether a guard is active; a callable is evaluated at each entry or call."""


# --- the state of a thread ---------------------------------------------------------------------


@dataclass(frozen=True)
class ModeState:
    """The gradient mode of a thread; `thread` is its threading.get_ident()."""

    grad: bool
    inference: bool
    forward_ad: bool
    thread: int

    @property
    def records(self) -> bool:
        """Whether operations are recorded for backward; inference mode overrides the grad flag."""
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
    """Return the calling thread's state without changing it."""
    return ModeState(
        grad=torch.is_grad_enabled(),
        inference=torch.is_inference_mode_enabled(),
        forward_ad=torch._C._is_fwd_grad_enabled(),
        thread=threading.get_ident(),
    )


class assert_restored:  # noqa: N801 - reads like pytest.raises
    """Assert that a `with` block restores the thread's gradient mode.

    It is not a decorator: on an `async def` function it would check nothing.

    Raises:
        AssertionError: at the end of the block, even if it raised; names both states. The grad
            flag is restored first, so that later tests are not affected.
    """

    def __enter__(self) -> None:
        self._before = observe()

    def __exit__(self, *_: object) -> None:
        after, before = observe(), self._before
        if after != before:
            torch.set_grad_enabled(before.grad)
            if after.thread != before.thread:
                raise AssertionError("the block ended in a different thread than it started in")
            raise AssertionError(f"the mode was {before} before the block and {after} after it")


# --- guards ------------------------------------------------------------------------------------


def grad_mode(mode: GradMode | str) -> ModeGuard:
    """Return a new guard for `mode`, for use as a context manager or decorator.

    Raises:
        ValueError: `mode` is not a gradient mode.
    """
    if not isinstance(mode, GradMode):
        try:
            mode = GradMode(mode)
        except ValueError:
            allowed = ", ".join(GradMode)
            raise ValueError(f"{mode!r} is not a valid GradMode; allowed: {allowed}") from None
    return ModeGuard(mode)


def conditional_no_grad(condition: Condition) -> ModeGuard:
    """Disable gradients if the condition is true; otherwise change nothing.

    `torch.set_grad_enabled(not condition)` differs: it enables gradients for a caller that
    disabled them.

    Args:
        condition: a bool, or a callable without arguments. A callable is evaluated at each entry
            of a `with` block and at each call of a decorated function, never at decoration.

    Raises:
        TypeError: the condition is neither.
    """
    return ModeGuard(GradMode.NO_GRAD, condition)


def conditional_inference_mode(condition: Condition) -> ModeGuard:
    """Enable inference mode if the condition is true; otherwise change nothing.

    Works like `conditional_no_grad`; `torch.inference_mode(False)` enables gradients instead.
    """
    return ModeGuard(GradMode.INFERENCE_MODE, condition)


class ModeGuard:
    """A gradient mode as a context manager or as a decorator.

    An instance is reusable, reentrant and thread-safe. On exit it restores the grad flag of the
    entry, even if the block changed it.

    It decorates functions, methods, generator functions, `async def` functions and async generator
    functions, and preserves their kind. A suspended body has the mode whenever it runs; in between,
    its thread and all other tasks keep their own. A mode that the body itself opens across an
    `await` or `yield` (`with enable_grad(): await ...`) is saved and restored in the same way. The
    condition is evaluated once per call, for generators at the first `next`.

    torch.compile traces a `with` block over a guard that is created in the compiled function (torch
    2.13 or newer).
    """

    def __init__(self, mode: GradMode, condition: Condition = True) -> None:
        self._mode, self._condition = mode, condition
        # torch.compile traces a single thread, and can trace neither threading.local nor inspect.
        tracing = torch.compiler.is_compiling()
        self._entries: _Entries = _Entries() if tracing else _THREAD_ENTRIES
        if not tracing:
            _check_condition(condition)

    def __enter__(self) -> None:
        active = self._evaluate()
        grad, inference_guard = torch.is_grad_enabled(), None
        if active and self._mode is GradMode.INFERENCE_MODE:
            inference_guard = _enter_inference_mode(True)  # type: ignore[no-untyped-call]
        elif active:
            torch.set_grad_enabled(self._mode is GradMode.GRAD)
        self._entries.stack.append((self, grad, inference_guard))

    def __exit__(self, *_: object) -> None:
        stack = self._entries.stack
        index = len(stack) - 1
        while stack[index][0] is not self:
            index -= 1
        grad, inference_guard = stack.pop(index)[1:]
        if inference_guard is not None:
            _exit_inference_mode(inference_guard)  # type: ignore[no-untyped-call]
        torch.set_grad_enabled(grad)

    def __call__(self, function: F) -> F:
        """Wrap a function; keep its name, signature, documentation and kind.

        Raises:
            TypeError: it is a class (decorate its methods) or not callable.
        """
        wrapper: Any
        if isinstance(function, staticmethod | classmethod):
            wrapper = type(function)(self(function.__func__))
            return wrapper  # type: ignore[no-any-return]
        if inspect.isclass(function) or not callable(function):
            raise TypeError(f"a gradient mode decorates functions and methods, not {function!r}")
        wrap = next((wrap for is_kind, wrap in _WRAPPERS if is_kind(function)), _wrap_function)
        wrapper = wrap(self, function)
        return wrapper  # type: ignore[no-any-return]

    def _evaluate(self) -> bool:
        condition = self._condition
        return condition if isinstance(condition, bool) else bool(condition())

    def _evaluated(self) -> ModeGuard:
        """Return a guard with the condition's current value."""
        return ModeGuard(self._mode, self._evaluate())


class _Entries:
    """Open entries of guards, innermost last: (guard, grad flag before, inference guard)."""

    def __init__(self) -> None:
        self.stack: list[tuple[ModeGuard, bool, Any]] = []


class _ThreadEntries(threading.local, _Entries):
    pass


_THREAD_ENTRIES = _ThreadEntries()


def _check_condition(condition: object) -> None:
    if isinstance(condition, bool):
        return
    expected = "the condition must be a bool or a callable without arguments"
    if not callable(condition):
        raise TypeError(f"{expected}, not {condition!r}")
    if inspect.iscoroutinefunction(condition):
        raise TypeError(f"{expected}; {condition!r} is async and cannot be evaluated at entry")
    try:
        inspect.signature(condition).bind()
    except ValueError:  # a builtin may have no signature
        return
    except TypeError as error:
        raise TypeError(f"{expected}; {condition!r} takes arguments ({error})") from None


# --- decorators --------------------------------------------------------------------------------


def _wrap_function(guard: ModeGuard, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with guard:
            return function(*args, **kwargs)

    return wrapper


def _wrap_generator(guard: ModeGuard, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
        body = _SuspendableBody(guard._evaluated())
        return (yield from _drive(function(*args, **kwargs), body))

    return wrapper


def _wrap_coroutine(guard: ModeGuard, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        body = _SuspendableBody(guard._evaluated())
        return await _DrivenAwaitable(function(*args, **kwargs), body)

    return wrapper


def _wrap_async_generator(guard: ModeGuard, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    async def wrapper(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, Any]:
        body = _SuspendableBody(guard._evaluated())
        inner = function(*args, **kwargs)
        step = _first_step(inner)
        while True:
            try:
                value = await _DrivenAwaitable(step, body)
            except StopAsyncIteration:
                return
            try:
                step = inner.asend((yield value))
            except GeneratorExit:
                await _DrivenAwaitable(inner.aclose(), body)
                raise
            except BaseException as thrown:
                step = inner.athrow(thrown)

    return wrapper


_WRAPPERS: list[tuple[Callable[[Any], bool], Callable[[ModeGuard, Any], Any]]] = [
    (inspect.isasyncgenfunction, _wrap_async_generator),
    (inspect.iscoroutinefunction, _wrap_coroutine),
    (inspect.isgeneratorfunction, _wrap_generator),
]


@dataclass(frozen=True)
class _ThreadState:
    """The flags of a mode, and autocast, which torch's inference guard resets."""

    grad: bool
    inference: bool
    forward_ad: bool
    autocast: tuple[bool, ...]

    @classmethod
    def current(cls) -> _ThreadState:
        state = observe()
        autocast = tuple(torch.is_autocast_enabled(device) for device in _DEVICES)
        return cls(state.grad, state.inference, state.forward_ad, autocast)

    def apply(self) -> None:
        """Set all flags except inference, which needs a guard."""
        torch.set_grad_enabled(self.grad)
        torch._C._set_fwd_grad_enabled(self.forward_ad)
        for device, enabled in zip(_DEVICES, self.autocast, strict=True):
            if torch.is_autocast_enabled(device) is not enabled:
                torch.set_autocast_enabled(device, enabled)


_DEVICES = ("cpu", "cuda", "mps", "xpu")


class _SuspendableBody:
    """The mode of a body between suspensions: the guard's, or one that the body opened."""

    def __init__(self, guard: ModeGuard) -> None:
        self._guard = guard
        self._at_entry: _ThreadState | None = None
        self._changed: _ThreadState | None = None
        """The state at the last suspension, if the body changed it."""
        self._entries: list[Any] = []
        """Open entries of guards inside the body."""

    def resume(self, step: Callable[..., Any], *args: Any) -> Any:
        """Run the body until it suspends, then restore the thread's state."""
        state = self._changed or _ThreadState.current()
        # The exit of this context undoes all changes of the body.
        with torch.inference_mode(state.inference):
            state.apply()
            with nullcontext() if self._changed else self._guard:
                if not self._changed:
                    self._at_entry = _ThreadState.current()
                stack = _THREAD_ENTRIES.stack
                outer = len(stack)
                stack += self._entries
                try:
                    return step(*args)
                finally:
                    state = _ThreadState.current()
                    self._changed = None if state == self._at_entry else state
                    self._entries = stack[outer:]
                    del stack[outer:]


def _drive(
    inner: Generator[Any, Any, Any] | Coroutine[Any, Any, Any], body: _SuspendableBody
) -> Generator[Any, Any, Any]:
    """Delegate like `yield from` (PEP 380), and run each step in the body's mode."""
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
        except BaseException as thrown:  # for example CancelledError
            step, value = inner.throw, thrown


class _DrivenAwaitable:
    """An awaitable that runs each step of `inner` in the body's mode."""

    def __init__(self, inner: Any, body: _SuspendableBody) -> None:
        self._inner, self._body = inner, body

    def __await__(self) -> Generator[Any, Any, Any]:
        return _drive(self._inner, self._body)


def _first_step(inner: AsyncGenerator[Any, Any]) -> Awaitable[Any]:
    """Start an async generator without registering it in the event loop.

    At its end, a loop closes all registered generators concurrently. It must close only the
    wrapper, which closes this one.
    """
    hooks = sys.get_asyncgen_hooks()
    sys.set_asyncgen_hooks(None, None)
    try:
        return inner.asend(None)
    finally:
        sys.set_asyncgen_hooks(*hooks)
