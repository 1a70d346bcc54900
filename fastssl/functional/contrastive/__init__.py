"""Contrastive losses by softmax."""

from fastssl.functional.contrastive.clip_loss import clip_loss
from fastssl.functional.contrastive.dcl import dcl
from fastssl.functional.contrastive.info_nce import info_nce
from fastssl.functional.contrastive.nt_xent import nt_xent
from fastssl.functional.contrastive.similarity_logsumexp import similarity_logsumexp
from fastssl.functional.contrastive.sup_con import sup_con

__all__ = ["clip_loss", "dcl", "info_nce", "nt_xent", "similarity_logsumexp", "sup_con"]
