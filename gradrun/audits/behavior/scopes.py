"""How far a mode reaches: blocks within blocks, other threads, and tasks of an event loop.

Knows what the thread is in; of tensors only whether an operation was recorded.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from threading import Thread
from typing import Any

import torch

from gradrun.audits.behavior.probe import (
    BLOCKS,
    Ask,
    Probe,
    block,
    current_mode,
    enter_other_mode,
    in_all_modes,
    on,
)
from gradrun.core.grad_mode import GradMode
from gradrun.modes import grad_mode

_AS_MODES = (GradMode.GRAD.value, GradMode.NO_GRAD.value, GradMode.INFERENCE_MODE.value)

# --- blocks within blocks ----------------------------------------------------------------------


def _within(*blocks: Callable[[], AbstractContextManager[Any]]) -> Ask:
    """The grad flag within blocks that are opened one in the other."""

    def ask(mode: GradMode, device: torch.device) -> str:
        with ExitStack() as stack:
            for make in blocks:
                stack.enter_context(make())
            return on(torch.is_grad_enabled())

    return ask


def _recorded_in_both(mode: GradMode, device: torch.device) -> str:
    w = torch.ones(3, device=device, requires_grad=True)
    with torch.inference_mode(), torch.enable_grad():
        return on((w * 2).requires_grad)


def _constructed(mode: GradMode, device: torch.device) -> str:
    _never_entered = torch.set_grad_enabled(False)
    return on(torch.is_grad_enabled())


def _called_in_a_function(mode: GradMode, device: torch.device) -> str:
    def evaluate() -> None:
        torch.set_grad_enabled(False)

    evaluate()
    return on(torch.is_grad_enabled())


def _called_in_a_block(mode: GradMode, device: torch.device) -> str:
    with torch.enable_grad():
        torch.set_grad_enabled(False)
    return on(torch.is_grad_enabled())


def _entered_twice(make: Callable[[], AbstractContextManager[Any]]) -> Ask:
    def ask(mode: GradMode, device: torch.device) -> str:
        guard = make()
        with guard, guard:
            pass
        return on(torch.is_grad_enabled())

    return ask


NESTING = (
    Probe(
        "enable_grad() inside no_grad()",
        "on",
        _within(torch.no_grad, torch.enable_grad),
        "The innermost block wins, so a callee can turn on what its caller turned off.",
    ),
    Probe(
        "no_grad() inside enable_grad()",
        "off",
        _within(torch.enable_grad, torch.no_grad),
        "The innermost block wins, and its caller has gradients again when it ends.",
    ),
    Probe(
        "enable_grad() inside inference_mode(), says the grad flag",
        "on",
        _within(torch.inference_mode, torch.enable_grad),
        "The grad flag says on, and yet nothing is recorded (the next line).",
    ),
    Probe(
        "enable_grad() inside inference_mode(), says what is recorded",
        "off",
        _recorded_in_both,
        "Inference mode overrules the grad flag: a model that needs gradients for itself cannot "
        "turn them on in there.",
    ),
    Probe(
        "inference_mode(False) inside no_grad()",
        "on",
        _within(torch.no_grad, lambda: torch.inference_mode(False)),
        "inference_mode(condition) does not do nothing where the condition is false: it turns "
        "gradients on, for a caller too who had turned them off.",
    ),
    Probe(
        "set_grad_enabled(False) constructed and not entered",
        "off",
        _constructed,
        "It acts when it is made, not when a `with` enters it: making one to use later changes "
        "the mode at once.",
    ),
    Probe(
        "set_grad_enabled(False) called in a function that has returned",
        "off",
        _called_in_a_function,
        "As a call it stays in force when the function that made it is over; only a block ends it.",
    ),
    Probe(
        "set_grad_enabled(False) called in a block that has ended",
        "on",
        _called_in_a_block,
        "A block puts back what it found, whatever was called within it.",
    ),
    Probe(
        "one torch.no_grad() entered again within itself, afterwards",
        "off",
        _entered_twice(torch.no_grad),
        "torch's object remembers one state, and the second entry overwrites it: gradients stay "
        "off for the rest of the thread. Make a fresh one for each block.",
    ),
    Probe(
        "one gradrun guard entered again within itself, afterwards",
        "on",
        _entered_twice(lambda: grad_mode(GradMode.NO_GRAD)),
        "gradrun's guards remember each entry, so that one can be shared and nested.",
    ),
)

# --- threads -----------------------------------------------------------------------------------


def _new_thread(mode: GradMode, device: torch.device) -> str:
    seen: list[str] = []
    with block(mode):
        thread = Thread(target=lambda: seen.append(current_mode()))
        thread.start()
        thread.join()
    return seen[0]


def _pools_thread(mode: GradMode, device: torch.device) -> str:
    with block(mode), ThreadPoolExecutor(1) as pool:
        return pool.submit(current_mode).result()


def _thread_after_a_job(mode: GradMode, device: torch.device) -> str:
    def job() -> AbstractContextManager[Any]:
        enter_other_mode(mode)
        entered = block(mode)
        entered.__enter__()
        return entered  # an inference mode that nobody holds ends by itself

    with ThreadPoolExecutor(1) as pool:
        held = pool.submit(job)
        held.result()
        return pool.submit(current_mode).result()


THREADS = (
    Probe(
        "a thread started in a block",
        in_all_modes("grad"),
        _new_thread,
        "A mode belongs to a thread and is not inherited: each new one starts with gradients on "
        "and needs a block of its own.",
    ),
    Probe(
        "a pool made in a block",
        in_all_modes("grad"),
        _pools_thread,
        "Jobs of a pool do not run in the mode of who submits them; open the block in the job.",
    ),
    Probe(
        "a job, after one that left it on",
        _AS_MODES,
        _thread_after_a_job,
        "A pool's thread stays as the last job left it, and the next job, whosever it is, runs so.",
    ),
)

# --- asyncio -----------------------------------------------------------------------------------


def _to_thread(mode: GradMode, device: torch.device) -> str:
    async def main() -> str:
        with block(mode):
            return await asyncio.to_thread(current_mode)

    return asyncio.run(main())


def _another_task(mode: GradMode, device: torch.device) -> str:
    async def waiting() -> None:
        with block(mode):
            await asyncio.sleep(0)

    async def main() -> str:
        enter_other_mode(mode)
        task = asyncio.create_task(waiting())
        await asyncio.sleep(0)
        seen = current_mode()
        await task
        return seen

    return asyncio.run(main())


def _after_an_overlap(mode: GradMode, device: torch.device) -> str:
    async def waiting(over: asyncio.Event) -> None:
        with block(mode):
            await over.wait()

    async def main() -> str:
        enter_other_mode(mode)
        first, second = asyncio.Event(), asyncio.Event()
        tasks = [asyncio.create_task(waiting(over)) for over in (first, second)]
        await asyncio.sleep(0)
        for over, task in zip((first, second), tasks, strict=True):
            over.set()
            await task
        return current_mode()

    return asyncio.run(main())


def _caller_of_a_generator(mode: GradMode, device: torch.device) -> str:
    def batches() -> Any:
        with BLOCKS[mode]():
            yield

    enter_other_mode(mode)
    held = batches()
    next(held)
    return current_mode()


SUSPENDED = (
    Probe(
        "a caller, at a yield in a block",
        _AS_MODES,
        _caller_of_a_generator,
        "A block around a `yield` stays open while the generator waits, so its caller runs in the "
        "mode too. A decorator closes it at each yield.",
    ),
    Probe(
        "other tasks, at an await in one",
        _AS_MODES,
        _another_task,
        "All tasks of an event loop share its thread: while one awaits inside its block, the "
        "others run in that mode.",
    ),
    Probe(
        "the thread, after two overlapped",
        _AS_MODES,
        _after_an_overlap,
        "The second block found the mode of the first and puts that back at its end: the thread "
        "is stuck in a mode that no block is open for.",
    ),
    Probe(
        "asyncio.to_thread() in a block",
        in_all_modes("grad"),
        _to_thread,
        "The function runs in another thread, and a mode does not go along, though context "
        "variables do.",
    ),
)
