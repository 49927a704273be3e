"""What torch.compile makes of the modes: graphs counted by a backend that runs them as they are.

Knows the block under torch's dynamo; imports that when it is first asked, which takes a second.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from gradrun.audits.behavior.probe import (
    BLOCKS,
    Ask,
    Probe,
    Unavailable,
    block,
    current_mode,
    enter_other_mode,
    in_all_modes,
    outcome,
)
from gradrun.core.grad_mode import GradMode
from gradrun.modes import grad_mode

_FORGETS = torch.__version__ < "2.14"
"""Whether dynamo loses what a guard remembers that is entered by hand: 2.6 and 2.13 did."""

Body = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Two products of x and w: within the block, and after it."""


class _Counting:
    """A backend that runs graphs as they are and counts them."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.graphs += 1
        return graph.forward


def _compiled(body: Body, *, whole: bool = True) -> tuple[Body, _Counting]:
    """The body under torch.compile, as one graph or (not `whole`) in as many as it takes.

    Raises:
        Untried: torch compiles nothing here.
    """
    try:
        call, backend = _compile(lambda x, w: (x * w, x + w), whole=True)
        call(torch.ones(3), torch.ones(3))
    except Exception as error:  # whatever a torch without a working dynamo raises
        first = str(error).partition("\n")[0]
        raise Unavailable(f"torch.compile fails here: {type(error).__name__}: {first}") from error
    if not backend.graphs:
        raise Unavailable("torch.compile is turned off here")
    return _compile(body, whole=whole)


def _compile(body: Body, *, whole: bool) -> tuple[Body, _Counting]:
    # dynamo keeps what it compiled with the code object. On a copy, what it made for other modes
    # and earlier calls is out of the way; torch._dynamo.reset() would take the caller's with it.
    assert isinstance(body, FunctionType)
    code = body.__code__.replace()
    own = FunctionType(code, body.__globals__, body.__name__, None, body.__closure__)
    backend = _Counting()
    call: Body = torch.compile(own, backend=backend, fullgraph=whole)
    return call, backend


def _tensors(device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.ones(3, device=device), torch.ones(3, device=device, requires_grad=True)


# --- the questions -----------------------------------------------------------------------------


def _graphs(make: Callable[[GradMode], Callable[[], Any]], *, whole: bool) -> Ask:
    """How many graphs a block becomes, and whether what they compute is as it was asked for."""

    def ask(mode: GradMode, device: torch.device) -> str:
        guard = make(mode)

        def body(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
            with guard():
                within = x * w
            return within, x * w

        enter_other_mode(mode)
        outside = current_mode()
        call, backend = _compiled(body, whole=whole)
        within, after = call(*_tensors(device))
        right = _made_in(within) == mode and _made_in(after) == current_mode() == outside
        graphs = {0: "eager", 1: "1 graph"}.get(backend.graphs, f"{backend.graphs} graphs")
        return graphs if right else f"{graphs}, wrong mode"

    return ask


def _made_in(result: Tensor) -> GradMode:
    if result.is_inference():
        return GradMode.INFERENCE_MODE
    return GradMode.GRAD if result.requires_grad else GradMode.NO_GRAD


def _compiles_for_a_new_mode(mode: GradMode, device: torch.device) -> str:
    def body(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return x * w, x + w

    call, backend = _compiled(body)
    tensors = _tensors(device)
    for other in set(GradMode) - {mode}:
        with block(other):
            call(*tensors)
    before = backend.graphs
    for _ in range(2):
        with block(mode):
            call(*tensors)
    more = backend.graphs - before
    return "1 compile" if more == 1 else f"{more} compiles"


def _by_hand(mode: GradMode) -> Body:
    make = BLOCKS[mode]

    def body(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        guard = make()
        guard.__enter__()
        within = x * w
        guard.__exit__(None, None, None)
        return within, x * w

    return body


def _by_hand_in_one_graph(mode: GradMode, device: torch.device) -> str:
    call, _ = _compiled(_by_hand(mode))
    enter_other_mode(mode)
    return outcome(lambda: call(*_tensors(device)), "")  # every torch says it in other words


def _after_by_hand(mode: GradMode, device: torch.device) -> str:
    call, _ = _compiled(_by_hand(mode), whole=False)
    enter_other_mode(mode)

    def ran() -> str:
        call(*_tensors(device))
        return "still on" if current_mode() == mode else "off"

    return outcome(ran, "_inference_mode_context")


def _subclass(mode: GradMode) -> type[Any]:
    return type("Mine", (BLOCKS[mode],), {})


PROBES = (
    Probe(
        "a block, fullgraph=True",
        in_all_modes("1 graph"),
        _graphs(lambda mode: BLOCKS[mode], whole=True),
        "dynamo knows torch's own objects and puts the switch of mode into the graph.",
    ),
    Probe(
        "gradrun's guard, fullgraph=True",
        in_all_modes("1 graph"),
        _graphs(lambda mode: lambda: grad_mode(mode), whole=True),
        "gradrun's guards are written so that dynamo follows them, with fullgraph=True too.",
    ),
    Probe(
        "a block of an own subclass",
        in_all_modes("eager"),
        _graphs(_subclass, whole=False),
        "dynamo knows torch's four objects by identity. A subclass runs right, but the function "
        "around it is not compiled: speed is lost without a word.",
    ),
    Probe(
        "a first call in a further mode",
        in_all_modes("1 compile"),
        _compiles_for_a_new_mode,
        "The mode is part of what a compiled graph is guarded by: warm up in the mode you will "
        "run in.",
    ),
    Probe(
        "by hand, fullgraph=True",
        in_all_modes("Unsupported"),
        _by_hand_in_one_graph,
        "g.__enter__() and g.__exit__() are no `with` to dynamo, which refuses them.",
    ),
    Probe(
        "by hand: the mode afterwards",
        ("still on", "still on", "AttributeError") if _FORGETS else in_all_modes("off"),
        _after_by_hand,
        "Without fullgraph, dynamo up to torch 2.13 loses what the guard remembered: the mode "
        "stays when the function has returned, or the guard breaks. From 2.14 on the function is "
        "not compiled at all. Write a `with` block.",
    ),
)
