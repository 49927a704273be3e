"""Track the calls of a model's modules.

The hooks are global instead of per module: per-module hooks change the code under observation, for
example nn.TransformerEncoderLayer leaves its fused path if one of its submodules has a hook.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

from torch import nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

T = TypeVar("T")


class ModuleCallStack(Generic[T]):
    """The module calls in progress, outermost first, each with the value of its enter callback."""

    def __init__(self) -> None:
        self.calls: list[tuple[nn.Module, T]] = []

    @property
    def innermost(self) -> nn.Module | None:
        """The module whose forward is running."""
        return self.calls[-1][0] if self.calls else None


@contextmanager
def track_module_calls(
    enter: Callable[[nn.Module, tuple[Any, ...]], T],
    leave: Callable[[nn.Module, T, Any], None] = lambda *_: None,
    *,
    always_leave: bool = False,
) -> Iterator[ModuleCallStack[T]]:
    """Track every module call in the process while the block runs.

    Args:
        enter: called with the module and its positional arguments before each forward.
        leave: called with the module, the value of `enter` and the output after each forward. The
            call is off the stack by then.
        always_leave: call `leave` after a forward that raised an Exception, too, with None as the
            output. Without it, such calls stay on the stack until a module around them returns.
    """
    stack: ModuleCallStack[T] = ModuleCallStack()

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        stack.calls.append((module, enter(module, args)))

    def after(module: nn.Module, _: Any, output: Any) -> None:
        # Calls that raised are above this one on the stack.
        while stack.calls:
            innermost, value = stack.calls.pop()
            if innermost is module:
                leave(module, value, output)
                return

    hooks = [
        register_module_forward_pre_hook(before),
        register_module_forward_hook(after, always_call=always_leave),
    ]
    try:
        yield stack
    finally:
        for hook in hooks:
            hook.remove()
