"""Drop-in modules, thin over `fastssl.functional`."""

from fastssl.nn.barlow_twins import BarlowTwinsLoss
from fastssl.nn.clip import ClipLoss
from fastssl.nn.coca import CoCaLoss
from fastssl.nn.dcl import DCLLoss, DCLWLoss
from fastssl.nn.dino import DINOLoss
from fastssl.nn.dino_head import DINOHead
from fastssl.nn.distill_clip import DistillClipLoss
from fastssl.nn.ema import EMA
from fastssl.nn.ibot import IBOTPatchLoss
from fastssl.nn.info_nce import InfoNCELoss
from fastssl.nn.koleo import KoLeoLoss
from fastssl.nn.linear_cross_entropy import LinearCrossEntropyLoss
from fastssl.nn.memory_bank import MemoryBank, MemoryBankModule
from fastssl.nn.msn import MSNLoss
from fastssl.nn.ntxent import NTXentLoss
from fastssl.nn.patch_embed import PatchEmbed
from fastssl.nn.siglip import SigLipLoss
from fastssl.nn.supcon import SupConLoss
from fastssl.nn.swav import SwaVLoss
from fastssl.nn.vicreg import VICRegLoss

__all__ = [
    "BarlowTwinsLoss",
    "ClipLoss",
    "CoCaLoss",
    "DCLLoss",
    "DCLWLoss",
    "DINOHead",
    "DINOLoss",
    "DistillClipLoss",
    "EMA",
    "IBOTPatchLoss",
    "InfoNCELoss",
    "KoLeoLoss",
    "LinearCrossEntropyLoss",
    "MSNLoss",
    "MemoryBank",
    "MemoryBankModule",
    "NTXentLoss",
    "PatchEmbed",
    "SigLipLoss",
    "SupConLoss",
    "SwaVLoss",
    "VICRegLoss",
]
