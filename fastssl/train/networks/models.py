"""Small networks that a CPU can train in minutes, and timm's."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from torch import Tensor, nn

_backbone: ContextVar[list[nn.Module] | None] = ContextVar("backbone", default=None)


@contextlib.contextmanager
def backbone(name: str | None, size: int) -> Iterator[None]:
    """A method that is made in this block gets timm's model of that name as its `image_encoder`.

    Args:
        name: None: `Encoder`.
        size: of the images.

    Raises:
        ValueError: if timm is not installed or has no such model, it cannot take the images, or nothing in the block
            asked for it.
    """
    if name is None:
        yield
        return
    models = [Timm(name, size)]
    token = _backbone.set(models)
    try:
        yield
    finally:
        _backbone.reset(token)
    if models:
        raise ValueError(f"backbone must be None for a method that has an encoder of its own, got {name!r}")


def image_encoder() -> nn.Module:
    """The encoder that `backbone` chose, by default an `Encoder`; its width is `features`."""
    models = _backbone.get()
    return models.pop() if models else Encoder()


class Timm(nn.Module):
    """A model of timm without its classifier: (B, 3, H, W) images, or grey (B, 1, H, W) -> (B, `features`).

    Args:
        name: as `timm.list_models()` has it.
        size: of the images, for models that must know it. Vision transformers interpolate their positions for others.
    """

    def __init__(self, name: str, size: int) -> None:
        super().__init__()
        try:
            import timm
        except (ImportError, RuntimeError) as error:
            raise ValueError(f"backbone needs timm (pip install timm), which cannot be imported: {error}") from None
        if not timm.is_model(name):
            raise ValueError(f"backbone must be the name of a model of timm, got {name!r}")
        for sizes in ({"img_size": size, "dynamic_img_size": True}, {"img_size": size}, {}):
            with contextlib.suppress(TypeError):  # of convolutions, which take any size
                self.model = timm.create_model(name, num_classes=0, **sizes)
                break
        patches = getattr(self.model, "patch_embed", None)
        if isinstance(patches, timm.layers.PatchEmbed) and any(size % side for side in patches.patch_size):
            raise ValueError(f"backbone must have patches that divide images of size {size}, got {name!r}")
        try:
            with torch.no_grad():
                self.features = self.model.eval()(torch.zeros(1, 3, size, size)).shape[1]
        except (AssertionError, RuntimeError) as error:
            raise ValueError(f"backbone must take images of size {size}, got {name!r}: {error}") from None
        self.model.train()

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images.expand(-1, 3, -1, -1))


class Encoder(nn.Sequential):
    """Four strided convolutions and average pooling: (B, 3, H, W) images, or grey (B, 1, H, W) -> (B, `features`)."""

    def __init__(self, features: int = 256) -> None:
        channels = (3, 32, 64, 128, features)
        layers = []
        for inputs, outputs in zip(channels[:-1], channels[1:], strict=True):
            layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(outputs)]
            layers += [nn.ReLU(inplace=True)]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.features = features
        self.to(memory_format=torch.channels_last)  # in which its convolutions are faster on CPUs

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images.expand(-1, 3, -1, -1))

    def stages(self) -> list[nn.Module]:
        """Its stages, from input to output: a convolution and what follows it."""
        return [nn.Sequential(*list(self)[place : place + 3]) for place in (0, 3, 6, 9)]


class BagOfWords(nn.Module):
    """(B, L) int64 tokens, 0 for padding -> (B, `features`), the mean of the words' vectors, after dropout."""

    def __init__(self, vocabulary: int, features: int = 256, dropout: float = 0.0) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, features, padding_idx=0)
        nn.init.normal_(self.words.weight[1:], std=0.05)
        self.dropout = nn.Dropout(dropout)
        self.features = features

    def forward(self, tokens: Tensor) -> Tensor:
        words = (tokens != 0).sum(1, keepdim=True)
        return self.dropout(self.words(tokens)).sum(1) / words.clamp_min(1)


def mlp(*widths: int, last_norm: bool = False) -> nn.Sequential:
    """Linear layers from each width to the next, batch normalisation and ReLU between them: the methods' heads.

    Args:
        widths: of the input, the hidden layers and the output.
        last_norm: normalise the output too, without a scale and a shift of its own.
    """
    *hidden, outputs = widths
    layers = []
    for inputs, width in zip(hidden[:-1], hidden[1:], strict=True):
        layers += [nn.Linear(inputs, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(inplace=True)]
    layers.append(nn.Linear(hidden[-1], outputs, bias=not last_norm))
    if last_norm:
        layers.append(nn.BatchNorm1d(outputs, affine=False))
    return nn.Sequential(*layers)
