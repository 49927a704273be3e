"""Train a toy language model to answer the questions of configs/questions.jsonl; write its folder.

It knows these answers by heart and nothing else, so that configs/generation.yaml needs no download.
Runs on the same machine write the same bytes; another processor may round differently.
"""

import importlib
import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

transformers: Any = importlib.import_module("transformers")  # not typed throughout

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
QUESTIONS = CONFIGS / "questions.jsonl"
FOLDER = CONFIGS / "answers"

ANSWERS = {
    "rain": "Warm air rises and cools, and its water condenses into drops.",
    "capital": "Oslo.",
    "sum": "17 plus 25 is 42.",
    "poem": "The sea lies grey at break of day,\nand carries all our boats away.",
    "synonym": "Fast.",
    "bread": "Flour, water, salt and yeast.",
    "moon": "About 384,000 kilometers.",
    "translate": "Bonjour.",
}
"""Id of a question -> its answer."""

TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:\n{% endif %}"
)
END, PAD = "<end>", "<pad>"
SEED, STEPS, RATE = 0, 300, 0.01
TOKENS, POSITIONS = 384, 80


def build_tokenizer(texts: list[str]) -> Any:
    """Return a tokenizer of bytes and of the words of the texts, with a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENS,
        special_tokens=[PAD, END],
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        model_max_length=POSITIONS,
        chat_template=TEMPLATE,
    )


def train(tokenizer: Any, prompts: list[str], answers: list[str]) -> Any:
    """Return a small GPT-2 that continues each prompt with its answer."""
    ends = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.eos_token_id}
    sizes = {"n_positions": POSITIONS, "n_embd": 32, "n_layer": 2, "n_head": 2}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **ends, **sizes, **dropout
    )
    model = transformers.GPT2LMHeadModel(config).train()
    texts = [f"{prompt}{answer}{END}" for prompt, answer in zip(prompts, answers, strict=True)]
    batch = tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for row, prompt in zip(labels, prompts, strict=True):
        row[: len(tokenizer(prompt)["input_ids"])] = -100
    optimizer = torch.optim.AdamW(model.parameters(), RATE)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = model(**batch, labels=labels).loss
        torch.autograd.backward(loss)
        optimizer.step()
    print(f"loss per token of the answers: {loss:.4f}")
    return model.eval()


def main() -> None:
    """Train, print the loss per token of the answers, and write the folder."""
    torch.manual_seed(SEED)
    torch.set_num_threads(1)  # the order of sums, and so rounding, depends on the threads
    rows = [json.loads(line) for line in QUESTIONS.read_text().splitlines()]
    answers = [ANSWERS[row["id"]] for row in rows]
    tokenizer = build_tokenizer([f"{row['question']} user: assistant:" for row in rows] + answers)
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": row["question"]}],
            tokenize=False,
            add_generation_prompt=True,
        )
        for row in rows
    ]
    model = train(tokenizer, prompts, answers)
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    tokenizer.save_pretrained(FOLDER)
    model.save_pretrained(FOLDER)


if __name__ == "__main__":
    main()
