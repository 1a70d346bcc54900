"""How good an encoder's features are, without training anything on them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn

from fastssl.train.data import Images


@torch.no_grad()
def features(encoder: nn.Module, images: Tensor, batch_size: int = 2048) -> Tensor:
    """(N, H, W) uint8 images, not augmented -> (N, features) of the encoder in evaluation mode."""
    training = encoder.training
    encoder.eval()
    outputs = [encoder(batch.unsqueeze(1).float() / 255) for batch in images.split(batch_size)]
    encoder.train(training)
    return torch.cat(outputs)


def knn_accuracy(encoder: nn.Module, images: Images, k: int = 20) -> float:
    """Share of test images whose label is the most frequent among their `k` nearest training images (cosine)."""
    train, test = (F.normalize(features(encoder, x)).numpy() for x in (images.train, images.test))
    # Between unit vectors, Euclidean distance ranks as cosine similarity does.
    classifier = KNeighborsClassifier(k, algorithm="brute").fit(train, images.train_labels.numpy())
    return float(classifier.score(test, images.test_labels.numpy()))
