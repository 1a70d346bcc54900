"""GPT-2 in small, with a vocabulary of 32,000, on Python's documentation: its loss without storing logits."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from compare import compare

from fastssl.train.data import text

LENGTH = 128  # subwords of a sequence
VOCABULARY = 32_000  # at most


def train(options: argparse.Namespace) -> Iterator[float]:
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(options.seed)
    _, paragraphs = text.read(options.data or "python")
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(paragraphs, vocab_size=VOCABULARY, show_progress=False)
    tokens = torch.tensor([token for line in tokenizer.encode_batch(paragraphs) for token in line.ids])
    sequences = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)
    config = GPT2Config(
        vocab_size=tokenizer.get_vocab_size(), n_positions=LENGTH, n_embd=256, n_layer=4, n_head=4, use_cache=False,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(options.steps):
        batch = sequences[torch.randint(len(sequences), (options.batch_size,))]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


if __name__ == "__main__":
    compare("transformers", train, rounding=1e-3, batch_size=32, steps=20)
