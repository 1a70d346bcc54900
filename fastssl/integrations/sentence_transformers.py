"""The ranking losses of sentence-transformers in O(B D) memory: its classes, which store no similarities.

Of each, the method that makes the loss of the embeddings is replaced. Everything else is the original's: arguments and
their checks, the model card, and how a cached loss embeds mini-batches twice. Where `similarity_fct` is neither
`cos_sim` nor `dot_score` (nor a model's `similarity` that is one of them), or embeddings are sparse, the original makes
the loss, too, and stores the similarities.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from sentence_transformers import SentenceTransformer, util
from sentence_transformers.sentence_transformer import losses
from torch import Tensor

from fastssl._arithmetic import as_scalar, cross_entropy, dot, finish, logsumexp, unit
from fastssl._exponential_sums import Sums, joined, pair_sums, row_sums, self_sums, sums_with_others
from fastssl.distributed import Ring, all_processes, with_scaled_gradient
from fastssl.functional import info_nce
from fastssl.ops._precision import product_precision, widen

__all__ = ["CachedMultipleNegativesRankingLoss", "MultipleNegativesRankingLoss"]


class MultipleNegativesRankingLoss(losses.MultipleNegativesRankingLoss):
    """InfoNCE with the other samples' documents, and maybe queries, as negatives. It takes the place of
    sentence-transformers' class of this name, with the same arguments.

    With gather_across_devices the rows of the other processes travel past this one (`fastssl.distributed`), and none
    holds the whole batch.
    """

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None = None) -> Tensor:
        """The mean loss of the queries.

        Args:
            embeddings: of the queries, of their documents, and of any number of hard negatives, (B, D) each; float32,
                bfloat16, float16 or float64. As in the original, products are those of float32, or of autocast.
            labels: not used.

        Returns:
            0-d loss in float32, or in float64 for float64.

        Raises:
            ValueError: if there are less than two embeddings, or on every process, if those of other processes differ
                in shape or dtype.
        """
        loss = _loss(self, embeddings)
        return super().compute_loss_from_embeddings(embeddings, labels) if loss is None else loss


class CachedMultipleNegativesRankingLoss(losses.CachedMultipleNegativesRankingLoss):
    """`MultipleNegativesRankingLoss` of batches that are embedded in mini-batches, twice (GradCache, arXiv:2101.06983).
    It takes the place of sentence-transformers' class of this name, with the same arguments.

    The loss of all embeddings is one call: mini_batch_size is that of the model alone.
    """

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """The mean loss of the queries.

        Args:
            reps: the embeddings, as in `MultipleNegativesRankingLoss`, in mini-batches.
            labels: not used.
            with_backward: add to the embeddings' gradients, and return the loss without a graph.

        Returns:
            0-d loss in float32, or in float64 for float64.
        """
        loss = _loss(self, [torch.cat(column) for column in reps])
        if loss is None:
            return super().calculate_loss(reps, labels, with_backward=with_backward)
        if with_backward:
            loss.backward()
            return loss.detach()
        return loss


def _loss(options: MultipleNegativesRankingLoss, embeddings: list[Tensor]) -> Tensor | None:
    """Of either class; None where it must be the original's.

    A denominator is a sum over up to four sets of pairs, "directions". The query's own positive pair is left out of
    them, to be added without cancellation; "doc_to_query" has it once more.
    """
    normalize = _normalizes(options.similarity_fct)
    if normalize is None or len(embeddings) < 2 or any(z.is_sparse or z.dim() != 2 for z in embeddings):
        return None
    group = all_processes() if options.gather_across_devices else None
    hardness = options.hardness_mode if options.hardness_strength > 0 else None
    directions, joint = set(options.directions), options.partition_mode == "joint"
    q, d, *hard = (widen(z) for z in embeddings)

    symmetric = directions == {"query_to_doc", "doc_to_query"} and not joint and not hard
    plain = directions == {"query_to_doc"} and (group is None or not hard)
    if hardness is None and (symmetric or plain):
        return info_nce(
            q, d, torch.cat(hard) if hard else None, temperature=1 / options.scale, in_batch_negatives=True,
            symmetric=symmetric, normalize=normalize, group=group,
        )  # fmt: skip

    if normalize:
        q, d, *hard = (unit(z) for z in (q, d, *hard))
    scale, precision = as_scalar(options.scale, q), product_precision(q)
    own = torch.arange(len(q), device=q.device)
    ring = None
    if group is not None:
        names = ("queries", "documents", *(f"negatives_{i}" for i in range(len(hard))))
        ring = Ring(group, **dict(zip(names, (q, d, *hard), strict=True)))

    def against(x: Tensor, y: Tensor, exclude: Tensor | None) -> Sums:
        return row_sums(x, y, scale, exclude, precision, ring)

    def among(z: Tensor) -> list[Sums]:
        others = [] if ring is None else [sums_with_others(ring, z, scale, precision)]
        return [self_sums(z, scale, precision), *others]

    positive = dot(q, d) * scale
    sums = {}
    if hardness is not None:
        strength = options.hardness_strength
        sums["query_to_doc"] = _with_hardness(q, d, hard, scale, strength, hardness, precision, ring)
        if "doc_to_query" in directions:
            sums["doc_to_query"] = [against(d, q, own)]
    elif "doc_to_query" in directions:
        of_queries, of_documents = pair_sums(q, d, scale, own, precision, ring)
        of_hard = [against(q, torch.cat(hard), None)] if hard else []
        sums.update(query_to_doc=[of_queries, *of_hard], doc_to_query=[of_documents])
    else:
        sums["query_to_doc"] = [against(q, torch.cat([d, *hard]), own)]
    if "query_to_query" in directions:
        sums["query_to_query"] = among(q)
    if "doc_to_doc" in directions:
        sums["doc_to_doc"] = [*among(d), *(against(d, z, own) for z in hard)]

    if joint:
        once_more = [_of_one(positive)] if "doc_to_query" in directions else []
        sums = {"joint": [*(part for parts in sums.values() for part in parts), *once_more]}
    losses_ = [cross_entropy(logsumexp(*joined(parts)), positive) for parts in sums.values()]
    return finish(torch.stack(losses_).mean(0), "mean", q)


def _with_hardness(
    q: Tensor,
    d: Tensor,
    hard: list[Tensor],
    scale: Tensor,
    strength: float,
    mode: str,
    precision: str,
    ring: Ring | None,
) -> list[Sums]:
    """Of queries with documents, some of which have a penalty: strength times the similarity, as a constant, is added
    to the logit. That is a larger scale, with the gradients of the rows scaled back."""
    own = torch.arange(len(q), device=q.device)
    factor = float(scale / (scale + strength))

    def against(y: Tensor, exclude: Tensor | None, penalised: bool) -> Sums:
        x = q
        if penalised:
            x, y = (with_scaled_gradient(z, factor) for z in (x, y))
        return row_sums(x, y, scale + strength if penalised else scale, exclude, precision, ring)

    if mode == "all_negatives":
        return [against(torch.cat([d, *hard]), own, True)]
    of_others = [against(z, own, mode == "in_batch_negatives") for z in (d, *hard)]
    similarities = [dot(q, z) for z in hard]
    penalties = [strength * s.detach() if mode == "hard_negatives" else 0 for s in similarities]
    return [*of_others, *(_of_one(s * scale + p) for s, p in zip(similarities, penalties, strict=True))]


def _of_one(logit: Tensor) -> Sums:
    """The sum of one exponential in each row."""
    return torch.ones_like(logit), logit


def _normalizes(similarity_fct: Callable[[Tensor, Tensor], Tensor]) -> bool | None:
    """Whether the function is the cosine, rather than the product of rows; None if it is neither."""
    owner = getattr(similarity_fct, "__self__", None)
    if isinstance(owner, SentenceTransformer) and similarity_fct == owner.similarity:
        similarity_fct = util.SimilarityFunction.to_similarity_fn(owner.similarity_fn_name)
    if similarity_fct in (util.cos_sim, util.pytorch_cos_sim):
        return True
    return False if similarity_fct is util.dot_score else None


_LOSSES = "sentence_transformers.sentence_transformer.losses"
VERSIONS = "5.7", "6.3"
REPLACES = {
    f"{_LOSSES}.multiple_negatives_ranking.MultipleNegativesRankingLoss": MultipleNegativesRankingLoss,
    f"{_LOSSES}.cached_multiple_negatives_ranking.CachedMultipleNegativesRankingLoss": (
        CachedMultipleNegativesRankingLoss
    ),
}
