"""CoCa: contrastive captioners are image-text foundation models (arXiv:2205.01917)."""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl.distributed import ProcessGroup
from fastssl.functional import clip_loss
from fastssl.train.data import captions
from fastssl.train.data.augment import to_float
from fastssl.train.data.captions import END, LENGTH, PADDING, VOCABULARY, Captions
from fastssl.train.device import move
from fastssl.train.image_text import ImageText
from fastssl.train.language import cross_entropy, log_frequencies, marks, write
from fastssl.train.networks.transformer import Attention, Decoder, Transformer
from fastssl.train.networks.vit import ViT, patch_size_of


class CoCa(ImageText):
    """CLIP, and an image's caption is to be written. One half of the decoder reads the caption alone, and its last
    token stands for it in CLIP's loss; the other half also reads the image's patches, and predicts each next subword.
    What one learned query finds among the patches stands for the image.

    Args:
        temperature: of CLIP's softmax at first; it is learned. Never below 0.01.
        caption_weight: of the captions' cross-entropy, where CLIP's loss has 1.
        depth: layers of the image's encoder, and of both halves of the decoder together.
        size, colours: of the images.
    """

    learning_rate = 1e-3
    weight_decay = 0.05
    left_out = 0.0
    coldest = 0.01

    def __init__(
        self,
        *,
        temperature: float = 0.07,
        caption_weight: float = 2.0,
        depth: int = 4,
        size: int = 32,
        colours: int = 3,
        vocabulary: int = VOCABULARY,
    ) -> None:
        half, encoder = max(1, depth // 2), ViT(size, patch_size_of(size), colours, depth=depth)
        super().__init__(
            temperature, encoders=(encoder, Transformer(vocabulary, LENGTH, encoder.features, half, causal=True))
        )
        self.query, self.pool = nn.Parameter(0.02 * torch.randn(encoder.features)), Attention(encoder.features, 4)
        self.decoder, self.bias = Decoder(encoder.features, half), nn.Parameter(torch.zeros(vocabulary))
        self.caption_weight = caption_weight

    @staticmethod
    def load(directory: str | os.PathLike[str] | None) -> Captions:
        return captions.load(directory)

    @torch.no_grad()
    def prepare(self, dataset: Captions) -> None:
        self.bias.copy_(self.unigram(dataset))

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
        """Unit vectors (B, features) of images and of texts; features (B, L - 1, features) of all subwords but the
        last, and what follows each."""
        patches, words = self.encoder(images), self.text_encoder(tokens)
        image = self.image_projection(self.pool(self.query.expand(len(images), 1, -1), patches).squeeze(1))
        features = self.decoder(words[:, :-1], patches)
        return F.normalize(image, dim=1), self.of_text(words, tokens), features, tokens[:, 1:]

    def text(self, tokens: Tensor) -> Tensor:
        return self.of_text(self.text_encoder(tokens), tokens)

    def of_text(self, words: Tensor, tokens: Tensor) -> Tensor:
        """Unit vectors of the last subwords that are not padding."""
        last = (tokens != PADDING).sum(1, keepdim=True) - 1
        return F.normalize(self.text_projection(words.take_along_dim(last[:, :, None], 1).squeeze(1)), dim=1)

    def loss(
        self, image: Tensor, text: Tensor, features: Tensor, labels: Tensor, group: ProcessGroup | None = None
    ) -> Tensor:
        caption = cross_entropy(features, self.text_encoder.words.weight, labels, self.bias, group, PADDING)
        return clip_loss(image, text, self.logit_scale.exp(), group=group) + self.caption_weight * caption

    def logits(self, features: Tensor) -> Tensor:
        return F.linear(features, self.text_encoder.words.weight, self.bias)

    def unigram(self, dataset: Captions) -> Tensor:
        tokens = dataset.train.tensors[1][:, 1:]
        return log_frequencies(tokens[tokens != PADDING], len(self.bias))

    @torch.no_grad()
    def evaluate(self, dataset: Captions) -> dict[str, float]:
        training = self.training
        self.eval()
        logits, labels = [], []
        for images, tokens in zip(*(x.split(256) for x in dataset.test.tensors), strict=True):
            *_, features, label = self(to_float(move(images, self.device)), move(tokens, self.device))
            logits.append(self.logits(features[label != PADDING]).log_softmax(1).cpu())
            labels.append(label[label != PADDING].cpu())
        self.train(training)
        found = marks(torch.cat(logits), torch.cat(labels), self.unigram(dataset), "subwords of captions")
        return super().evaluate(dataset) | found

    @torch.no_grad()
    def samples(self, dataset: Captions, count: int = 5) -> list[str]:
        """Captions that it writes for images to be tested, and what they are."""
        training = self.training
        self.eval()
        images, captions = (x[:: max(1, len(x) // count)][:count] for x in dataset.test.tensors)
        patches, begin = self.encoder(to_float(move(images, self.device))), torch.full((len(images), 1), END)

        def logits(tokens: Tensor) -> Tensor:
            return self.logits(self.decoder(self.text_encoder(move(tokens, self.device)), patches)[:, -1])

        texts = write(logits, begin, captions.shape[1])
        self.train(training)
        return [f"{dataset.decode(ours)} [{dataset.decode(true)}]" for ours, true in zip(texts, captions, strict=True)]
