"""CLIP on emoji and their names, by open_clip's own training loop, in bfloat16 and with a GradScaler."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from types import SimpleNamespace

import torch
from compare import compare

from fastssl.train.data import pairs

LENGTH = 16  # tokens of a name


def train(options: argparse.Namespace) -> Iterator[float]:
    import open_clip
    from open_clip_train.train import train_one_epoch

    torch.manual_seed(options.seed)
    _, emoji, _, _ = pairs.read(options.data)
    images = torch.stack([pair.image for pair in emoji])
    texts = open_clip.SimpleTokenizer(context_length=LENGTH)([pair.caption for pair in emoji])
    model = open_clip.CLIP(
        embed_dim=512,
        vision_cfg={"image_size": images.shape[-1], "patch_size": 8, "width": 128, "layers": 2, "head_width": 32},
        text_cfg={"context_length": LENGTH, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 1},
        output_dict=True,
    )
    args = SimpleNamespace(
        accum_freq=1, batch_size=options.batch_size, device="cpu", distill=False, gather_with_grad=False,
        grad_clip_norm=1.0, horovod=False, local_loss=False, log_every_n_steps=1, model="emoji", precision="amp_bf16",
        rank=0, siglip=False, skip_scheduler=True, wandb=False, world_size=1,
    )  # fmt: skip
    loss, log = open_clip.create_loss(args), {}
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.1, betas=(0.9, 0.98))
    scaler = torch.amp.GradScaler("cpu")
    for step in range(options.steps):
        rows = torch.randint(len(images), (options.batch_size,))
        batches = _Loader([(images[rows] / 255, texts[rows])])  # an epoch of one, to see the loss of each
        data = {"train": SimpleNamespace(dataloader=batches, set_epoch=lambda epoch: None)}
        writer = SimpleNamespace(add_scalar=lambda name, value, step: log.update({name: value}))
        train_one_epoch(model, data, loss, step, optimizer, scaler, None, None, args, writer)
        yield log["train/loss"]


class _Loader(list):
    num_batches = 1

    @property
    def num_samples(self) -> int:
        return len(self[0][0])


if __name__ == "__main__":
    compare("open_clip", train, rounding=1e-2, batch_size=1024, steps=20)
