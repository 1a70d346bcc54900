"""Shared by methods that learn from images and their names: CLIP, SigLIP, CoCa."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl.distributed import ProcessGroup
from fastssl.functional import topk_similarity
from fastssl.train.data import pairs
from fastssl.train.data.augment import MILD, to_float
from fastssl.train.data.draw import Draw
from fastssl.train.data.pairs import Pairs
from fastssl.train.data.text import VOCABULARY, tokenize
from fastssl.train.device import move
from fastssl.train.method import Method
from fastssl.train.networks.models import BagOfWords, image_encoder

# How captions might name a class. The mean of these texts' vectors stands for the class.
TEMPLATES = (
    "{}",
    "a picture of {}",
    "a drawing of {}",
    "a small picture of {}",
    "an emoji of {}",
    "an icon of {}",
    "a symbol for {}",
)


class ImageText(Method):
    """An encoder for images and one for texts, each with a linear map into one space. A subclass has the `loss`.

    Args:
        temperature: divides the similarities at first; it is learned, as logit_scale.
        features: dimensions of the space that both share.
    """

    left_out = 0.2  # of a text's words, at random
    coldest = 0.0  # temperature

    def __init__(
        self, temperature: float, features: int = 128, encoders: tuple[nn.Module, nn.Module] | None = None
    ) -> None:
        if temperature < self.coldest:
            raise ValueError(f"temperature must be at least {self.coldest}, got {temperature}")
        super().__init__()
        self.encoder, self.text_encoder = encoders or (image_encoder(), BagOfWords(VOCABULARY))
        self.image_projection = nn.Linear(self.encoder.features, features, bias=False)
        self.text_projection = nn.Linear(self.text_encoder.features, features, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(1 / temperature).log())

    augmentations = (replace(MILD, saturation=0, grey=0),)  # names have colours

    @staticmethod
    def load(directory: str | os.PathLike[str] | None) -> Pairs:
        return pairs.load(directory)

    def views(self, batch: tuple[Tensor, Tensor], draw: Draw) -> tuple[Tensor, ...]:
        """(B, 3, H, W) uint8 images, and tokens -> a random view of each image, its text without some words."""
        images, tokens = batch
        draw = Draw.of(draw, tokens)
        stay = draw.uniform(tokens.shape[1]) >= self.left_out
        return *super().views(images, draw), tokens * stay

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
        """The model's inputs -> unit vectors (B, features) of images and of texts; a subclass may add to them."""
        return F.normalize(self.image_projection(self.encoder(images)), dim=1), self.text(tokens)

    def text(self, tokens: Tensor) -> Tensor:
        """(B, L) tokens -> (B, features) unit vectors."""
        return F.normalize(self.text_projection(self.text_encoder(tokens)), dim=1)

    @torch.no_grad()
    def after_step(self, *embeddings: Tensor, group: ProcessGroup | None = None) -> None:
        if self.coldest:
            self.logit_scale.clamp_(max=-math.log(self.coldest))

    @torch.no_grad()
    def evaluate(self, dataset: Pairs) -> dict[str, float]:
        """Zero-shot retrieval: shares of test images whose own text is among the nearest of all texts of the test.

        If they have classes, also zero-shot classification: the shares whose class is among the nearest, and beside
        them the share of the most frequent class, which always guessing that class would reach.
        """
        training = self.training
        self.eval()
        images, tokens = dataset.test.tensors
        vectors = [
            self(to_float(move(image, self.device)), move(text, self.device))[:2]
            for image, text in zip(images.split(1024), tokens.split(1024), strict=True)
        ]
        classes = self.class_embeddings(dataset.classes, dataset.encode) if dataset.classes else None
        self.train(training)
        image, text = (torch.cat(parts) for parts in zip(*vectors, strict=True))
        _, nearest = topk_similarity(image, text, min(10, len(text)))
        own = nearest.cpu() == torch.arange(len(image)).unsqueeze(1)
        found = {f"recall@{k} of {len(text)} texts": own[:, :k].any(1).float().mean().item() for k in (1, 10)}
        labels = dataset.test_labels[dataset.test_labels >= 0]
        if len(labels):
            tested = move(dataset.test_labels >= 0, self.device)
            _, nearest = topk_similarity(image[tested], classes, min(5, len(classes)))
            right = nearest.cpu() == labels.unsqueeze(1)
            task = f"of {len(classes)} classes ({labels.bincount().max() / len(labels):.1%} are of one)"
            found |= {f"top-{k} {task}": right[:, :k].any(1).float().mean().item() for k in (1, 5) if k < len(classes)}
        return found

    def class_embeddings(self, classes: Sequence[str], encode: Callable[[Sequence[str]], Tensor] = tokenize) -> Tensor:
        """(len(classes), features) unit vectors: each class's mean vector over all TEMPLATES with its name.

        CLIP does so (arXiv:2103.00020, section 3.1.4), with a text encoder that reads sentences. For bags of words a
        template's words are only a shift, the same for all classes, and they dilute the name.
        """
        tokens = encode([template.format(name) for name in classes for template in TEMPLATES])
        text = self.text(move(tokens, self.device))
        return F.normalize(text.unflatten(0, (len(classes), -1)).mean(1), dim=1)
