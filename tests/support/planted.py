"""Models with one fault each, for the audit to find; every one is [n, 4] floats to [n, 4]."""

from __future__ import annotations

import itertools
from collections import deque

import torch
from torch import nn
from torch.nn import functional

from gradrun import modes


class Around(nn.Module):
    """A sound model around a module with a fault, which is `block.1`."""

    def __init__(self, fault: nn.Module) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(4, 4), fault)
        self.last = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.block(x))


class Weighted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))


class Tracks(Weighted):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():  # LINE Tracks
            return x * self.weight


class TracksByDecorator(Weighted):
    @torch.enable_grad()  # LINE TracksByDecorator
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


class TracksByGuard(Weighted):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with modes.grad_mode("grad"):  # LINE TracksByGuard
            return x * self.weight


class LeavesInference(Weighted):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode(False):  # LINE LeavesInference
            return x.clone() * self.weight


class TracksWithoutNeed(Weighted):
    """Tracks, and lets nothing of it out."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():  # LINE TracksWithoutNeed
            y = x * self.weight
        return y.detach()


class StopsGradients(Weighted):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():  # LINE StopsGradients
            return x * self.weight


class EntersInference(Weighted):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():  # LINE EntersInference
            factor = float((self.weight * 2).sum())
        return x * factor


class LeavesMode(Weighted):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch.set_grad_enabled(not torch.is_grad_enabled())  # LINE LeavesMode
        return x * self.weight


class StaysInTraining(nn.Dropout):
    def train(self, mode: bool = True) -> StaysInTraining:
        return super().train(True)


class NormStaysInTraining(nn.BatchNorm1d):
    def train(self, mode: bool = True) -> NormStaysInTraining:
        return super().train(True)


class InstanceNormStaysInTraining(nn.InstanceNorm2d):
    """Updates its running statistics with each sample, which is one channel of 2 x 2 pixels."""

    def __init__(self) -> None:
        super().__init__(1, track_running_stats=True)

    def train(self, mode: bool = True) -> InstanceNormStaysInTraining:
        return super().train(True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.view(-1, 1, 2, 2)).flatten(1)


class CallsTrain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.train()  # LINE CallsTrain
        return self.drop(x)


class DropsByFunction(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.dropout(x)  # always training


class ChangesInput(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mul_(2)


class FirstChangesInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = ChangesInput(), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x))


class MakesParameter(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not hasattr(self, "scale"):
            self.scale = nn.Parameter(torch.ones(4))
        return x * self.scale


class MakesBuffer(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not hasattr(self, "scale"):
            self.register_buffer("scale", torch.ones(4))
        return x * self.scale


class MakesCache(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cache: dict[str, torch.Tensor] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if "scale" not in self.cache:
            self.cache["scale"] = torch.ones(4)
        return x * self.cache["scale"]


class ListOfLosses(Weighted):
    def __init__(self) -> None:
        super().__init__()
        self.losses: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x * self.weight
        self.losses.append((y**2).mean())
        return y


class DequeOfOutputs(Weighted):
    def __init__(self) -> None:
        super().__init__()
        self.seen: deque[torch.Tensor] = deque()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x * self.weight
        self.seen.append(y)
        return y


KEPT_ELSEWHERE: list[torch.Tensor] = []


class GrowsElsewhere(Weighted):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x * self.weight
        KEPT_ELSEWHERE.append(y)
        return y


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x


class Learns(Weighted):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.weight.mul_(1.5)
        return x * self.weight


class AnswersByMode(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * (2 if torch.is_grad_enabled() else 3)


TICKS = itertools.count(1)


class Ticks(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * next(TICKS)


class NeedsGradients(Weighted):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (slope,) = torch.autograd.grad(self.weight.square().sum(), self.weight)
        return x * slope


class FailsAlways(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("in every mode")


class EntersByHand(Weighted):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        guard = torch.no_grad()
        guard.__enter__()
        y = x * self.weight
        guard.__exit__(None, None, None)
        return y


class BreaksGraph(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + 1
        torch._dynamo.graph_break()
        return x * 2


class SharesStorage(nn.Module):
    """Two modules save one storage: it counts once."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(x * 2)
        return self.one(y) + self.two(y)


class DropsBranch(nn.Module):
    """Saves for a branch that does not come to the output: the graph of it is gone."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch.sigmoid(self.two(x * 3))
        return self.one(x * 2)


def build(fault: str) -> nn.Module:
    """A model with the fault inside."""
    made = {"StaysInTraining": lambda: StaysInTraining(0.5)}.get(fault)
    if fault == "NormStaysInTraining":
        return Around(NormStaysInTraining(4))
    return Around(made() if made else globals()[fault]())


def alone(fault: str) -> nn.Module:
    """The faulty module itself."""
    model: nn.Module = globals()[fault]()
    return model


class InputGradients(nn.Module):
    """An energy and its forces: runs in grad alone, and marks its input on the way."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.requires_grad_()
        (force,) = torch.autograd.grad((x**2).sum(), x)
        return force


class KeepsCache(nn.Module):
    """A cache made at the first call and written at each, as for keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.cache: torch.Tensor | None = None
        self.at = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.cache is None:
            self.cache = torch.zeros(len(x), 8, 4)
        self.cache[:, self.at % 8] = x.detach()
        self.at += 1
        return x + self.cache.sum(1) * 0


class Sparse(Weighted):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("adjacency", torch.eye(4).to_sparse())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sparse.mm(self.adjacency, (x * self.weight).t()).t()


class FillsABoundedCache(Weighted):
    def __init__(self) -> None:
        super().__init__()
        self.seen: deque[torch.Tensor] = deque(maxlen=16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append((x * self.weight).detach().clone())
        return x


class RemakesBuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.mean = self.mean * 0.9 + x.detach().mean(0) * 0.1
        return x


class ReturnsParameter(Weighted):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x, self.weight


class Energy(Weighted):
    """Gradients on for a backward of its own, which is what it is for."""

    @torch.enable_grad()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.detach().clone().requires_grad_()
        (force,) = torch.autograd.grad((x**2 * self.weight).sum(), x)
        return force.detach()


class WithoutTensors(nn.Module):
    def forward(self, x: torch.Tensor) -> list[float]:
        return x.tolist()


class KeepsHiddenState(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(4, 4)
        self.hidden: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.hidden = self.cell(x, self.hidden)
        return self.hidden


class HasAScriptedPart(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        inner = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
        self.scripted = torch.jit.script(inner)  # type: ignore[no-untyped-call]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scripted: torch.Tensor = self.scripted(x)
        return scripted


class MasksPadding(nn.Module):
    """The mean over all positions, although two of four are padding."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = torch.tensor([False, False, True, True]).expand(len(x), 4)
        positions = x.unsqueeze(2) * torch.ones(4)
        out: torch.Tensor = self.encoder(positions, src_key_padding_mask=mask)
        return out.mean(1)
