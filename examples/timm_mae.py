"""A masked autoencoder of timm's vision transformer, by lightly's parts, with timm's moving average of it."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator

import torch
from compare import compare

from fastssl.train.data import images

PATCH, DIM = 4, 128


def train(options: argparse.Namespace) -> Iterator[float]:
    from lightly.models import utils
    from lightly.models.modules import MAEDecoderTIMM, MaskedVisionTransformerTIMM
    from timm.models.vision_transformer import VisionTransformer
    from timm.utils import ModelEmaV3

    warnings.filterwarnings("ignore", "MAEDecoderTIMM is deprecated")
    torch.manual_seed(options.seed)
    data = images.load(options.data).train
    vit = VisionTransformer(data.shape[-1], PATCH, in_chans=1, embed_dim=DIM, depth=3, num_heads=4, num_classes=0)
    encoder, count = MaskedVisionTransformerTIMM(vit), vit.patch_embed.num_patches
    decoder = MAEDecoderTIMM(count, PATCH, 1, DIM, decoder_embed_dim=64, decoder_depth=1, decoder_num_heads=4)
    model = torch.nn.ModuleList([encoder, decoder])
    optimizer, average = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95)), ModelEmaV3(model, 0.999)
    kept = 1 + count // 4
    for step in range(options.steps):
        batch = data[torch.randint(len(data), (options.batch_size,))].unsqueeze(1) / 255
        # As utils.random_token_mask does; ours draws other masks from the same seed, so losses could not be compared.
        order = torch.cat([torch.full((len(batch), 1), -1.0), torch.rand(len(batch), count)], 1).argsort(1)
        keep, mask = order[:, :kept], order[:, kept:]
        visible = decoder.embed(encoder.encode(batch, idx_keep=keep))
        tokens = utils.repeat_token(decoder.mask_token, (len(batch), count + 1))
        tokens = decoder.decode(utils.set_at_index(tokens, keep, visible.type_as(tokens)))
        predicted = decoder.predict(utils.get_at_index(tokens, mask))
        target = utils.get_at_index(utils.patchify(batch, PATCH), mask - 1)  # without the class token
        loss = torch.nn.functional.mse_loss(predicted, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update(model, step)
        yield loss.item()


if __name__ == "__main__":
    compare("lightly timm", train, rounding=1e-3, batch_size=256, steps=20)
