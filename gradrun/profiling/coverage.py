"""State which modules a profile could not time, and which batches it ran."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from gradrun.core.units import first_names, pluralize
from gradrun.inference.compilation import is_compiled
from gradrun.profiling.variant import ProfiledVariant
from gradrun.results.result import Statement, Warning

_MAX_LISTED = 3
_FUSED = nn.TransformerEncoderLayer
"""The module of torch that computes without calling its children where gradients are off."""

_STEADY_CALLS = 0.01


def limitations(variant: ProfiledVariant) -> Iterator[Warning]:
    """Yield the parts of a model whose modules cannot be timed."""
    model = variant.model
    if is_compiled(model):
        yield Warning(
            code="compiled",
            text="the model is compiled, and hooks would compile it again, so only the whole "
            "forward pass is timed; its operations are those without compilation. For times of "
            "modules, pass --set model.compile=false",
        )
    scripted = [m for m in model.modules() if isinstance(m, torch.jit.ScriptModule)]
    inner = [m for m in scripted if any(m in other.children() for other in scripted)]
    if inner:
        yield Warning(
            code="torchscript",
            text=f"TorchScript calls no hooks, so {pluralize(len(inner), 'module')} inside of "
            "TorchScript cannot be timed; their time is in the TorchScript module around them",
        )
    if any(isinstance(m, torch.fx.GraphModule) for m in model.modules()):
        yield Warning(
            code="graph",
            text="an exported model is a graph of operators without modules, so only the graph as "
            "a whole is timed; the table of operators shows its parts",
        )
    counts = [node.calls for node in variant.tree.nodes]
    if any(max(calls) - min(calls) > _STEADY_CALLS * max(calls) for calls in counts if any(calls)):
        yield Warning(
            code="calls_vary",
            text="the model does not call the same modules in every batch; calls and times are "
            "means over the batches of a round",
        )
    if variant.device.type != "cpu":
        yield Warning(
            code="synchronized",
            text=f"on {variant.device.type}, modules are timed with a synchronization before and "
            "after each call, and operators by their time on the host",
        )


def statements_of(variant: ProfiledVariant) -> Iterator[Statement]:
    """Yield the choices of a profile: its batches, and modules that are not called."""
    shapes = dict.fromkeys(" x ".join(map(str, batch.shape)) for batch in variant.batches)
    listed = first_names(list(shapes), _MAX_LISTED)
    noun = "batch" if len(variant.batches) == 1 else f"{len(variant.batches)} batches"
    yield Statement(topic="batches", text=f"every round runs the same {noun}, of shape {listed}")
    if not variant.hooks:
        return
    prefix = f"{variant.name}: " if variant.name else ""
    called = {node.module for node in variant.tree.nodes if any(node.calls)}
    paths = {module: path for path, module in variant.model.named_modules()}
    fused = [m for m in called if isinstance(m, _FUSED) and called.isdisjoint([*m.modules()][1:])]
    if fused:
        names = _list([paths[module] for module in fused if module in paths])
        yield Statement(
            topic="fused",
            text=f"{prefix}torch computes {names} by its fused implementation, which calls no "
            "child modules; their time and operations are in it. The hooks of the profile are "
            "global, which keeps this path",
        )
    hidden = {child for module in fused for child in module.modules()}
    idle = [
        module
        for module in variant.model.modules()
        if module not in called | hidden
        and any(True for _ in module.parameters(recurse=False))
        and not isinstance(module, torch.jit.ScriptModule)
    ]
    if idle:
        names = _list([paths[module] for module in idle])
        yield Statement(
            topic="not called",
            text=f"{prefix}{names}: not called as modules; if their parameters are used, the time "
            "is in the module that uses them",
        )


def parameter_count(module: nn.Module) -> int:
    """Return the elements of all parameters; shared ones count once."""
    return sum(p.numel() for p in module.parameters() if not nn.parameter.is_lazy(p))


def _list(names: list[str]) -> str:
    return first_names([name or "(the model)" for name in sorted(names)], _MAX_LISTED)
