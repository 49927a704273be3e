"""Run models through torch.compile: which batches are compiled, and the errors of the compiler."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from gradrun.config.model import CompileSection
from gradrun.core.errors import ConfigError, first_line
from gradrun.core.suggest import did_you_mean
from gradrun.data.source import BatchSource
from gradrun.models.loaded import LoadedModel
from gradrun.output.transforms import iter_tensors
from gradrun.results.result import Statement

_NO_COMPILER = "InvalidCxxCompiler"
"""torch's error for a missing C++ compiler; other errors wrap it."""

_LIMIT_HIT = "hit config."
"""Part of the message that torch logs before it runs other shapes without compiling them."""


class CompiledModel(nn.Module):
    """A model as a program of torch.compile, and without it for batches of another size.

    A program is compiled for one number of samples, unless `dynamic`. The few batches that have
    another one, such as a shorter last batch, cost less to run uncompiled than to compile for.
    """

    def __init__(
        self,
        module: nn.Module,
        section: CompileSection,
        batch_size: int,
        *,
        varying: bool,
        cuda: bool = False,
    ) -> None:
        """Prepare to compile a module; its first forward compiles it.

        Args:
            batch_size: samples per batch.
            varying: whether batches of this size differ in shape.
            cuda: whether the model is on a CUDA device.

        Raises:
            ConfigError: the backend is unknown.
        """
        super().__init__()
        _check_backend(section.backend)
        self.dynamic = varying if section.dynamic is None else section.dynamic
        self.backend, self.batch_size = section.backend, batch_size
        graphs = bool(section.cuda_graphs) or section.mode == "max-autotune"
        self._cuda_graphs = cuda and graphs
        options: dict[str, Any] = {"mode": section.mode}
        if section.freezing:  # torch accepts mode or options
            options = {"options": _inductor_options(section.mode) | {"freezing": True}}
        self.compiled: Any = torch.compile(
            module, backend=section.backend, dynamic=self.dynamic, **options
        )

    @property
    def eager(self) -> nn.Module:
        """The model without torch.compile."""
        module: nn.Module = self.compiled._orig_mod
        return module

    def compiles(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Return whether these inputs run compiled; torch compiles again for a single sample."""
        samples = _samples(args, kwargs)
        return samples == self.batch_size or (self.dynamic and samples != 1)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the program, or the module for another number of samples than `batch_size`."""
        if not self.compiles(args, kwargs):
            return self.eager(*args, **kwargs)
        if torch.is_inference_mode_enabled():
            args = tuple(map(_for_inference, args))
            kwargs = {name: _for_inference(value) for name, value in kwargs.items()}
        if not self._cuda_graphs:
            return self.compiled(*args, **kwargs)
        # A forward in mode grad without a backward is complete too.
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        # The graph writes its outputs to the same memory in the next forward.
        return tree_map(_own, self.compiled(*args, **kwargs))


def compile_model(
    model: LoadedModel, section: CompileSection | None, data: BatchSource, device: torch.device
) -> LoadedModel:
    """Return the model with a CompiledModel as its module, if the config has the section.

    Raises:
        ConfigError: the backend is unknown, or CUDA graphs are not possible.
    """
    if section is None:
        return model
    if section.cuda_graphs:
        _check_cuda_graphs(section.cuda_graphs, device, varying=data.varying)
    compiled = CompiledModel(
        model.module,
        section,
        min(data.batch_size, data.samples or data.batch_size),
        varying=data.varying,
        cuda=device.type == "cuda",
    )
    text = "one program for all shapes; a single sample runs eagerly"
    if not compiled.dynamic:
        text = f"batches of {compiled.batch_size}; others, such as a shorter last one, run eagerly"
    note = Statement(topic="compile", text=f"{section.backend}, {text}")
    return model.replace(module=compiled, notes=(*model.notes, note))


def eager_model(model: nn.Module) -> nn.Module:
    """Return the model without torch.compile around it; inside of it, there may be more."""
    if isinstance(model, CompiledModel):
        return model.eager
    module: nn.Module = getattr(model, "_orig_mod", model)
    return module


def is_compiled(model: nn.Module) -> bool:
    """Return whether the model, or a module in it, runs through torch.compile."""
    return any(
        type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None
        for module in model.modules()
    )


def without_compilation() -> AbstractContextManager[Any]:
    """Return a context in which compiled models run eagerly: other shapes would recompile."""
    loaded = "torch._dynamo" in sys.modules
    return torch.compiler.set_stance("force_eager") if loaded else nullcontext()


def compiled_graphs() -> int:
    """Return the number of graphs that torch.compile has compiled in this process."""
    dynamo = sys.modules.get("torch._dynamo.utils")  # imported by the first compilation
    return int(dynamo.counters["stats"]["unique_graphs"]) if dynamo else 0


def compile_error(error: BaseException, backend: str) -> ConfigError:
    """Return the error to raise if a model runs, but fails once it is compiled."""
    if any(_NO_COMPILER in f"{type(e).__name__} {e}" for e in _chain(error)):
        text = (
            "torch.compile needs a C++ compiler and finds none; install g++ or clang++, set the "
            "environment variable CXX to one, or set model.compile: false"
        )
        return ConfigError(text, "model.compile")
    error = getattr(error, "inner_exception", error)
    return ConfigError(
        f"the model runs, but torch.compile with the backend {backend} fails: "
        f"{type(error).__name__}: {first_line(error)}; set model.compile: false, or another "
        "backend",
        "model.compile",
    )


def check_dtypes(output: Any, eager_output: Any) -> None:
    """Check that outputs have the same dtypes, because some batches run without torch.compile.

    Raises:
        ConfigError: they differ.
    """
    pairs = zip(iter_tensors(output), iter_tensors(eager_output), strict=False)
    for (name, compiled), (_, eager) in pairs:
        if compiled.dtype != eager.dtype:
            raise ConfigError(
                f"output {name} is {_name(compiled.dtype)} if it is compiled and "
                f"{_name(eager.dtype)} if not; if this is caused by run.autocast, use model.dtype "
                "instead, or set model.compile: false",
                "model.compile",
            )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def runs_in_full_precision(output: Any, *, reduced: Any, full: Any) -> bool:
    """Return whether an output is nearer to that of full precision than to that of autocast.

    False if these two are the same.
    """
    far, near = _distance(output, reduced), _distance(output, full)
    return near < far / 8


def _distance(one: Any, other: Any) -> float:
    """Return the greatest difference of the floating-point tensors of two outputs."""
    pairs = zip(iter_tensors(one), iter_tensors(other), strict=False)
    differences = (
        (a.detach().double() - b.detach().double()).abs().max().item()
        for (_, a), (_, b) in pairs
        if a.is_floating_point() and a.numel()
    )
    return max(differences, default=0.0)


@contextmanager
def recompilation_limit_hits() -> Iterator[list[str]]:
    """Yield a list that receives torch's messages about its limit of recompilations.

    They are not logged.
    """
    hits: list[str] = []

    def collect(record: logging.LogRecord) -> bool:
        if is_hit := _LIMIT_HIT in str(record.msg):
            hits.append(record.getMessage())
        return not is_hit

    logger = logging.getLogger("torch._dynamo.convert_frame")
    logger.addFilter(collect)
    try:
        yield hits
    finally:
        logger.removeFilter(collect)


def _check_backend(name: str) -> None:
    registered = torch.compiler.list_backends(exclude_tags=())
    if name not in registered:
        usual = torch.compiler.list_backends()  # without those for debugging
        hint = f"{did_you_mean(name, registered)} (registered: {', '.join(usual)})".strip()
        raise ConfigError(f"unknown backend {name!r}; {hint}", "model.compile.backend")


def _check_cuda_graphs(option: str, device: torch.device, *, varying: bool) -> None:
    name, _, value = option.partition(": ")
    if device.type != "cuda":
        raise ConfigError(
            f"{value} uses CUDA graphs and needs a CUDA device, and the model runs on {device}; "
            "allowed here: backend: inductor, with mode: default, max-autotune or "
            "max-autotune-no-cudagraphs",
            f"model.compile.{name}",
        )
    if varying:
        raise ConfigError(
            f"{value} needs batches of one shape for its CUDA graph, and batches of these texts "
            "differ in length; set data.padding: max_length, or use mode: default",
            f"model.compile.{name}",
        )


def _own(value: Any) -> Any:
    """Copy the tensors of an output; torch splits other containers than dataclasses itself."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {item.name: getattr(value, item.name) for item in dataclasses.fields(value)}
        return dataclasses.replace(value, **tree_map(_own, fields))
    return value


def _inductor_options(mode: str | None) -> dict[str, Any]:
    from torch import _inductor  # imports the compiler stack

    options: dict[str, Any] = _inductor.list_mode_options(mode or "default")
    return options


def _for_inference(value: Any) -> Any:
    """Copy a tensor from outside of inference_mode, such as of a thread that reads ahead.

    torch compiles a model again for inputs of the other kind.
    """
    copied = isinstance(value, torch.Tensor) and not value.is_inference()
    return value.clone() if copied else value


def _samples(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | None:
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor) and value.dim():
            return value.shape[0]
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and those that it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
