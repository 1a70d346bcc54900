"""How good an encoder's features are: by their neighbours, by a linear classifier, and whether they have collapsed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl.functional import topk_similarity, uniformity
from fastssl.train.data.augment import to_float
from fastssl.train.data.images import Images
from fastssl.train.device import Reading, move


def pooled(features: Tensor) -> Tensor:
    """(B, D) features as they are; for tokens (B, L, D), their mean."""
    return features.mean(1) if features.dim() == 3 else features


@torch.no_grad()
def features(encoder: nn.Module, images: Tensor, pixels: int = 1 << 21) -> Tensor:
    """uint8 images (see `to_float`), not augmented -> (N, features) of the encoder in evaluation mode.

    They are computed on the encoder's device, and remain there; from images of that many pixels at a time, whatever the
    images' size.
    """
    batch_size = max(1, pixels // math.prod(images.shape[-2:]))
    training, device = encoder.training, next(encoder.parameters(), images).device
    encoder.eval()
    outputs = [pooled(encoder(to_float(move(batch, device)))) for batch in images.split(batch_size)]
    encoder.train(training)
    return torch.cat(outputs)


def accuracies(
    encoder: nn.Module, images: Images, head: nn.Module | None = None, limit: int = 20_000
) -> dict[str, float]:
    """`knn_accuracy` and `probe_accuracy` of the encoder's features; from the first `limit` training images.

    With a head, which classifies features, also the share of test images that it classifies correctly.
    Without labels, the effective rank of the first `limit` test images' features, as a share of their dimensions.
    """
    if images.test_labels is None:
        test = features(encoder, images.test[:limit])
        return {f"effective rank, of {test.shape[1]} dimensions": health([test]).rank / test.shape[1]}
    train, test = features(encoder, images.train[:limit]), features(encoder, images.test)
    labels = images.train_labels[:limit], images.test_labels
    found = {"kNN accuracy": knn_accuracy(train, test, *labels), "linear probe": probe_accuracy(train, test, *labels)}
    if head is not None:
        found["accuracy"] = (head(test).argmax(1).cpu() == images.test_labels).float().mean().item()
    return found


def knn_accuracy(train: Tensor, test: Tensor, train_labels: Tensor, test_labels: Tensor, k: int = 20) -> float:
    """Share of test rows whose label is the most frequent among their `k` nearest training rows (cosine)."""
    _, nearest = topk_similarity(test, train, min(k, len(train)))
    labels = train_labels[nearest.cpu()]
    votes = labels.new_zeros(len(labels), int(train_labels.max()) + 1).scatter_add_(1, labels, torch.ones_like(labels))
    return (votes.argmax(1) == test_labels).float().mean().item()


def probe_accuracy(train: Tensor, test: Tensor, train_labels: Tensor, test_labels: Tensor) -> float:
    """Share of test rows that a linear classifier labels correctly: a logistic regression on standardised features, as
    scikit-learn's with its defaults, learned where the features are by at most 200 iterations of L-BFGS."""
    mean, std = train.mean(0), train.std(0).clamp_min(1e-6)
    train, test = ((x - mean) / std for x in (train, test))
    labels, classes = move(train_labels, train.device), int(train_labels.max()) + 1
    weight, bias = (train.new_zeros(shape, requires_grad=True) for shape in ((classes, train.shape[1]), (classes,)))
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, tolerance_grad=1e-3, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(train, weight, bias), labels) + weight.square().sum() / (2 * len(train))
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(objective)
    found = F.linear(test, weight, bias).argmax(1).cpu()
    return (found == test_labels).float().mean().item()


@dataclass(frozen=True)
class Health:
    """How embeddings are spread, and a teacher's distributions over prototypes.

    Attributes:
        rank: the effective rank, exp of the entropy of the singular values' shares (RankMe, arXiv:2210.02885): from 1,
            where all rows have the same direction or its opposite, to D.
        uniformity: see `fastssl.functional.uniformity` (arXiv:2005.10242): 0 where all rows have the same direction,
            and the lower, the more evenly they are spread.
        alignment: mean squared distance of the unit embeddings of two views of one image, from the same paper; None
            where there is one view.
        used: the prototypes that the teacher assigns inputs to, as the perplexity (exp of the entropy) of its mean
            distribution: from 1 to their number; None where there are none.
        each: those that a single input is assigned to, as the perplexity of the mean entropy: from 1 to `used`.
    """

    rank: float
    uniformity: float
    alignment: float | None
    used: float | None = None
    each: float | None = None

    @property
    def collapse(self) -> str | None:
        """What has become of the embeddings, or of the distributions; None where neither has collapsed.

        All inputs may have nearly the same direction, within about 2 degrees, or its opposite; or be NaN. Or the
        teacher's distributions say nothing of the input, with less than 0.05 nats of mutual information: all inputs
        have the same one, be it one prototype, which a center prevents, or all prototypes alike, which a low
        temperature prevents (DINO, arXiv:2104.14294, figure 7).
        """
        if self.used is not None and not self.used > 1.05 * self.each:  # as where both are NaN
            return f"all inputs have nearly the same distribution, over {self.used:.0f} prototypes"
        if not (self.uniformity < -1e-3 and self.rank > 1.2):
            return "all inputs have nearly the same embedding"
        return None

    def __str__(self) -> str:
        alignment = "" if self.alignment is None else f", alignment {self.alignment:.3f}"
        used = "" if self.used is None else f"\n  {self.used:.1f} prototypes in use, {self.each:.1f} by a single input"
        return f"effective rank {self.rank:.1f}, uniformity {self.uniformity:.3f}{alignment}{used}"


def health(views: Sequence[Tensor], assignments: Tensor | None = None) -> Health:
    """Of (B, D) embeddings of one view of B inputs, or of two or more, the first of which count; and of distributions
    (B, K) over prototypes."""
    return HealthNumbers(views, assignments).read()


class HealthNumbers:
    """What `health` returns, perhaps still on its way to the host. The arguments are the same."""

    @torch.no_grad()
    def __init__(self, views: Sequence[Tensor], assignments: Tensor | None = None) -> None:
        units = [F.normalize(view.float(), dim=1) for view in views[:2]]
        spectrum = torch.linalg.svdvals(views[0].float().nan_to_num())
        shares = spectrum / spectrum.sum()
        numbers = {"rank": torch.special.entr(shares).sum().exp(), "uniformity": uniformity(units[0])}
        numbers["alignment"] = (units[0] - units[1]).square().sum(1).mean() if len(units) > 1 else None
        if assignments is not None:
            assignments = assignments.float()
            numbers["used"] = torch.special.entr(assignments.mean(0)).sum().exp()
            numbers["each"] = torch.special.entr(assignments).sum(1).mean().exp()
        there = {name: number for name, number in numbers.items() if number is not None}
        self._absent = [name for name in numbers if name not in there]
        self._names, self._numbers = list(there), Reading(torch.stack(list(there.values())))

    def read(self) -> Health:
        found = dict(zip(self._names, self._numbers.numbers(), strict=True))
        return Health(**found, **dict.fromkeys(self._absent))
