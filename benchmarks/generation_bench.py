"""Measure tokens per second and the times of tokens by gradrun against a loop by hand.

By hand, the first token is timed by generating one token alone. Every batch runs in both ways.
The medians of the ratios are printed. Limit: 3 %.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from gradrun.config.load import load_config
from gradrun.data import open_data
from gradrun.models import load_model
from gradrun.models.generation import take_times

LIMIT = 0.03
ROUNDS = 10
PROMPTS, BATCH, NEW = 48, 8, 16


def main() -> int:
    """Run the benchmark; return 1 if a median is beyond the limit."""
    ratios: dict[str, list[float]] = {"tokens/s": [], "first token": [], "later tokens": []}
    with tempfile.TemporaryDirectory() as temporary, torch.inference_mode():
        folder = Path(temporary)
        save_model(folder / "gpt")
        prompts = [f"prompt {i:03} of a few words\n" for i in range(PROMPTS)]
        (folder / "prompts.txt").write_text("".join(prompts))
        config = load_config(
            {
                "model": {
                    "source": "huggingface",
                    "path": str(folder / "gpt"),
                    "auto_class": "AutoModelForCausalLM",
                    "generate": {"max_new_tokens": NEW, "min_new_tokens": NEW},
                },
                "data": {
                    "source": "text",
                    "path": str(folder / "prompts.txt"),
                    "batch_size": BATCH,
                },
                "output": {"path": str(folder / "run"), "format": "jsonl"},
            }
        ).config
        generator = load_model(config.model, torch.device("cpu"), data=config.data).module
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder / "gpt").eval()
        data = open_data(config.data, seed=0, model=config.model)
        for number in range(ROUNDS):
            for batch in data.batches():
                inputs = {k: v for k, v in batch.kwargs.items() if k != "sample_numbers"}
                expected = by_hand(model, inputs)
                generator(**batch.kwargs)
                texts = take_times(generator)
                assert texts is not None
                found = {
                    "tokens/s": texts.tokens_per_second,
                    "first token": texts.first_token_seconds[0],
                    "later tokens": texts.seconds_per_later_token[0],
                }
                if number:  # the first round is the warm-up
                    for name, values in ratios.items():
                        values.append(found[name] / expected[name])
    for name, values in ratios.items():
        low, high = sorted(values)[len(values) // 10], sorted(values)[-(len(values) // 10)]
        print(f"{name}: {median(values):.3f} ({low:.3f} to {high:.3f}) of by hand, limit {LIMIT}")
    return int(any(abs(median(values) - 1) > LIMIT for values in ratios.values()))


def by_hand(model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, float]:
    """Time generate() of transformers for all tokens, and for the first alone."""
    seconds = []
    for tokens in (1, NEW):
        began = time.perf_counter()
        model.generate(
            **inputs,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            pad_token_id=256,
        )
        seconds.append(time.perf_counter() - began)
    first, total = seconds
    later = (total - first) / (NEW - 1)
    return {"tokens/s": BATCH * NEW / total, "first token": first, "later tokens": later}


def save_model(folder: Path) -> None:
    """Save a small GPT-2 with random weights and a tokenizer of bytes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(letters)} | {"<end>": 256}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<end>", pad_token="<end>", model_max_length=256
    ).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"vocab_size": 257, "n_positions": 256, "n_embd": 384, "n_layer": 6, "n_head": 6}
    config = transformers.GPT2Config(**sizes, eos_token_id=256, bos_token_id=256)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)


if __name__ == "__main__":
    sys.exit(main())
