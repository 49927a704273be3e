"""The modules of a sentence-transformers folder that follow its transformer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from gradrun.core.errors import ConfigError, first_line
from gradrun.core.pretrained import SentenceFolder, SentenceModule, pretrained_file

_KEY = "model.path"

_LEGACY_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""Keys of folders saved before version 5.4 -> mode, in the order of the joined vectors."""


class SentenceEmbedding(nn.Module):
    """Pooling, then the other modules of the folder: [n, tokens, width] to [n, dimensions].

    Half-precision tokens are converted to float32 first.
    """

    def __init__(self, pooling: Pooling, steps: list[nn.Module], words: list[str]) -> None:
        super().__init__()
        self.pooling, self.steps, self._words = pooling, nn.Sequential(*steps), words

    @property
    def description(self) -> str:
        """Such as "mean pooling, Dense to 256, normalized"."""
        skipped = self.pooling.skipped
        prompt = [f"without {skipped} prompt tokens"] if skipped else []
        return ", ".join([f"{' + '.join(self.pooling.modes)} pooling", *prompt, *self._words])

    @property
    def equivalent(self) -> tuple[str, ...]:
        """The output transforms with the same result; () if none have it."""
        pooling = _TRANSFORMS.get(self.pooling.modes)
        if pooling is None or self.pooling.skipped or self._words not in ([], ["normalized"]):
            return ()
        return (pooling, "normalize") if self._words else (pooling,)

    def skipping(self, prompt_tokens: int) -> SentenceEmbedding:
        """Return the embedding of texts that start with a prompt of so many tokens."""
        if self.pooling.include_prompt:
            return self
        pooling = Pooling(self.pooling.modes, include_prompt=False, skipped=prompt_tokens)
        return SentenceEmbedding(pooling, list(self.steps), self._words).eval()

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Embed texts, given the outputs of their tokens and the attention mask [n, tokens]."""
        half = tokens.dtype in {torch.float16, torch.bfloat16}
        embedding: torch.Tensor = self.steps(self.pooling(tokens.float() if half else tokens, mask))
        return embedding


class UnsupportedEmbedding(nn.Module):
    """Stands for the modules of a folder that cannot be built; calling it raises the error."""

    equivalent = ()

    def __init__(self, part: str, source: Path | str) -> None:
        super().__init__()
        self.description = f"unsupported: {part}"
        self._error = ConfigError(
            f"the sentence-transformers folder {source} has {part}, which sentence_embedding does "
            "not support; set output.transform, e.g. mean_pool, cls or none",
            "output.transform",
        )

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Raise the error."""
        raise self._error


class Pooling(nn.Module):
    """Joins one vector per mode; masked tokens and, if asked, the prompt's do not count."""

    def __init__(
        self, modes: tuple[str, ...], *, include_prompt: bool = True, skipped: int = 0
    ) -> None:
        super().__init__()
        self.modes, self.include_prompt, self.skipped = modes, include_prompt, skipped

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return the pooled vectors of tokens [n, tokens, width] and a mask [n, tokens]."""
        position = mask.cumsum(1) * mask  # 1 for the first token of the text, 0 for padding
        counted = (position > self.skipped).to(tokens.dtype).unsqueeze(-1)
        return torch.cat([_POOLINGS[mode](tokens, counted, position) for mode in self.modes], 1)


_Pool = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _mean(tokens: torch.Tensor, counted: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    return (tokens * counted).sum(1) / counted.sum(1).clamp(min=1e-9)


def _mean_sqrt(tokens: torch.Tensor, counted: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    return (tokens * counted).sum(1) / counted.sum(1).clamp(min=1e-9).sqrt()


def _weighted(tokens: torch.Tensor, counted: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    weights = counted * position.unsqueeze(-1)
    return (tokens * weights).sum(1) / weights.sum(1).clamp(min=1e-9)


def _max(tokens: torch.Tensor, counted: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    return tokens.masked_fill(counted == 0, -torch.inf).amax(1)


def _first(tokens: torch.Tensor, counted: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    return tokens[torch.arange(len(tokens), device=tokens.device), counted[..., 0].argmax(1)]


def _last(tokens: torch.Tensor, counted: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    return tokens[torch.arange(len(tokens), device=tokens.device), position.argmax(1)]


_POOLINGS: dict[str, _Pool] = {
    "cls": _first,
    "max": _max,
    "mean": _mean,
    "mean_sqrt_len_tokens": _mean_sqrt,
    "weightedmean": _weighted,
    "lasttoken": _last,
}


_TRANSFORMS: dict[tuple[str, ...], str] = {
    ("mean",): "mean_pool",
    ("cls",): "cls",
    ("lasttoken",): "last_token",
}
"""Pooling modes -> the output transform that does the same."""


def build_embedding(
    folder: SentenceFolder, source: Path | str, revision: str | None
) -> SentenceEmbedding | UnsupportedEmbedding:
    """Build the modules after the transformer, with their weights, in float32.

    Raises:
        ConfigError: the weights of a module are missing or do not fit.
    """
    modules = [module for module in folder.modules if module.kind != "Dropout"]
    if not modules or modules[0].kind != "Pooling":
        return UnsupportedEmbedding(modules[0].kind if modules else "no Pooling", source)
    modes = _modes(modules[0].settings)
    if unknown := [mode for mode in modes if mode not in _POOLINGS]:
        return UnsupportedEmbedding(f"pooling {unknown[0]!r}", source)
    words: list[str] = []
    steps: list[nn.Module] = []
    for module in modules[1:]:
        if module.kind not in {"Normalize", "Dense", "LayerNorm"} or _reads_tokens(module):
            return UnsupportedEmbedding(module.kind, source)
        try:
            step, word = _step(module, source, revision)
        except (KeyError, TypeError, RuntimeError, ValueError, OSError) as error:
            missing = f"its config.json has no {error}" if isinstance(error, KeyError) else ""
            text = f"{module.kind} in {module.path} of {source} cannot be loaded: "
            raise ConfigError(text + (missing or first_line(error)), _KEY) from error
        steps.append(step)
        words.append(word)
    include_prompt = modules[0].settings.get("include_prompt", True)
    pooling = Pooling(modes, include_prompt=include_prompt)
    return SentenceEmbedding(pooling, steps, words).eval()


def _modes(settings: dict[str, Any]) -> tuple[str, ...]:
    if given := settings.get("pooling_mode"):
        return (given,) if isinstance(given, str) else tuple(given)
    return tuple(mode for key, mode in _LEGACY_MODES.items() if settings.get(key)) or ("mean",)


def _reads_tokens(module: SentenceModule) -> bool:
    names = (module.settings.get(f"module_{end}_name") for end in ("input", "output"))
    return any(name not in {None, "sentence_embedding"} for name in names)


class _Normalize(nn.Module):
    def forward(self, embedding: torch.Tensor) -> torch.Tensor:
        return nn.functional.normalize(embedding, dim=-1)


class _Dense(nn.Module):
    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        sizes = settings["in_features"], settings["out_features"]
        self.linear = nn.Linear(*sizes, bias=settings.get("bias", True))
        self.activation = _activation(settings.get("activation_function", "torch.nn.Tanh"))
        if settings.get("use_residual"):
            same = sizes[0] == sizes[1]
            self.residual = nn.Identity() if same else nn.Linear(*sizes, bias=False)

    def forward(self, embedding: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.activation(self.linear(embedding))
        return out + self.residual(embedding) if hasattr(self, "residual") else out


def _activation(name: str) -> nn.Module:
    """The activation "torch.nn.modules.activation.Tanh"; other packages' code is not run."""
    kind = getattr(nn, name.rpartition(".")[2], None) if name.startswith("torch.nn.") else None
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise ValueError(f"the activation {name} is not a class of torch.nn")
    return kind()


def _step(
    module: SentenceModule, source: Path | str, revision: str | None
) -> tuple[nn.Module, str]:
    """Return a module after the pooling, with its weights, and its description."""
    if module.kind == "Normalize":
        return _Normalize(), "normalized"
    state = _weights(module, source, revision)
    if module.kind == "Dense":
        dense = _Dense(module.settings)
        dense.load_state_dict(state)
        return dense.float(), f"Dense to {dense.linear.out_features}"
    norm = nn.LayerNorm(module.settings["dimension"])
    norm.load_state_dict({name.removeprefix("norm."): tensor for name, tensor in state.items()})
    return norm.float(), "LayerNorm"


def _weights(
    module: SentenceModule, source: Path | str, revision: str | None
) -> dict[str, torch.Tensor]:
    if path := pretrained_file(source, f"{module.path}/model.safetensors", revision):
        return load_file(path)
    if path := pretrained_file(source, f"{module.path}/pytorch_model.bin", revision):
        state: dict[str, torch.Tensor] = torch.load(path, map_location="cpu", weights_only=True)
        return state
    raise ValueError("it has neither model.safetensors nor pytorch_model.bin")
