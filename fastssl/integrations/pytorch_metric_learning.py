"""pytorch-metric-learning's losses in O(N D) memory, for `fastssl.patch("pytorch_metric_learning")`.

They are subclasses of the library's, and what it does around a loss, as reducers, regularizers and
`SelfSupervisedLoss`, goes on as before. Not covered are pairs that a miner has chosen or that a cross-batch memory
keeps, and other distances than the cosine and the dot product: these raise an error that says so.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from pytorch_metric_learning import losses
from pytorch_metric_learning.distances import DotProductSimilarity
from torch import Tensor

from fastssl.functional import info_nce, nt_xent, similarity_logsumexp, sup_con
from fastssl.ops.row_sums import sum_rows, take_rows

__all__ = ["NTXentLoss", "SupConLoss"]

VERSIONS = "2.4", "2.10"


class NTXentLoss(losses.NTXentLoss):
    """NT-Xent (SimCLR, arXiv:2002.05709) of rows whose labels come in twos: each is that of two rows or, with
    `ref_emb`, that of one row and of one row of `ref_emb`, which is InfoNCE (arXiv:1807.03748).

    Where a label occurs more often, each pair's denominator leaves the other positives out, which no kernel here does.
    The library's loss of a pair ends at 15.9, as it adds float32's rounding to the probability; here it goes on.

    Arguments and attributes: the library's.
    """

    def compute_loss(
        self, embeddings: Tensor, labels: Tensor, indices_tuple: Any, ref_emb: Tensor, ref_labels: Tensor
    ) -> dict[str, Any]:
        """The loss of each pair, for the reducer.

        Raises:
            ValueError: if labels do not come in twos, there is an indices_tuple, or the distance is another one.
        """
        normalize = _normalizes(self, labels, indices_tuple)
        both_views = ref_emb is embeddings
        counts = torch.cat([labels] if both_views else [labels, ref_labels]).unique(return_counts=True)[1]
        if len(counts) < 2 or (counts < 2).all():  # no negatives, or no positives
            return self.zero_losses()
        order, ref_order = labels.argsort(stable=True), ref_labels.argsort(stable=True)
        first, second = (order[0::2], order[1::2]) if both_views else (order, ref_order)
        if not (counts == 2).all() or not torch.equal(labels[first], ref_labels[second]):
            where = "twice in embeddings" if both_views else "once in embeddings and once in ref_emb"
            raise ValueError(f"labels must each occur {where} for fastssl's {type(self).__name__}")
        options = {"temperature": self.temperature, "normalize": normalize, "reduction": "none"}
        if both_views:
            pair_losses = nt_xent(embeddings[first], embeddings[second], **options)
            first, second = torch.cat([first, second]), torch.cat([second, first])
        else:
            pair_losses = info_nce(embeddings[first], ref_emb[second], **options)
        return {"loss": {"losses": pair_losses, "indices": (first, second), "reduction_type": "pos_pair"}}


class SupConLoss(losses.SupConLoss):
    """Supervised contrastive learning (SupCon, arXiv:2004.11362).

    Arguments and attributes: the library's.
    """

    def compute_loss(
        self, embeddings: Tensor, labels: Tensor, indices_tuple: Any, ref_emb: Tensor, ref_labels: Tensor
    ) -> dict[str, Any]:
        """The loss of each row, for the reducer.

        Raises:
            ValueError: if there is an indices_tuple, or the distance is another one.
        """
        normalize = _normalizes(self, labels, indices_tuple)
        values, ids = torch.cat([labels, ref_labels]).unique(return_inverse=True)
        if len(values) < 2:  # no negatives
            return self.zero_losses()
        ids, ref_ids = ids.split([len(labels), len(ref_labels)])
        if ref_emb is embeddings:
            row_losses = sup_con(embeddings, ids, temperature=self.temperature, normalize=normalize, reduction="none")
        else:
            x, y = ((F.normalize(z) if normalize else z) for z in (embeddings, ref_emb))
            counts = ref_ids.bincount(minlength=len(values))
            means = sum_rows(y, ref_ids, len(values)) / counts.clamp_min(1).unsqueeze(1)
            positives = (x * take_rows(means, ids)).sum(1) / self.temperature
            row_losses = similarity_logsumexp(x, y, scale=1 / self.temperature, offset=positives)
            row_losses = row_losses.where(counts[ids] > 0, 0)
        rows = torch.arange(len(labels), device=embeddings.device)
        return {"loss": {"losses": row_losses, "indices": rows, "reduction_type": "element"}}


def _normalizes(loss: losses.GenericPairLoss, labels: Tensor | None, indices_tuple: Any) -> bool:
    """Whether the rows are to be normalised, if all this is covered."""
    name, distance = type(loss).__name__, loss.distance
    if labels is None or indices_tuple is not None:
        raise ValueError(f"indices_tuple must be None, and labels given, for fastssl's {name}, got chosen pairs")
    known = isinstance(distance, DotProductSimilarity) and (distance.p, distance.power) == (2, 1)
    if not known:
        rule = "CosineSimilarity or DotProductSimilarity with p=2 and power=1"
        raise ValueError(f"distance must be {rule} for fastssl's {name}, got {distance}")
    return distance.normalize_embeddings


REPLACES = {
    "pytorch_metric_learning.losses.ntxent_loss.NTXentLoss": NTXentLoss,
    "pytorch_metric_learning.losses.supcon_loss.SupConLoss": SupConLoss,
}
