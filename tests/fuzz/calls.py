"""A valid call of everything that is public, its arguments by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fastssl
from fastssl import functional
from fastssl import nn as modules
from fastssl.optim import AdamW


@dataclass(frozen=True)
class Call:
    """`run(**arguments())` is valid.

    Attributes:
        name: function, module, or method.
        arguments: () -> fresh ones, every optional one included that can be.
        run: what is called; its result, or what it wrote, is compared with the reference backend's.
        signature: whose annotations say what type an argument may have.
        random: two calls differ.
        others: arguments of what it calls, which an error may name in place of its own.
        kept: arguments that are given as they are where the reference computes in float64.
        has_tensors: `run` has tensors of its own, to which it applies `change`, as that is applied to the arguments.
    """

    name: str
    arguments: Callable[[], dict[str, Any]]
    run: Callable[..., Any]
    signature: Callable[..., Any]
    random: bool = False
    others: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    has_tensors: bool = False


Change = Callable[[Any], Any]


class TheirOwn(Exception):
    """An error of a function among the arguments, which speaks for itself."""


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _leaf(*shape: int, seed: int = 0) -> Tensor:
    return _normal(*shape, seed=seed).requires_grad_()


def _pair(first: str, second: str, rows: int = 4, dim: int = 8, **others: Any) -> dict[str, Any]:
    return {first: _leaf(rows, dim), second: _leaf(rows, dim, seed=1), **others}


def _weight(x: Tensor, y: Tensor) -> Tensor:
    return 1 + (x * y).sum(1).abs()


def _ids(batch: int = 2, length: int = 6, keep: int = 4) -> Tensor:
    return torch.stack(
        [torch.randperm(length, generator=torch.Generator().manual_seed(b))[:keep] for b in range(batch)]
    )


def _mask() -> Tensor:
    return torch.tensor([[0, 1, 1, 0, 1, 1], [1, 0, 1, 1, 1, 0]], dtype=torch.bool)


def _masking(**sizes: Any) -> dict[str, Any]:
    return {"batch": 2, **sizes, "mask_ratio": 0.5, "generator": torch.Generator().manual_seed(0), "device": "cpu"}


def _lists() -> dict[str, Any]:
    def tensors(seed: int) -> list[Tensor]:
        return [_normal(3, seed=seed), _normal(2, 4, seed=seed + 1)]

    return {
        "params": tensors(0),
        "grads": tensors(1),
        "exp_avgs": tensors(2),
        "exp_avg_sqs": [x.square() for x in tensors(3)],
        "ema_params": tensors(4),
        "steps": [torch.tensor(3.0), torch.tensor(4.0)],
        "lr": 1e-3,
        "betas": (0.9, 0.99),
        "eps": 1e-8,
        "weight_decay": 0.01,
        "momentum": 0.9,
    }


def _distillation() -> dict[str, Any]:
    return {
        "student_temperature": torch.tensor(0.1, requires_grad=True),
        "teacher_temperature": 0.04,
        "center": _normal(8, seed=3),
        "reduction": "mean",
    }


def _teacher_logits() -> dict[str, Any]:
    return {"teacher_logits": _normal(4, 8), "temperature": 0.4, "iterations": 3, "group": None}


FUNCTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "adamw_ema_step_": _lists,
    "barlow_twins": lambda: _pair(
        "z_a", "z_b", lambda_param=0.01, eps=1e-5, unbiased=False, return_metrics=True, group=None
    ),
    "block_masking_ids": lambda: _masking(height=6, width=5, min_block=2, max_block=9, aspect_ratio=(0.3, 3.3)),
    "clip_loss": lambda: _pair(
        "image_features",
        "text_features",
        logit_scale=torch.tensor(2.0, requires_grad=True),
        labels=torch.tensor([0, 1, 0, 2]),
        label_smoothing=0.1,
        reduction="mean",
        return_metrics=True,
        group=None,
    ),
    "correlation_algorithm": lambda: {"batch": 8, "dim": 16},
    "covariance_loss": lambda: {"z": _leaf(4, 8), "unbiased": True},
    "cross_correlation": lambda: _pair("z_a", "z_b", eps=1e-5, unbiased=False, group=None),
    "dcl": lambda: _pair(
        "z1", "z2", temperature=0.2, weight_fn=_weight, normalize=True, reduction="mean", group=None
    ),
    "dino_loss": lambda: {
        "student_logits": [_leaf(4, 8), _leaf(2, 4, 8, seed=1)],
        "teacher_logits": _normal(2, 4, 8, seed=2),
        **_distillation(),
    },
    "ema_update_": lambda: {
        "targets": [_normal(3), _normal(2, 4)],
        "sources": [_normal(3, seed=1), _normal(2, 4, seed=1)],
        "momentum": 0.9,
    },
    "enqueue_": lambda: {
        "keys": _normal(5, 8),
        "position": torch.tensor(3),
        "new_keys": _normal(3, 8, seed=1),
        "normalize": True,
    },
    "gather_tokens": lambda: {"x": _leaf(2, 6, 8), "ids": _ids()},
    "ibot_loss": lambda: {
        "student_logits": _leaf(4, 8),
        "teacher_logits": _normal(4, 8, seed=1),
        **_distillation(),
        "weights": torch.tensor([0.5, 1.0, 0.0, 2.0]),
    },
    "info_nce": lambda: _pair(
        "query",
        "positive_key",
        negative_keys=_leaf(5, 8, seed=2),
        negative_ids=torch.tensor([[0, 4], [2, -1], [3, 3], [1, 0]]),
        temperature=0.2,
        negative_mode="unpaired",
        in_batch_negatives=True,
        symmetric=False,
        normalize=True,
        label_smoothing=0.0,
        reduction="mean",
        return_metrics=True,
        group=None,
    ),
    "koleo_loss": lambda: {"features": _leaf(4, 8), "eps": 1e-6, "topk": 1, "group_size": 2, "group": None},
    "linear_categorical": lambda: {
        "input": _normal(4, 8),
        "linear_weight": _normal(6, 8, seed=1),
        "linear_bias": _normal(6),
        "temperature": 0.5,
        "generator": torch.Generator().manual_seed(0),
    },
    "linear_cross_entropy": lambda: {
        "input": _leaf(4, 8),
        "linear_weight": _leaf(5, 8, seed=1),
        "target": torch.tensor([0, 4, -100, 2]),
        "linear_bias": _leaf(5, seed=2),
        "weight": _normal(5, seed=3).abs(),
        "reduction": "mean",
        "ignore_index": -100,
        "label_smoothing": 0.1,
        "temperature": torch.tensor(0.5, requires_grad=True),
        "normalize": True,
        "group": None,
    },
    "masked_feature_loss": lambda: {
        "pred": _leaf(2, 6, 8),
        "target": _normal(2, 6, 8, seed=1),
        "mask": _mask(),
        "loss": "smooth_l1",
        "beta": 0.5,
        "reduction": "mean",
    },
    "masked_patch_loss": lambda: {
        "pred": _leaf(2, 6, 12),
        "images": _normal(2, 3, 4, 6),
        "mask": _mask(),
        "patch_size": 2,
        "norm_pix_loss": True,
        "tubelet_size": None,
        "reduction": "mean",
    },
    "nt_xent": lambda: _pair(
        "z1", "z2", temperature=torch.tensor(0.5, requires_grad=True), normalize=True, reduction="mean", group=None
    ),
    "patch_embed": lambda: {
        "images": _leaf(2, 3, 4, 6),
        "weight": _leaf(8, 3, 2, 2),
        "bias": _leaf(8),
        "ids_keep": _ids(),
    },
    "prototype_distillation_loss": lambda: {
        "student": _leaf(4, 8),
        "student_prototypes": _leaf(8, 8, seed=1),
        "teacher": _normal(4, 8, seed=2),
        "teacher_prototypes": _normal(8, 8, seed=4),
        **_distillation(),
        "weights": torch.tensor([0.5, 1.0, 0.0, 2.0]),
    },
    "random_masking": lambda: {"x": _leaf(2, 6, 8), "mask_ratio": 0.5, "generator": torch.Generator().manual_seed(0)},
    "random_masking_ids": lambda: _masking(length=6),
    "redundancy_loss": lambda: _pair("z_a", "z_b", eps=1e-5, unbiased=False),
    "restore_tokens": lambda: {
        "x_visible": _leaf(2, 4, 8),
        "ids_restore": _ids(keep=6),
        "mask_token": _leaf(1, 1, 8),
        "pos_embed": _leaf(1, 6, 8),
    },
    "scatter_tokens": lambda: {"tokens": _leaf(2, 4, 8), "ids": _ids(), "length": 6, "fill": 0.5},
    "siglip_loss": lambda: _pair(
        "image_features",
        "text_features",
        logit_scale=torch.tensor(2.0, requires_grad=True),
        logit_bias=-1.0,
        reduction="mean",
        group=None,
    ),
    "similarity_logsumexp": lambda: {
        "x": _leaf(4, 8),
        "y": _leaf(5, 8, seed=1),
        "scale": 2.0,
        "exclude": torch.tensor([0, 1, -1, 7]),
        "offset": _leaf(4),
    },
    "span_masking_ids": lambda: _masking(length=6, span_length=2, lengths=torch.tensor([6, 4])),
    "sup_con": lambda: {
        "features": _leaf(4, 8),
        "labels": torch.tensor([0, 1, 0, 2]),
        "temperature": 0.2,
        "normalize": True,
        "reduction": "mean",
        "group": None,
    },
    "mask_tokens": lambda: {
        "input_ids": torch.arange(12).view(2, 6),
        "mask_token_id": 3,
        "vocab_size": 20,
        "probability": 0.5,
        "mask_share": 0.5,
        "random_share": 0.25,
        "special_tokens_mask": _mask(),
        "word_ids": torch.tensor([[0, 0, 1, 1, 2, -1], [0, 1, 2, 2, 2, 3]]),
        "generator": torch.Generator().manual_seed(0),
    },
    "sample_negatives": lambda: {
        "batch": 2,
        "length": 6,
        "num_negatives": 3,
        "mask": _mask(),
        "generator": torch.Generator().manual_seed(0),
        "device": "cpu",
    },
    "span_corruption": lambda: {
        "input_ids": torch.arange(12).view(2, 6),
        "first_sentinel_id": 19,
        "noise_density": 0.5,
        "mean_span_length": 1.5,
        "lengths": torch.tensor([6, 4]),
        "eos_token_id": 1,
        "pad_token_id": 0,
        "generator": torch.Generator().manual_seed(0),
    },
    "topk_similarity": lambda: {"query": _normal(4, 8), "bank": _normal(5, 8), "k": 2, "normalize": True},
    "sinkhorn_center": _teacher_logits,
    "sinkhorn_knopp": _teacher_logits,
    "tube_masking_ids": lambda: _masking(frames=2, length=6),
    "uniformity": lambda: {"x": _leaf(4, 8), "t": 2.0},
    "variance_loss": lambda: {"z": _leaf(4, 8), "eps": 1e-4, "unbiased": True},
    "update_center_": lambda: {
        "center": _normal(8),
        "teacher_logits": [_normal(4, 8, seed=1), _normal(2, 3, 8, seed=2)],
        "momentum": 0.9,
        "group": None,
    },
    "vicreg": lambda: _pair(
        "z_a",
        "z_b",
        lambda_param=2.0,
        mu_param=3.0,
        nu_param=1.0,
        eps=1e-4,
        unbiased=True,
        invariance_reduction="mean",
        variance_reduction="mean",
        return_metrics=True,
        group=None,
    ),
}
_WRITTEN = {
    "adamw_ema_step_": ("params", "exp_avgs", "exp_avg_sqs", "ema_params", "steps"),
    "ema_update_": ("targets",),
    "enqueue_": ("keys", "position"),
}
_NOT_COMPUTED = {"barlow_twins": ("lambda_param", "redundancy"), "vicreg": ("nu_param", "covariance")}  # at weight 0
_RANDOM = (
    "block_masking_ids",
    "linear_categorical",
    "mask_tokens",
    "random_masking",
    "random_masking_ids",
    "sample_negatives",
    "span_corruption",
    "span_masking_ids",
    "tube_masking_ids",
)


def _function(name: str) -> Call:
    function = getattr(functional, name)

    def run(**arguments: Any) -> Any:
        written = _WRITTEN.get(name, ())
        lists = {key: list(x) for key, x in arguments.items() if key in written and isinstance(x, Iterator)}
        result = function(**arguments | {key: iter(x) for key, x in lists.items()})
        if name in _NOT_COMPUTED and isinstance(result, tuple):
            weight, metric = _NOT_COMPUTED[name]
            if arguments[weight] == 0:
                del result[1][metric]
        return [(arguments | lists)[key] for key in written] if written else result

    return Call(name, FUNCTIONS[name], run, function, name in _RANDOM, kept=("steps",))


_CLIP = {
    "local_loss": False,
    "gather_with_grad": False,
    "cache_labels": False,
    "rank": 0,
    "world_size": 1,
    "use_horovod": False,
}

# Constructor arguments, forward arguments.
MODULES: dict[str, tuple[Callable[[], dict[str, Any]], Callable[[], dict[str, Any]]]] = {
    "BarlowTwinsLoss": (lambda: {"lambda_param": 0.01, "gather_distributed": False}, lambda: _pair("z_a", "z_b")),
    "ClipLoss": (
        lambda: {**_CLIP},
        lambda: _pair(
            "image_features",
            "text_features",
            logit_scale=torch.tensor(2.0, requires_grad=True),
            logit_bias=None,
            output_dict=False,
        ),
    ),
    "CoCaLoss": (
        lambda: {"caption_loss_weight": 2.0, "clip_loss_weight": 0.5, "pad_id": 0, **_CLIP},
        lambda: _pair(
            "image_features",
            "text_features",
            logits=_leaf(4, 3, 5, seed=2),
            labels=torch.tensor([[1, 2, 0], [4, 0, 0], [3, 3, 1], [1, 4, 2]]),
            logit_scale=torch.tensor(2.0, requires_grad=True),
            output_dict=False,
        ),
    ),
    "DistillClipLoss": (
        lambda: {**_CLIP},
        lambda: _pair(
            "image_features",
            "text_features",
            logit_scale=torch.tensor(2.0, requires_grad=True),
            dist_image_features=_normal(4, 6, seed=2),
            dist_text_features=_normal(4, 6, seed=3),
            dist_logit_scale=torch.tensor(3.0),
            output_dict=False,
        ),
    ),
    "DCLLoss": (
        lambda: {"temperature": 0.2, "weight_fn": _weight, "gather_distributed": False},
        lambda: _pair("out0", "out1"),
    ),
    "DCLWLoss": (
        lambda: {"temperature": 0.2, "sigma": 0.4, "gather_distributed": False},
        lambda: _pair("out0", "out1"),
    ),
    "DINOHead": (
        lambda: {
            "in_dim": 8,
            "out_dim": 6,
            "use_bn": False,
            "norm_last_layer": True,
            "nlayers": 3,
            "hidden_dim": 8,
            "bottleneck_dim": 4,
            "mlp_bias": True,
            "freeze_last_layer": 1,
        },
        lambda: {"x": _leaf(4, 8)},
    ),
    "DINOLoss": (
        lambda: {
            "output_dim": 8,
            "warmup_teacher_temp": 0.5,
            "teacher_temp": 0.4,
            "warmup_teacher_temp_epochs": 3,
            "student_temp": 0.5,
            "center_momentum": 0.9,
            "center_mode": "mean",
            "sinkhorn_iterations": 3,
            "center_once_per_step": False,
        },
        lambda: {
            "teacher_out": [_normal(4, 8, seed=1), _normal(4, 8, seed=2)],
            "student_out": [_leaf(4, 8, seed=3), _leaf(4, 8, seed=4), _leaf(4, 8, seed=5)],
            "teacher_temp": None,
            "epoch": 1,
        },
    ),
    "IBOTPatchLoss": (
        lambda: {
            "output_dim": 8,
            "teacher_temp": 0.4,
            "student_temp": 0.5,
            "center_mode": "mean",
            "center_momentum": 0.9,
            "sinkhorn_iterations": 3,
            "center_once_per_step": False,
        },
        lambda: {
            "teacher_out": _normal(3, 8, seed=1),
            "student_out": _leaf(3, 8, seed=2),
            "mask": torch.tensor([[[True, False], [True, True]]]),
            "teacher_temp": None,
        },
    ),
    "InfoNCELoss": (
        lambda: {
            "temperature": 0.2,
            "negative_mode": "unpaired",
            "in_batch_negatives": True,
            "symmetric": False,
            "normalize": True,
            "label_smoothing": 0.0,
            "reduction": "mean",
            "group": None,
        },
        lambda: _pair(
            "query",
            "positive_key",
            negative_keys=_leaf(5, 8, seed=2),
            negative_ids=torch.tensor([[0, 4], [2, -1], [3, 3], [1, 0]]),
        ),
    ),
    "KoLeoLoss": (lambda: {"p": 2, "eps": 1e-6}, lambda: {"x": _leaf(4, 8)}),
    "LinearCrossEntropyLoss": (
        lambda: {
            "in_features": 8,
            "num_classes": 5,
            "bias": True,
            "device": "cpu",
            "dtype": torch.float32,
            "reduction": "mean",
            "weight": _normal(5, seed=3).abs(),
            "ignore_index": -100,
            "label_smoothing": 0.1,
            "temperature": 0.5,
            "normalize": True,
            "linear_weight": nn.Parameter(_normal(5, 8, seed=1)),
        },
        lambda: {"input": _leaf(4, 8), "target": torch.tensor([0, 4, -100, 2])},
    ),
    "MSNLoss": (
        lambda: {
            "temperature": 0.5,
            "sinkhorn_iterations": 3,
            "regularization_weight": 0.5,
            "gather_distributed": False,
        },
        lambda: {
            "anchors": _leaf(4, 8),
            "targets": _normal(2, 8, seed=1),
            "prototypes": _leaf(5, 8, seed=2),
            "target_sharpen_temperature": 0.25,
        },
    ),
    "MemoryBankModule": (
        lambda: {"size": (5, 8), "gather_distributed": False, "feature_dim_first": True},
        lambda: {"output": _leaf(4, 8), "labels": None, "update": True},
    ),
    "NTXentLoss": (
        lambda: {"temperature": 0.5, "memory_bank_size": (5, 8), "gather_distributed": False},
        lambda: _pair("out0", "out1"),
    ),
    "PatchEmbed": (
        lambda: {
            "img_size": (4, 6),
            "patch_size": 2,
            "in_chans": 3,
            "embed_dim": 8,
            "norm_layer": nn.LayerNorm,
            "flatten": True,
            "output_fmt": None,
            "bias": True,
            "strict_img_size": True,
            "dynamic_img_pad": False,
            "device": "cpu",
            "dtype": torch.float32,
            "tubelet_size": None,
        },
        lambda: {"images": _leaf(2, 3, 4, 6), "ids_keep": _ids()},
    ),
    "SigLipLoss": (
        lambda: {"cache_labels": False, "rank": 0, "world_size": 1, "dist_impl": None, "chunk_size": 0},
        lambda: _pair(
            "image_features",
            "text_features",
            logit_scale=torch.tensor(2.0, requires_grad=True),
            logit_bias=torch.tensor(-1.0, requires_grad=True),
            output_dict=False,
        ),
    ),
    "SupConLoss": (
        lambda: {"temperature": 0.2, "contrast_mode": "all", "base_temperature": 0.07},
        lambda: {"features": _leaf(4, 2, 8), "labels": torch.tensor([0, 1, 0, 2]), "mask": None},
    ),
    "SwaVLoss": (
        lambda: {
            "temperature": 0.5,
            "sinkhorn_iterations": 3,
            "sinkhorn_epsilon": 0.4,
            "sinkhorn_gather_distributed": False,
        },
        lambda: {
            "high_resolution_outputs": [_leaf(4, 8), _leaf(4, 8, seed=1)],
            "low_resolution_outputs": [_leaf(4, 8, seed=2)],
            "queue_outputs": [_normal(3, 8, seed=3), _normal(3, 8, seed=4)],
        },
    ),
    "VICRegLoss": (
        lambda: {"lambda_param": 2.0, "mu_param": 3.0, "nu_param": 1.0, "gather_distributed": False, "eps": 1e-4},
        lambda: _pair("z_a", "z_b"),
    ),
}


def _module(name: str) -> list[Call]:
    build, inputs = MODULES[name]
    cls = getattr(modules, name)

    def construct(change: Change, **arguments: Any) -> Any:
        torch.manual_seed(0)
        return cls(**arguments)(**{name: change(x) for name, x in inputs().items()})

    def forward(change: Change, **arguments: Any) -> Any:
        torch.manual_seed(0)
        return change(cls(**build()))(**arguments)

    # A center in float32 says nothing at a temperature of 1e-8.
    random = name in ("MSNLoss", "SwaVLoss")
    made = Call(name, build, construct, cls.__init__, random, others=tuple(inputs()), has_tensors=True)
    return [made, Call(f"{name}.forward", inputs, forward, cls.forward, random, has_tensors=True)]


class _Encoder(nn.Linear):
    def forward(self, x: Any) -> Any:
        try:
            return super().forward(x)
        except Exception as error:
            raise TheirOwn from error


def _encoder() -> nn.Module:
    torch.manual_seed(0)
    return _Encoder(8, 8)


def _loss_of_embeddings(*embeddings: Any) -> Any:
    try:
        return functional.nt_xent(*embeddings)
    except Exception as error:
        raise TheirOwn from error


def _teacher(**arguments: Any) -> Any:
    student = arguments["model"]
    teacher = modules.EMA(**arguments)
    teacher.update(student)
    return list(teacher.module.parameters())


def _update_teacher(**arguments: Any) -> Any:
    teacher = modules.EMA(_encoder(), momentum=0.9)
    teacher.update(**arguments)
    return list(teacher.module.parameters())


def _bank(**arguments: Any) -> Any:
    torch.manual_seed(0)
    bank = modules.MemoryBank(**arguments)
    bank.update(_normal(3, 8).to(bank.keys.dtype))
    return bank.keys


def _update_bank(keys: Any) -> Any:
    torch.manual_seed(0)
    bank = modules.MemoryBank(5, 8)
    bank.update(keys)
    return bank.keys


def _adamw_arguments() -> dict[str, Any]:
    student = _encoder()
    return {
        "params": list(student.parameters()),
        "lr": 1e-3,
        "betas": (0.9, 0.99),
        "eps": 1e-8,
        "weight_decay": 0.01,
        "amsgrad": False,
        "maximize": False,
        "foreach": None,
        "capturable": False,
        "differentiable": False,
        "fused": None,
        "teacher": modules.EMA(student, momentum=0.9),
        "student": student,
    }


def _adamw(**arguments: Any) -> Any:
    optimizer = AdamW(**arguments)
    student = arguments["student"]
    student(_normal(4, 8).to(next(student.parameters()).dtype)).square().mean().backward()
    optimizer.step()
    return [p for group in optimizer.param_groups for p in group["params"]]


def _grad_cache_arguments() -> dict[str, Any]:
    return {
        "encoders": (_encoder(), _encoder()),
        "inputs": (_normal(5, 8), _normal(5, 8, seed=1)),
        "loss_fn": _loss_of_embeddings,
        "chunk_size": 2,
    }


def _use_backend(name: Any) -> Any:
    with fastssl.use_backend(name):
        return functional.nt_xent(_normal(4, 8), _normal(4, 8, seed=1))


CALLS: list[Call] = [
    *map(_function, FUNCTIONS),
    *(call for name in MODULES for call in _module(name)),
    Call(
        "EMA",
        lambda: {
            "model": _encoder(),
            "momentum": 0.9,
            "schedule": "warmup",
            "total_steps": None,
            "warmup_gamma": 1.0,
            "warmup_power": 0.5,
            "update_buffers": True,
            "decay": None,
        },
        _teacher,
        modules.EMA.__init__,
    ),
    Call("EMA.update", lambda: {"model": _encoder(), "step": 3}, _update_teacher, modules.EMA.update),
    Call(
        "MemoryBank",
        lambda: {
            "size": 5,
            "dim": 8,
            "gather_distributed": False,
            "normalize": True,
            "dtype": torch.float32,
            "device": "cpu",
        },
        _bank,
        modules.MemoryBank.__init__,
        others=("keys",),
    ),
    Call("MemoryBank.update", lambda: {"keys": _normal(3, 8)}, _update_bank, modules.MemoryBank.update),
    Call("AdamW", _adamw_arguments, _adamw, AdamW.__init__),
    Call("grad_cache", _grad_cache_arguments, fastssl.grad_cache, fastssl.grad_cache),
    Call("use_backend", lambda: {"name": "portable"}, _use_backend, fastssl.use_backend),
]
