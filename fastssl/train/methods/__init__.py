"""Every method, by the name of its file, which is also the name of its command."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from fastssl.train.method import Method
from fastssl.train.methods.barlow_twins import BarlowTwins
from fastssl.train.methods.beit import BEiT
from fastssl.train.methods.bert import BERT
from fastssl.train.methods.byol import BYOL
from fastssl.train.methods.clip import CLIP
from fastssl.train.methods.coca import CoCa
from fastssl.train.methods.cpc import CPC
from fastssl.train.methods.data2vec import Data2Vec
from fastssl.train.methods.dino import DINO
from fastssl.train.methods.dinov2 import DINOv2
from fastssl.train.methods.electra import ELECTRA
from fastssl.train.methods.gpt import GPT
from fastssl.train.methods.hubert import HuBERT
from fastssl.train.methods.ibot import IBOT
from fastssl.train.methods.jepa import JEPA
from fastssl.train.methods.mae import MAE
from fastssl.train.methods.moco_v1 import MoCoV1
from fastssl.train.methods.moco_v2 import MoCoV2
from fastssl.train.methods.moco_v3 import MoCoV3
from fastssl.train.methods.siglip import SigLIP
from fastssl.train.methods.simclr import SimCLR
from fastssl.train.methods.simcse import SimCSE
from fastssl.train.methods.simcse_bert import SimCSEBERT
from fastssl.train.methods.simsiam import SimSiam
from fastssl.train.methods.sup_con import SupCon
from fastssl.train.methods.supervised import Supervised
from fastssl.train.methods.t5 import T5
from fastssl.train.methods.vicreg import VICReg
from fastssl.train.methods.wav2vec2 import Wav2Vec2
from fastssl.train.networks import models

METHODS: dict[str, type[Method]] = {
    "barlow_twins": BarlowTwins,
    "beit": BEiT,
    "bert": BERT,
    "byol": BYOL,
    "clip": CLIP,
    "coca": CoCa,
    "cpc": CPC,
    "data2vec": Data2Vec,
    "dino": DINO,
    "dinov2": DINOv2,
    "electra": ELECTRA,
    "gpt": GPT,
    "hubert": HuBERT,
    "ibot": IBOT,
    "jepa": JEPA,
    "mae": MAE,
    "moco_v1": MoCoV1,
    "moco_v2": MoCoV2,
    "moco_v3": MoCoV3,
    "siglip": SigLIP,
    "simclr": SimCLR,
    "simcse": SimCSE,
    "simcse_bert": SimCSEBERT,
    "simsiam": SimSiam,
    "sup_con": SupCon,
    "supervised": Supervised,
    "t5": T5,
    "vicreg": VICReg,
    "wav2vec2": Wav2Vec2,
}


def create(
    name: str,
    total_steps: int,
    dataset: Any = None,
    *,
    backbone: str | None = None,
    augment: Mapping[str, float] = MappingProxyType({}),
    **options: Any,
) -> Method:
    """The method of that name for a run of `total_steps` on `dataset`, which tells its constructor what it asks for.

    Without a data set it is for images such as Fashion-MNIST's. `backbone` names a model of timm as image encoder.
    `augment` has arguments of `fastssl.train.data.augment.Augmentation` that all of the method's views are to have.
    """
    given = {"total_steps": total_steps, **getattr(dataset, "facts", {})}
    constructor = inspect.signature(METHODS[name])
    arguments = constructor.bind(**options, **{k: v for k, v in given.items() if k in constructor.parameters})
    arguments.apply_defaults()
    with models.backbone(backbone, given.get("size", 28)):
        method = METHODS[name](**arguments.kwargs)
    method.options = arguments.kwargs if backbone is None else {**arguments.kwargs, "backbone": backbone}
    if augment:
        if not method.augmentations:
            raise ValueError(f"augment must be empty for a method that has no views of images, got {dict(augment)}")
        method.augmentations = tuple(replace(view, **augment) for view in method.augmentations)
        method.options = {**method.options, "augment": dict(augment)}
    if dataset is not None:
        method.prepare(dataset)
    return method
