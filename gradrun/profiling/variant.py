"""One variant of a profile: a loaded model with its batches and its call tree."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from gradrun.config.schema import RunConfig
from gradrun.core.cpu import thread_count
from gradrun.data import open_data
from gradrun.data.batch import Batch
from gradrun.inference.compilation import compile_model, is_compiled
from gradrun.inference.device import execution_context, seed_generators
from gradrun.inference.diagnosis import first_batch_errors
from gradrun.inference.module_state import preserve_module_state
from gradrun.inference.sampling import first_batches
from gradrun.inference.torchscript import compile_without_gradients
from gradrun.models import load_model
from gradrun.models.loaded import LoadedModel
from gradrun.profiling.call_tree import CallNode, CallTree, Clock
from gradrun.results import stats

_WARM_UP_SECONDS = 0.5


@dataclass
class ProfiledVariant:
    """A model with batches of different shapes, and the times of its rounds."""

    name: str
    config: RunConfig
    device: torch.device
    loaded: LoadedModel
    batches: Sequence[Batch]
    tree: CallTree
    hooks: bool
    """Whether modules can be timed: hooks would recompile a compiled model."""
    load_seconds: float = 0.0
    open_seconds: float = 0.0
    first_seconds: float = 0.0
    batch_seconds: float = 0.0
    """Per batch, at the end of the warm-up."""
    plain: list[float] = field(default_factory=list)
    """Seconds per batch of the rounds without hooks."""
    hooked: list[float] = field(default_factory=list)
    """Seconds per batch of the rounds with hooks."""

    @property
    def model(self) -> nn.Module:
        """The module, compiled if the config asks for it."""
        return self.loaded.module

    @property
    def threads(self) -> int:
        """The number of CPU threads."""
        return thread_count(self.config.run.threads)

    def execution_context(self) -> AbstractContextManager[None]:
        """Set the threads; return a context with the gradient mode and autocast of the config."""
        if torch.get_num_threads() != self.threads:
            torch.set_num_threads(self.threads)
        return execution_context(self.config.run, self.device)

    def run(self, batch: Batch) -> Any:
        """Return the model's output for a batch."""
        return self.model(*batch.args, **batch.kwargs)

    def running_node(self) -> AbstractContextManager[Callable[[], CallNode | None]]:
        """Return a context with a function for the node of the module that is running."""
        if self.hooks:
            return self.tree.tracked(lambda _: None, lambda *_: None)
        return nullcontext(lambda: None)

    @property
    def largest(self) -> Batch:
        """A copy of the batch with the most elements."""
        return max(self.batches, key=lambda batch: batch.elements).map(torch.clone)

    def run_first_batch(self) -> None:
        """Run the first batch.

        Raises:
            ConfigError: the model failed.
        """
        first = self.batches[0].map(torch.clone)
        with self.execution_context(), preserve_module_state(self.model):
            began = time.perf_counter()
            with first_batch_errors(self.model, first, self.config.run.mode):
                self.run(first)
            self.first_seconds = time.perf_counter() - began

    def warm_up(self) -> None:
        """Run batches until their time is steady."""
        seconds: list[float] = []
        began = time.perf_counter()
        with self.execution_context(), preserve_module_state(self.model):
            while not stats.is_steady(seconds) and time.perf_counter() - began < _WARM_UP_SECONDS:
                started = time.perf_counter()
                for batch in self.batches:
                    self.run(batch)
                seconds.append((time.perf_counter() - started) / len(self.batches))
        self.batch_seconds = min(seconds, default=self.first_seconds)

    def time_block(self, repeats: int, now: Clock, *, hooks: bool) -> None:
        """Time passes over the batches, and store the seconds per batch of the median pass."""
        passes: list[tuple[int, list[tuple[int, int]]]] = []
        """Nanoseconds of each pass, and those of each node with its calls."""
        with self.execution_context(), ExitStack() as stack:
            if hooks and self.hooks:
                stack.enter_context(self.tree.timed(now))
            for _ in range(repeats):
                nanoseconds = 0
                for args, kwargs, *_ in self.batches:
                    began = now()
                    output = self.model(*args, **kwargs)
                    nanoseconds += now() - began
                    del output  # releasing a graph takes time that belongs to no module
                if hooks and not self.hooks:
                    root = self.tree.enter(self.model, None)
                    root.nanoseconds, root.count = nanoseconds, len(self.batches)
                passes.append((max(nanoseconds, 1), self.tree.take()))
        nanoseconds, taken = sorted(passes, key=lambda one: one[0])[len(passes) // 2]
        seconds = nanoseconds * 1e-9 / len(self.batches)
        if not hooks:
            self.plain.append(seconds)
            return
        self.tree.end_round(len(self.hooked), len(self.batches), taken)
        self.hooked.append(seconds)


def load_variant(
    name: str,
    config: RunConfig,
    device: torch.device,
    earlier: Sequence[ProfiledVariant],
    *,
    trust_code: bool,
) -> ProfiledVariant:
    """Load the model and batches of a config, shared with an equal earlier variant."""
    key = (config.run.seed, config.model)
    alike = [v for v in earlier if (v.config.run.seed, v.config.model) == key]
    if config.model.compile:  # for the shapes of its batches
        alike = [v for v in alike if v.config.data == config.data]
    twin = alike[0] if alike else None
    began = time.perf_counter()
    if twin:
        model = twin.loaded
    else:
        seed_generators(config.run.seed, device)
        model = load_model(config.model, device, data=config.data, trust_code=trust_code)
    loaded = time.perf_counter()
    if twin and twin.config.data == config.data:
        batches = twin.batches
    else:
        data = open_data(
            config.data,
            seed=config.run.seed,
            model=config.model,
            model_classes=model.classes,
            device=device,
            trust_code=trust_code,
        )
        batches = of_different_shapes(first_batches(config, device, data))
        if not twin:
            compile_without_gradients(model.module, batches[0])
            model = compile_model(model, config.model.compile, data, device)
    opened = time.perf_counter()
    return ProfiledVariant(
        name=name,
        config=config,
        device=device,
        loaded=model,
        batches=batches,
        tree=CallTree(model.module),
        hooks=not is_compiled(model.module),
        load_seconds=loaded - began,
        open_seconds=opened - loaded,
    )


def of_different_shapes(batches: Sequence[Batch]) -> list[Batch]:
    """Return the first batch of each combination of shapes: others take the same time."""
    found: dict[tuple[torch.Size, ...], Batch] = {}
    for batch in batches:
        found.setdefault(tuple(tensor.shape for tensor in batch.tensors()), batch)
    return list(found.values())
