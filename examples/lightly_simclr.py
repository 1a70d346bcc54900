"""SimCLR by lightly's parts and Lightning's trainer, on Fashion-MNIST."""

from __future__ import annotations

import argparse
import logging
import queue
import threading
from collections.abc import Iterator

import torch
from compare import compare
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from fastssl.train.data import images

END = object()


def train(options: argparse.Namespace) -> Iterator[float]:
    import pytorch_lightning as pl
    from lightly.loss import NTXentLoss
    from lightly.models import ResNetGenerator
    from lightly.models.modules import SimCLRProjectionHead

    class SimCLR(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = ResNetGenerator("resnet-9", width=0.125)
            self.backbone.linear = torch.nn.Identity()
            self.head = SimCLRProjectionHead(64, 256, 128)
            self.criterion = NTXentLoss()

        def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
            grey = batch[0].unsqueeze(1) / 255
            loss = self.criterion(*(self.head(self.backbone(_view(grey).expand(-1, 3, -1, -1))) for _ in range(2)))
            losses.put(loss.item())
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            # Faster, its losses grow apart by more than rounding: so do lightly's own, after a change of 1e-6.
            return torch.optim.AdamW(self.parameters(), lr=1e-4)

    def fit() -> None:
        try:
            trainer.fit(SimCLR(), loader)
            losses.put(END)
        except BaseException as error:
            losses.put(error)

    torch.manual_seed(options.seed)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    data = TensorDataset(images.load(options.data).train)
    sampler = RandomSampler(data, replacement=True, num_samples=options.steps * options.batch_size)
    loader = DataLoader(data, options.batch_size, sampler=sampler)
    quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", **quiet)
    losses: queue.Queue = queue.Queue(1)  # of the trainer, which has a loop of its own
    threading.Thread(target=fit, daemon=True).start()
    while (loss := losses.get()) is not END:
        if isinstance(loss, BaseException):
            raise loss
        yield loss


def _view(x: torch.Tensor) -> torch.Tensor:
    """Each image shifted, flipped, and with another contrast."""
    n, _, height, width = x.shape
    padded = torch.nn.functional.pad(x, (4,) * 4)
    rows, columns = (torch.randint(9, (n, 1)) + torch.arange(size) for size in (height, width))
    columns = torch.where(torch.rand(n, 1) < 0.5, columns, columns.flip(1))
    x = padded[torch.arange(n).view(n, 1, 1), 0, rows.unsqueeze(2), columns.unsqueeze(1)].unsqueeze(1)
    return x * (0.4 + 1.2 * torch.rand(n, 1, 1, 1))


if __name__ == "__main__":
    compare("lightly", train, rounding=1e-4, batch_size=512, steps=20)
