"""A moving average and grad_cache in Lightning's loop, with resume."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.ops import peers
from fastssl.functional import nt_xent
from fastssl.nn import EMA

try:
    pl = peers.pytorch_lightning()
except ImportError as error:
    pytest.skip(str(error), allow_module_level=True)

from fastssl.integrations.lightning import EMACallback, grad_cache

logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
pytestmark = pytest.mark.filterwarnings("ignore")


class Model(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 4))
        self.weights: list[torch.Tensor] = []  # after every step of the optimiser
        self.validated: list[torch.Tensor] = []  # what validation ran with

    def training_step(self, batch, batch_idx):
        return self.backbone(batch[0]).square().mean()

    def validation_step(self, batch, batch_idx):
        self.validated.append(self.backbone[0].weight.clone())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.05)


class GradCacheModel(Model):
    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        views = batch[0], batch[0].flip(1)
        self.loss = grad_cache(self, (self.backbone, self.backbone), views, nt_xent, chunk_size=4)
        optimizer.step()


class _Steps(pl.Callback):
    """Plain moving average of what the optimiser makes, for comparison."""

    def __init__(self, model: Model, **options) -> None:
        self.teacher, self.before = EMA(model.backbone, **options), 0

    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.global_step > self.before:
            self.before = trainer.global_step
            self.teacher.update(pl_module.backbone)


def _trainer(path, *callbacks, **options):
    quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)
    return pl.Trainer(default_root_dir=path, accelerator="cpu", callbacks=list(callbacks), **quiet, **options)


def _data(seed: int = 0) -> DataLoader:
    x = torch.randn(48, 6, generator=torch.Generator().manual_seed(seed))
    return DataLoader(TensorDataset(x), batch_size=8)


def test_ema_callback(tmp_path):
    """Moves with the optimiser's steps, not with batches; validates; resumes with the same numbers."""
    torch.manual_seed(0)
    model = Model()
    options = dict(momentum=0.8, schedule="cosine", total_steps=9)
    callback, plain = EMACallback("backbone", **options), _Steps(model, **options)
    start, fresh = copy.deepcopy(model), copy.deepcopy(model)
    _trainer(tmp_path, plain, callback, max_epochs=3, accumulate_grad_batches=2).fit(model, _data(), _data())
    assert callback.teacher.step == 9
    torch.testing.assert_close(callback.teacher.state_dict(), plain.teacher.state_dict(), rtol=0, atol=0)
    average = callback.teacher.module[0].weight
    assert torch.equal(model.validated[-1], average) and not torch.equal(model.backbone[0].weight, average)

    resumed = EMACallback("backbone", **options)
    trainer = _trainer(tmp_path, resumed, max_epochs=2, accumulate_grad_batches=2)
    trainer.fit(start, _data())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    again = EMACallback("backbone", **options)
    trainer = _trainer(tmp_path, again, max_epochs=3, accumulate_grad_batches=2)
    trainer.fit(fresh, _data(), ckpt_path=tmp_path / "half.ckpt")
    assert again.teacher.step == 9
    torch.testing.assert_close(again.teacher.state_dict(), callback.teacher.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(fresh.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_evaluation_of_a_checkpoint_runs_with_the_average(tmp_path):
    model, callback = Model(), EMACallback(momentum=0.5)
    trainer = _trainer(tmp_path, callback, max_epochs=1)
    trainer.fit(model, _data())
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    other, loaded = Model(), EMACallback(momentum=0.5)
    _trainer(tmp_path, loaded).validate(other, _data(), ckpt_path=tmp_path / "end.ckpt", verbose=False)
    assert torch.equal(other.validated[0], callback.teacher.module.backbone[0].weight)
    torch.testing.assert_close(other.state_dict(), model.state_dict(), rtol=0, atol=0)  # back in their place

    class Breaks(Model):
        def validation_step(self, batch, batch_idx):
            trainer.save_checkpoint(tmp_path / "within.ckpt")
            raise ZeroDivisionError

    broken = Breaks()
    broken.load_state_dict(model.state_dict())
    trainer = _trainer(tmp_path, callback)
    with pytest.raises(ZeroDivisionError):
        trainer.validate(broken, _data(), verbose=False)
    torch.testing.assert_close(broken.state_dict(), model.state_dict(), rtol=0, atol=0)
    within = torch.load(tmp_path / "within.ckpt", weights_only=False)["state_dict"]
    torch.testing.assert_close(dict(within), dict(model.state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_grad_cache_in_a_training_step(precision, tmp_path):
    torch.manual_seed(0)
    model = GradCacheModel()
    model.backbone[1] = nn.LayerNorm(5)  # batch normalisation takes the statistics of a chunk
    plain = copy.deepcopy(model.backbone)
    _trainer(tmp_path, max_epochs=1, limit_train_batches=3, precision=precision).fit(model, _data())
    optimizer = torch.optim.Adam(plain.parameters(), lr=0.05)
    for (x,), _ in zip(_data(), range(3), strict=False):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            loss = nt_xent(plain(x), plain(x.flip(1)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    close = {"rtol": 1e-2, "atol": 1e-2} if precision == "bf16-mixed" else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(model.loss, loss.detach(), **close)
    torch.testing.assert_close(model.backbone.state_dict(), plain.state_dict(), **close)


def test_grad_cache_scales_the_loss_in_float16_and_reduces(tmp_path):
    """What needs a GPU or several processes in earnest: the calls that are made."""
    model = GradCacheModel()
    model.backbone[1] = nn.Identity()
    x = torch.randn(8, 6)
    nt_xent(model.backbone(x), model.backbone(x.flip(1))).backward()
    expected = [2 * 8 * p.grad for p in model.backbone.parameters()]
    model.zero_grad()

    class Trainer:
        world_size = 2

        class precision_plugin:
            pre_backward = staticmethod(lambda loss, module: 8 * loss)

        class strategy:
            reduce = staticmethod(lambda x, reduce_op: 2 * x if reduce_op == "mean" else None)

    model._trainer = Trainer()
    type(model).trainer, before = property(lambda self: self._trainer), type(model).__dict__.get("trainer")
    try:
        loss = grad_cache(model, (model.backbone,) * 2, (x, x.flip(1)), nt_xent, chunk_size=3)
    finally:
        del type(model).trainer
    torch.testing.assert_close([p.grad for p in model.backbone.parameters()], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss, nt_xent(model.backbone(x), model.backbone(x.flip(1))).detach())
    assert before is None
    with pytest.raises(ValueError, match="automatic_optimization must be False"):
        grad_cache(Model(), model.backbone, x, lambda z: F.mse_loss(z, z), chunk_size=3)
