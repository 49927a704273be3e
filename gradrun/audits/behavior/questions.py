"""The questions of `gradrun modes`: code, expected answer per mode, and its consequence."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from gradrun.core.grad_mode import GradMode


@dataclass(frozen=True)
class Question:
    """A question that running its code answers, in each mode or once."""

    topic: str
    text: str
    code: str
    """Assigns `answer`; without an assignment the answer is "works". See snippet.run_snippet."""
    expected: tuple[str, str, str] | str
    """The answers in grad, no_grad and inference_mode; one text if the mode does not matter."""
    why: str
    """The consequence for user code, in one or two sentences."""
    error: str | None = None
    """Part of the message of an error whose type name is the answer."""

    def cells(self) -> Iterator[tuple[GradMode | None, str]]:
        """Yield each mode with its expected answer; mode None if the mode does not matter."""
        if isinstance(self.expected, str):
            yield None, self.expected
        else:
            yield from zip(GradMode, self.expected, strict=True)


def _all(text: str) -> tuple[str, str, str]:
    return text, text, text


_MODES = (GradMode.GRAD.value, GradMode.NO_GRAD.value, GradMode.INFERENCE_MODE.value)

_Row = (
    tuple[str, str, tuple[str, str, str] | str, str]
    | tuple[str, str, tuple[str, str, str] | str, str, str]
)


def _topic(topic: str, rows: tuple[_Row, ...], setup: str = "") -> tuple[Question, ...]:
    """Build the questions of one topic; `setup` runs before the code of each row."""
    return tuple(
        Question(topic, text, f"{setup}\n{code}", expected, why, *error)
        for text, code, expected, why, *error in rows
    )


# --- one block and its tensors -----------------------------------------------------------------

_NO_GRAPH = "element 0 of tensors does not require grad and does not have a grad_fn"
_NO_VERSION = "Inference tensors do not track version counter"
_READ_ONLY = "Inplace update to inference tensor outside InferenceMode"
_NOT_SAVED = "Inference tensors cannot be saved for backward"

_RESULT = """
w = torch.ones(3, device=device, requires_grad=True)
with block():
    r = w * 2
    view = w.view(-1)
"""

_INSIDE = _topic(
    "Inside the block",
    (
        (
            "is_grad_enabled()",
            "with block(): answer = torch.is_grad_enabled()",
            ("yes", "no", "no"),
            "Both no-gradient modes clear the grad flag; code that reads only this flag cannot "
            "distinguish them.",
        ),
        (
            "is_inference_mode_enabled()",
            "with block(): answer = torch.is_inference_mode_enabled()",
            ("no", "no", "yes"),
            "Inference mode is a second flag that takes precedence over the grad flag.",
        ),
    ),
    "enter_other_mode()",
)

_MADE = _topic(
    "r = w * 2 inside (w needs grad)",
    (
        (
            "r.requires_grad",
            "answer = r.requires_grad",
            ("yes", "no", "no"),
            "Without gradients, operations on a weight are not recorded.",
        ),
        (
            "r.is_leaf",
            "answer = r.is_leaf",
            ("no", "yes", "yes"),
            "A tensor without a recorded operation is a leaf; it keeps no graph in memory.",
        ),
        (
            "r.is_inference()",
            "answer = r.is_inference()",
            ("no", "no", "yes"),
            "Tensors created in inference mode remain inference tensors outside the block.",
        ),
        (
            "r._version",
            "answer = r._version",
            ("0", "0", "RuntimeError"),
            "Inference tensors have no version counter. This saves time, but autograd cannot "
            "detect in-place changes of them and therefore rejects them.",
            _NO_VERSION,
        ),
        (
            "r.sum().backward()",
            "r.sum().backward()",
            ("works", "RuntimeError", "RuntimeError"),
            f'Without a recorded graph backward fails; torch reports "{_NO_GRAPH}".',
            _NO_GRAPH,
        ),
        (
            "w.view(-1).requires_grad",
            "answer = view.requires_grad",
            _all("yes"),
            "A view requires gradients if its base does, in every mode.",
        ),
        (
            "w.view(-1).is_inference()",
            "answer = view.is_inference()",
            _all("no"),
            "A view of a normal tensor is a normal tensor, even if created in inference mode.",
        ),
    ),
    _RESULT,
)

_AFTERWARDS = _topic(
    "r after the block",
    (
        (
            "r.add_(1)",
            "r.add_(1)",
            ("works", "works", "RuntimeError"),
            f"An inference tensor is read-only outside inference mode; torch reports "
            f'"{_READ_ONLY} is not allowed". Modify a clone() instead.',
            _READ_ONLY,
        ),
        (
            "r * w, which saves r",
            "(r * w).sum().backward()",
            ("works", "works", "RuntimeError"),
            f'Autograd can save only normal tensors for backward; torch reports "{_NOT_SAVED}". '
            "Use a clone(), or create the tensor under no_grad.",
            _NOT_SAVED,
        ),
        (
            "r + w, which saves nothing",
            "(r + w).sum().backward()",
            _all("works"),
            "Only tensors saved for backward must be normal. An addition saves nothing, so mixing "
            "may work in one expression and fail in the next.",
        ),
        (
            "r.clone()",
            "answer = kind(r.clone())",
            _all("normal"),
            "A clone made outside the block is a normal tensor.",
        ),
        (
            "copy.deepcopy(r.detach())",
            "answer = kind(copy.deepcopy(r.detach()))",
            _all("normal"),
            "A deep copy is a clone: copying a module outside the block makes its tensors normal.",
        ),
        (
            "pickle.loads(pickle.dumps(r))",
            "answer = kind(pickle.loads(pickle.dumps(r)))",
            _all("normal"),
            "Files and other processes transfer values, not modes: the loaded tensor is normal.",
        ),
        (
            "r.detach()",
            "answer = kind(r.detach())",
            ("normal", "normal", "inference"),
            "detach() shares memory with r, so the result is an inference tensor if r is one.",
        ),
        (
            "r.data",
            "answer = kind(r.data)",
            ("normal", "normal", "inference"),
            ".data shares memory with r, so the result is an inference tensor if r is one.",
        ),
        (
            "r.to(r.dtype)",
            "answer = kind(r.to(r.dtype))",
            ("normal", "normal", "inference"),
            "A .to() with nothing to convert returns r itself, so whether the result is normal "
            "depends on the dtype.",
        ),
    ),
    _RESULT,
)

_PARAMETER = _topic(
    "p = Parameter made inside",
    (
        (
            "p is",
            "answer = kind(p)",
            ("normal", "normal", "inference"),
            "Create modules, and everything they create lazily, outside inference mode: "
            "parameters created inside are inference tensors.",
        ),
        (
            "a training step on p afterwards",
            "(p * torch.ones(3, device=device)).sum().backward()\n"
            "torch.optim.SGD([p], lr=0.1).step()",
            ("works", "works", "RuntimeError"),
            "A parameter created in inference mode cannot be trained: the optimizer's in-place "
            "update fails.",
            _READ_ONLY,
        ),
    ),
    "with block(): p = nn.Parameter(torch.ones(3, device=device))",
)

# --- nesting, threads, tasks -------------------------------------------------------------------

_GRAD_FLAG = "answer = 'on' if torch.is_grad_enabled() else 'off'"


def _nested(outer: str, inner: str) -> str:
    return f"with torch.{outer}, torch.{inner}: {_GRAD_FLAG}"


_NESTING = _topic(
    "Blocks within blocks: gradients are",
    (
        (
            "enable_grad() inside no_grad()",
            _nested("no_grad()", "enable_grad()"),
            "on",
            "The innermost block applies: a callee can enable gradients that its caller disabled.",
        ),
        (
            "no_grad() inside enable_grad()",
            _nested("enable_grad()", "no_grad()"),
            "off",
            "The innermost block applies; the caller's mode is restored when it ends.",
        ),
        (
            "enable_grad() inside inference_mode(): the grad flag",
            _nested("inference_mode()", "enable_grad()"),
            "on",
            "The grad flag is on, but no operation is recorded (see the next row).",
        ),
        (
            "enable_grad() inside inference_mode(): operations recorded",
            "w = torch.ones(3, device=device, requires_grad=True)\n"
            "with torch.inference_mode(), torch.enable_grad():\n"
            "    answer = 'on' if (w * 2).requires_grad else 'off'",
            "off",
            "Inference mode takes precedence over the grad flag: a model that needs gradients "
            "internally cannot enable them there.",
        ),
        (
            "inference_mode(False) inside no_grad()",
            _nested("no_grad()", "inference_mode(False)"),
            "on",
            "With a false condition inference_mode(condition) enables gradients, even if the "
            "caller had disabled them.",
        ),
        (
            "set_grad_enabled(False) constructed and not entered",
            f"torch.set_grad_enabled(False)\n{_GRAD_FLAG}",
            "off",
            "It acts at construction, not on entry: creating one for later use changes the mode "
            "immediately.",
        ),
        (
            "set_grad_enabled(False) called in a function that has returned",
            f"def evaluate(): torch.set_grad_enabled(False)\nevaluate()\n{_GRAD_FLAG}",
            "off",
            "A plain call stays in effect after the function returns; only a block restores.",
        ),
        (
            "set_grad_enabled(False) called in a block that has ended",
            f"with torch.enable_grad(): torch.set_grad_enabled(False)\n{_GRAD_FLAG}",
            "on",
            "A block restores the mode it found on entry, whatever was called inside.",
        ),
        (
            "one torch.no_grad() entered again within itself, afterwards",
            f"guard = torch.no_grad()\nwith guard, guard: pass\n{_GRAD_FLAG}",
            "off",
            "torch's object stores a single state, and the second entry overwrites it: gradients "
            "stay disabled for the rest of the thread. Create a new object for each block.",
        ),
    ),
)

_THREADS = _topic(
    "Threads: mode of",
    (
        (
            "a thread started in a block",
            "seen = []\n"
            "with block():\n"
            "    thread = Thread(target=lambda: seen.append(current_mode()))\n"
            "    thread.start()\n"
            "    thread.join()\n"
            "answer = seen[0]",
            _all("grad"),
            "A mode belongs to a thread and is not inherited: each new thread starts with "
            "gradients enabled and needs its own block.",
        ),
        (
            "a pool made in a block",
            "with block(), ThreadPoolExecutor(1) as pool:\n"
            "    answer = pool.submit(current_mode).result()",
            _all("grad"),
            "Jobs of a pool do not run in the mode of the submitting thread; open the block in "
            "the job.",
        ),
        (
            "a job, after one that left it on",
            "def job():\n"
            "    enter_other_mode()\n"
            "    entered = block()\n"
            "    entered.__enter__()\n"
            "    return entered  # inference mode ends when its object is deleted\n"
            "with ThreadPoolExecutor(1) as pool:\n"
            "    future = pool.submit(job)\n"
            "    future.result()\n"
            "    answer = pool.submit(current_mode).result()\n"
            "    del future",
            _MODES,
            "A pool's thread keeps the mode that the last job left; the next job runs in it.",
        ),
    ),
)

_SUSPENDED = _topic(
    "Generators and asyncio: mode of",
    (
        (
            "a caller, at a yield in a block",
            "def batches():\n"
            "    with block():\n"
            "        yield\n"
            "enter_other_mode()\n"
            "generator = batches()\n"
            "next(generator)\n"
            "answer = current_mode()\n"
            "del generator  # end its mode in this thread, not in the garbage collector's",
            _MODES,
            "A block around a `yield` stays open while the generator is suspended, so its caller "
            "runs in that mode too. A decorator closes it at each yield.",
        ),
        (
            "other tasks, at an await in one",
            "async def waiting():\n"
            "    with block():\n"
            "        await asyncio.sleep(0)\n"
            "async def main():\n"
            "    enter_other_mode()\n"
            "    task = asyncio.create_task(waiting())\n"
            "    await asyncio.sleep(0)\n"
            "    seen = current_mode()\n"
            "    await task\n"
            "    return seen\n"
            "answer = asyncio.run(main())",
            _MODES,
            "All tasks of an event loop share its thread: while one awaits inside its block, the "
            "others run in that mode.",
        ),
        (
            "the thread, after two overlapped",
            "async def waiting(over):\n"
            "    with block():\n"
            "        await over.wait()\n"
            "async def main():\n"
            "    enter_other_mode()\n"
            "    events = asyncio.Event(), asyncio.Event()\n"
            "    tasks = [asyncio.create_task(waiting(over)) for over in events]\n"
            "    await asyncio.sleep(0)\n"
            "    for over, task in zip(events, tasks):\n"
            "        over.set()\n"
            "        await task\n"
            "    return current_mode()\n"
            "answer = asyncio.run(main())",
            _MODES,
            "The second block found the mode of the first and restores it when it ends: the "
            "thread stays in a mode although no block is open.",
        ),
        (
            "asyncio.to_thread() in a block",
            "async def main():\n"
            "    with block():\n"
            "        return await asyncio.to_thread(current_mode)\n"
            "answer = asyncio.run(main())",
            _all("grad"),
            "The function runs in another thread; unlike context variables, the mode is not "
            "passed to it.",
        ),
    ),
)

# --- torch's context managers as decorators ----------------------------------------------------

_FUNCTIONS = """
def generated():
    while True:
        yield current_mode()
async def awaited():
    await asyncio.sleep(0)
    return current_mode()
async def generated_async():
    while True:
        await asyncio.sleep(0)
        yield current_mode()
class Model:
    def __init__(self):
        self.created_in = current_mode()
    def method(self):
        return current_mode()
enter_other_mode()
decorate = block()
"""

_DECORATOR = _topic(
    "torch's decorator covers",
    (
        (
            "a function",
            "answer = decorate(current_mode)() == mode",
            _all("yes"),
            "The intended use of the decorators.",
        ),
        (
            "a generator function's steps",
            "steps = decorate(generated)()\nnext(steps)\nanswer = next(steps) == mode",
            _all("yes"),
            "torch enters the mode each time the generator is resumed.",
        ),
        (
            "its caller, between two steps",
            "steps = decorate(generated)()\nnext(steps)\nanswer = current_mode() == mode",
            _all("no"),
            "The mode is left at each yield, so the caller keeps its own.",
        ),
        (
            "an async def function",
            "answer = asyncio.run(decorate(awaited)()) == mode",
            _all("no"),
            "The call only creates the coroutine, and the mode ends before the body starts: an "
            "async endpoint under @torch.no_grad() records its whole graph. gradrun's guards "
            "cover it.",
        ),
        (
            "an async generator",
            "async def second():\n"
            "    steps = decorate(generated_async)()\n"
            "    await anext(steps)\n"
            "    return await anext(steps)\n"
            "answer = asyncio.run(second()) == mode",
            _all("no"),
            "The call only creates the generator, and the mode ends before the body starts. "
            "gradrun's guards cover it.",
        ),
        (
            "a function returning a generator",
            "answer = next(decorate(lambda: generated())()) == mode",
            _all("no"),
            "The body runs after the function has returned, outside the mode; decorate the "
            "generator function itself.",
        ),
        (
            "a class: its __init__",
            "answer = decorate(Model)().created_in == mode",
            _all("yes"),
            "Calling a decorated class runs its construction in the mode.",
        ),
        (
            "a class: its methods",
            "answer = decorate(Model)().method() == mode",
            _all("no"),
            "Only the construction runs in the mode, and the class becomes a function that cannot "
            "be subclassed; decorate the methods.",
        ),
        (
            "3, given by mistake",
            "block(3)\nanswer = 'no error'",
            _all("no error"),
            "torch treats any argument as a function and returns a wrapper: no_grad(flag) never "
            "changes the mode and raises no error.",
            "",
        ),
    ),
    _FUNCTIONS,
)

# --- torch.compile -----------------------------------------------------------------------------

_DYNAMO_LOSES_STATE = torch.__version__ < "2.14"
"""Dynamo of torch 2.6 and 2.13 loses the state of a guard that is entered by hand."""

_COMPILE = """
x = torch.ones(3, device=device)
w = torch.ones(3, device=device, requires_grad=True)
def graphs(body, guard, fullgraph):
    enter_other_mode()
    outside = current_mode()
    call, counter = compiled(body, fullgraph=fullgraph)
    inside, after = call(x, w)
    right = tensor_mode(inside) == mode and tensor_mode(after) == current_mode() == outside
    text = {0: 'eager', 1: '1 graph'}.get(counter.graphs, f'{counter.graphs} graphs')
    return text if right else f'{text}, wrong mode'
def body(x, w):
    with guard():
        inside = x * w
    return inside, x * w
make = block
def by_hand(x, w):
    entered = make()
    entered.__enter__()
    inside = x * w
    entered.__exit__(None, None, None)
    return inside, x * w
"""

_COMPILED = _topic(
    "torch.compile",
    (
        (
            "a block, fullgraph=True",
            "guard = block\nanswer = graphs(body, guard, True)",
            _all("1 graph"),
            "Dynamo recognizes torch's context managers and traces the change of mode.",
        ),
        (
            "a block of an own subclass",
            "guard = type('Own', (block,), {})\nanswer = graphs(body, guard, False)",
            _all("eager"),
            "Dynamo recognizes torch's objects by identity. A subclass works, but the function "
            "around it is silently not compiled.",
        ),
        (
            "a first call in a further mode",
            "call, counter = compiled(lambda x, w: (x * w, x + w))\n"
            "for other, enter in modes.items():\n"
            "    if other is not mode:\n"
            "        with enter(): call(x, w)\n"
            "before = counter.graphs\n"
            "for _ in range(2):\n"
            "    with block(): call(x, w)\n"
            "more = counter.graphs - before\n"
            "answer = '1 compile' if more == 1 else f'{more} compiles'",
            _all("1 compile"),
            "The mode is a guard of the compiled graph: warm up in the mode that you run in.",
        ),
        (
            "by hand, fullgraph=True",
            "call, _ = compiled(by_hand)\nenter_other_mode()\ncall(x, w)",
            _all("Unsupported"),
            "Dynamo does not support explicit calls of __enter__ and __exit__.",
            "",
        ),
        (
            "by hand: the mode afterwards",
            "call, _ = compiled(by_hand, fullgraph=False)\n"
            "enter_other_mode()\n"
            "call(x, w)\n"
            "answer = 'still on' if current_mode() == mode else 'off'",
            ("still on", "still on", "AttributeError") if _DYNAMO_LOSES_STATE else _all("off"),
            "Without fullgraph, dynamo up to torch 2.13 loses the state of the guard: the mode "
            "remains after the function returns, or the guard raises. From 2.14 on the function "
            "is not compiled. Use a `with` block.",
            "_inference_mode_context",
        ),
    ),
    _COMPILE,
)

QUESTIONS: tuple[Question, ...] = (
    *_INSIDE,
    *_MADE,
    *_AFTERWARDS,
    *_PARAMETER,
    *_NESTING,
    *_THREADS,
    *_SUSPENDED,
    *_DECORATOR,
    *_COMPILED,
)
"""In the order of the report."""
