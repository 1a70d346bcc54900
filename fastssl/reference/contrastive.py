"""Softmax contrastive losses, as the papers write them.

NT-Xent (SimCLR, arXiv:2002.05709). With z the 2B rows of [z1; z2], each divided by its Euclidean norm
(at least 1e-12, as `torch.nn.functional.normalize`), and s = 1 / temperature,

    S_ij   = s <z_i, z_j>
    loss_i = log sum_{j != i} exp(S_ij) - S_{i, pos(i)},      pos(i) = (i + B) mod 2B.

`similarity_logsumexp` is the first of the two terms between any two sets of rows: the normaliser of InfoNCE
(CPC, arXiv:1807.03748), of MoCo's queue (arXiv:1911.05722), and of NT-Xent over several processes.

The others build their logits, then take the cross-entropy: `info_nce`, `clip_loss` (arXiv:2103.00020; with labels
UniCL, arXiv:2204.03610), `sup_con` (arXiv:2004.11362) and `dcl` (arXiv:2110.06848).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl._reductions import reduce


def nt_xent(
    z1: Tensor, z2: Tensor, *, temperature: float | Tensor = 0.5, normalize: bool = True, reduction: str = "mean"
) -> Tensor:
    """NT-Xent as people write it: concatenate, multiply, mask the diagonal, cross-entropy."""
    batch = z1.shape[0]
    z = torch.cat([z1, z2])
    if normalize:
        z = F.normalize(z, dim=1)
    similarity = z @ z.T / temperature
    itself = torch.eye(2 * batch, dtype=torch.bool, device=z.device)
    positive = torch.arange(2 * batch, device=z.device).roll(batch)
    loss = F.cross_entropy(similarity.masked_fill(itself, float("-inf")), positive, reduction="none")
    return reduce(loss, reduction)


def similarity_logsumexp(
    x: Tensor,
    y: Tensor,
    *,
    scale: float | Tensor = 1.0,
    exclude: Tensor | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    """The log-sum-exp over the columns of the stored similarity matrix; NaN where one is plus infinity."""
    similarity = x @ y.T * scale
    if exclude is not None:
        column = torch.arange(y.shape[0], device=y.device)
        similarity = similarity.masked_fill(column == exclude[:, None], float("-inf"))
    lse = similarity.logsumexp(1)
    lse = lse + 0 * lse.detach().clamp_min(0)
    lse = lse.to(torch.promote_types(lse.dtype, torch.float32))
    return lse if offset is None else lse - offset


def info_nce(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None = None,
    *,
    negative_ids: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    negative_mode: str = "unpaired",
    in_batch_negatives: bool | None = None,
    symmetric: bool = False,
    normalize: bool = True,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    return_metrics: bool = False,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """InfoNCE: the positive's column among the columns of all keys, and cross-entropy."""
    if in_batch_negatives is None:
        in_batch_negatives = negative_keys is None
    if normalize:
        query, positive_key = F.normalize(query, dim=-1), F.normalize(positive_key, dim=-1)
        negative_keys = None if negative_keys is None else F.normalize(negative_keys, dim=-1)
    target = torch.arange(query.shape[0], device=query.device)
    similarity = query @ positive_key.T
    if not in_batch_negatives:
        similarity, target = (query * positive_key).sum(1, keepdim=True), torch.zeros_like(target)
    if negative_keys is not None:
        if negative_ids is not None:
            none = negative_keys.shape[0]  # the id of a row of zeros
            negative_keys = F.pad(negative_keys, (0, 0, 0, 1))[negative_ids.long().where(negative_ids >= 0, none)]
        equation = "bd,bkd->bk" if negative_keys.dim() == 3 else "bd,kd->bk"
        similarity = torch.cat([similarity, torch.einsum(equation, query, negative_keys)], 1)
    logits = similarity / temperature
    if negative_ids is not None:
        others = logits.shape[1] - negative_ids.shape[1]
        logits = logits.masked_fill(F.pad(negative_ids < 0, (others, 0)), float("-inf"))
    loss = F.cross_entropy(logits, target, label_smoothing=label_smoothing, reduction="none")
    if symmetric:
        loss = (loss + F.cross_entropy(logits.T, target, label_smoothing=label_smoothing, reduction="none")) / 2
    loss = reduce(loss, reduction)
    if not return_metrics:
        return loss
    accuracy = torch.stack([_accuracy(x, target) for x in ((logits, logits.T) if symmetric else (logits,))]).mean()
    return loss, {"accuracy": accuracy, **_of_pairs(query, positive_key)}


def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    *,
    labels: Tensor | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    return_metrics: bool = False,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """CLIP's loss: cross-entropy of the logits' rows and of their columns. With labels, the targets are shared."""
    logits = logit_scale * image_features @ text_features.T
    own = torch.arange(logits.shape[0], device=logits.device)

    def cross_entropy(logits: Tensor) -> Tensor:
        if labels is None:
            return F.cross_entropy(logits, own, label_smoothing=label_smoothing, reduction="none")
        log_probability, same = logits.log_softmax(1), labels[:, None] == labels
        loss = -log_probability.where(same, 0).sum(1) / same.sum(1)
        if label_smoothing:
            loss = (1 - label_smoothing) * loss - label_smoothing * log_probability.mean(1)
        return loss

    loss = reduce((cross_entropy(logits) + cross_entropy(logits.T)) / 2, reduction)
    if not return_metrics:
        return loss
    accuracies = {"image_accuracy": _accuracy(logits, own), "text_accuracy": _accuracy(logits.T, own)}
    return loss, {**({} if labels is not None else accuracies), **_of_pairs(image_features, text_features)}


def sup_con(
    features: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """SupCon's L_out: the mean log-probability of the other rows of the same label."""
    shape = features.shape[:-1]
    if features.dim() == 3:
        labels = labels.repeat_interleave(features.shape[1])
        features = features.flatten(0, 1)
    if normalize:
        features = F.normalize(features, dim=1)
    logits = features @ features.T / temperature
    itself = torch.eye(len(features), dtype=torch.bool, device=features.device)
    log_probability = logits - logits.masked_fill(itself, float("-inf")).logsumexp(1, keepdim=True)
    positive = (labels[:, None] == labels) & ~itself
    loss = -log_probability.where(positive, 0).sum(1) / positive.sum(1).clamp_min(1)
    return reduce(loss.view(shape), reduction)


def dcl(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    weight_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """DCL for the rows of either view: the other view's row against all other rows of both."""
    if normalize:
        z1, z2 = F.normalize(z1, dim=1), F.normalize(z2, dim=1)
    own = torch.eye(z1.shape[0], dtype=torch.bool, device=z1.device)
    losses = []
    for x, y in ((z1, z2), (z2, z1)):
        within, across = x @ x.T / temperature, x @ y.T / temperature
        weight = 1 if weight_fn is None else weight_fn(x, y)
        negatives = torch.cat([S.masked_fill(own, float("-inf")) for S in (within, across)], 1)
        losses.append(negatives.logsumexp(1) - weight * across.diagonal())
    return reduce(torch.cat(losses), reduction)


def _accuracy(logits: Tensor, target: Tensor) -> Tensor:
    """The share of rows whose target is above all else."""
    logits = F.pad(logits.detach(), (0, 1), value=float("-inf"))
    others = logits.scatter(1, target[:, None], float("-inf")).amax(1)
    return (logits.gather(1, target[:, None]).squeeze(1) > others).float().mean()


def _of_pairs(x: Tensor, y: Tensor) -> dict[str, Tensor]:
    x, y = x.detach(), y.detach()
    metrics = {"positive_similarity": (x * y).sum(1).mean(), "alignment": (x - y).square().sum(1).mean()}
    return {name: value.float() for name, value in metrics.items()}
