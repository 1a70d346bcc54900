"""MAE: masked autoencoders are scalable vision learners (arXiv:2111.06377)."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl.distributed import ProcessGroup
from fastssl.functional import masked_patch_loss, random_masking_ids, restore_tokens
from fastssl.train.data.augment import CROPPED, to_float
from fastssl.train.data.draw import Draw
from fastssl.train.data.images import Images
from fastssl.train.device import move
from fastssl.train.method import Method
from fastssl.train.networks.vit import ViT, layers, patch_size_of, position_embedding


class MAE(Method):
    """See a quarter of an image's patches, and paint the others. The encoder sees nothing else; the decoder is light.

    Args:
        mask_ratio: the share of patches that is hidden: at least one is, and not all.
        norm_pix_loss: whether each patch to paint is standardised: minus its mean, divided by its standard deviation.
        size, colours: of the images.
    """

    learning_rate = 1e-3
    weight_decay = 0.05
    augmentations = (CROPPED,)

    def __init__(
        self, *, mask_ratio: float = 0.75, norm_pix_loss: bool = True, size: int = 28, colours: int = 1
    ) -> None:
        super().__init__()
        self.patch_size = patch_size_of(size)
        self.mask_ratio, self.norm_pix_loss = mask_ratio, norm_pix_loss
        side, features = size // self.patch_size, 48
        if not 0 < int(side**2 * (1 - mask_ratio)) < side**2:
            raise ValueError(f"mask_ratio must hide at least one of {side**2} patches, and not all, got {mask_ratio}")
        self.encoder = ViT(size, self.patch_size, colours)
        self.to_decoder = nn.Linear(self.encoder.features, features)
        self.mask_token = nn.Parameter(0.02 * torch.randn(features))
        self.register_buffer("pos_embed", position_embedding(side, features), persistent=False)
        self.decoder = nn.Sequential(layers(1, features, heads=4), nn.Linear(features, colours * self.patch_size**2))

    def views(self, batch: Tensor, draw: Draw) -> tuple[Tensor, ...]:
        """uint8 images -> cropped and mirrored images; which patches stay, all patches' places, and mask."""
        draw = Draw.of(draw, batch)
        (images,) = super().views(batch, draw)
        return images, *draw.own(self.mask(draw.examples, draw.generator))

    def mask(self, images: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """ids_keep, ids_restore and mask, at random."""
        ids_keep, mask, ids_restore = random_masking_ids(
            images, len(self.pos_embed), self.mask_ratio, generator=generator
        )
        return ids_keep, ids_restore, mask

    def forward(self, images: Tensor, ids_keep: Tensor, ids_restore: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        visible = self.to_decoder(self.encoder(images, ids_keep))
        return self.decoder(restore_tokens(visible, ids_restore, self.mask_token, self.pos_embed)), images, mask

    def loss(self, prediction: Tensor, images: Tensor, mask: Tensor, group: ProcessGroup | None = None) -> Tensor:
        return masked_patch_loss(prediction, images, mask, self.patch_size, norm_pix_loss=self.norm_pix_loss)

    @torch.no_grad()
    def pictures(self, dataset: Images, path: Path, count: int = 10) -> None:
        """Draw test images as the encoder sees them, as the decoder paints them, and as they are, into a PNG file."""
        from matplotlib.figure import Figure

        self.eval()
        images = to_float(dataset.test[:count])
        count, colours = images.shape[:2]
        ids_keep, ids_restore, mask = self.mask(count, torch.Generator().manual_seed(0))
        painted = self(*move((images, ids_keep, ids_restore, mask), self.device))[0].cpu()
        patches = F.unfold(images, self.patch_size, stride=self.patch_size).transpose(1, 2)
        painted = painted.unflatten(2, (-1, colours)).transpose(2, 3).flatten(2)  # colours first, as unfold has them
        if self.norm_pix_loss:  # the decoder knows no patch's mean and deviation: here they are the true ones
            painted = painted * (patches.var(2, keepdim=True) + 1e-6).sqrt() + patches.mean(2, keepdim=True)
        hidden = mask.bool().unsqueeze(2)
        rows = {"seen": patches.masked_fill(hidden, 0.5), "painted": painted.where(hidden, patches), "true": patches}
        figure = Figure(figsize=(count, 3), layout="constrained")
        for line, (label, pixels) in zip(figure.subplots(3, count), rows.items(), strict=True):
            line[0].set_ylabel(label)
            pixels = F.fold(pixels.transpose(1, 2), images.shape[2:], self.patch_size, stride=self.patch_size)
            for axes, image in zip(line, pixels, strict=True):
                axes.imshow(image.permute(1, 2, 0).clamp(0, 1).numpy(), cmap="gray", vmin=0, vmax=1)
                axes.set(xticks=[], yticks=[])
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=100, format="png")
        self.train()

    def monitored(self, prediction: Tensor, images: Tensor, mask: Tensor) -> tuple[Tensor]:
        return (prediction.flatten(1),)
