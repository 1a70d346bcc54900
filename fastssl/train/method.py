"""What every method is made of, and what the training loop needs from methods and data.

A method is a `Method`, a torch.nn.Module. One step of `fastssl.train.fit` calls, in this order,

    views(batch, draw) -> inputs            a process's examples of a batch -> the model's inputs, random
    forward(*inputs) -> embeddings          the networks: a tuple of tensors, of which at least one has a gradient;
                                            others are constants of the loss, such as a teacher's output or labels
    loss(*embeddings) -> 0-d tensor         what the method is about, separate so that it can be measured alone
    after_step(*embeddings)                 after the optimiser's step: moves the teacher, fills the queue

inputs and embeddings are tensors with a row for each example of the batch. Parameters that the optimiser does not
train, such as a teacher's, do not require gradients. Everything that a step depends on must be in state_dict, for
checkpoints. Random numbers come from `draw` (`fastssl.train.data.draw`), which has for each example what it has in
the whole batch, or from PyTorch's default one (dropout), which has a seed for each step. Where the second argument
is called generator, `views` gets the whole batch, on the CPU, and a torch.Generator, and each process takes its share
of what is returned.

The data are anything with len() that can be indexed by an int64 tensor of positions: data[positions] is the batch that
`views` gets. Examples are a tensor of images, and torch.utils.data.TensorDataset(images, labels), whose batches are
tuples.

In several processes, each calls forward with its share of the inputs. A loss that has an argument `group` gets the
embeddings of that share and the processes' group, and returns a number whose mean over the processes is the loss of the
batch; where losses of rows are independent, that of its rows. Others get the embeddings of the whole batch. So does
after_step, and with the naive implementation, whose losses know of no group, every method; then group is None. See
`fastssl.train.parallel`.

`fastssl.train.create` calls `prepare(dataset)`, for what is not learned by steps.

The command line also calls `load`, `training_data` and `evaluate`, which say what data a method learns from and what it
is worth; they have defaults for images. Its options are the arguments of the method's constructor: each has a type
annotation, float, int or bool, a default, and a line under "Args:". `total_steps` is not an option but the length of
the run; `size`, `colours` and `classes` are those of the images, `vocabulary` that of the text. If there is
`samples(dataset)`, it prints these texts at the end. `--impl naive` runs the step, but not its views, in the backend
"reference" of `fastssl.use_backend`: a method calls the functions and modules of fastssl and nothing else for its
losses, moving averages and queues. Views, masks among them, and measurements are the same in both.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from fastssl.train import evaluate
from fastssl.train.data import images
from fastssl.train.data.augment import Augmentation
from fastssl.train.data.draw import Draw

IMPLEMENTATIONS = {"fastssl": "auto", "naive": "reference"}  # name -> the backend of fastssl.use_backend
GIVEN = {
    "total_steps",
    "size",
    "colours",
    "classes",
    "vocabulary",
}  # arguments that run and data decide


class Method(nn.Module):
    """A method of self-supervised learning: networks, views of the data, a loss. See the module's docstring.

    A subclass sets `encoder` and has `views`, `forward` and `loss`; everything else that it may replace has a default
    here.

    Attributes:
        encoder: the network that the training is for: inputs -> (B, features), or tokens (B, L, features), whose mean
            is used. If it has `stages()`, its parts from input to output, each may have a learning rate of its own
            (`layer_decay`).
        impl: what computes the losses and moving averages, "fastssl", or "naive", eager PyTorch as papers write it.
            Views and measurements are the same.
        options: the arguments with which `fastssl.train.create` made it. A checkpoint fits only a method with the same
            ones.
        batch_size: the command line's default.
        learning_rate, weight_decay, final_weight_decay: AdamW's defaults for this method; the last None: the decay
            does not change.
        augmentations: what `views` makes of an image, view by view; empty where it takes none of them.
        progress: the share of the run that is done, which the loop sets before each step, for schedules.
    """

    encoder: nn.Module
    impl = "fastssl"
    options: Mapping[str, Any] = MappingProxyType({})
    batch_size = 1024
    learning_rate = 2e-3
    weight_decay = 1e-4
    final_weight_decay: float | None = None
    augmentations: tuple[Augmentation, ...] = ()
    progress = 0.0

    @staticmethod
    def load(directory: str | None, size: int | None = None) -> Any:
        """The data set: an object with a `name` that says what it is, from which the next two methods take data. Where
        it has an argument `size`, that of images may be chosen."""
        return images.load(directory, size)

    def prepare(self, dataset: Any) -> None:
        """Called once by `create`: what is learned from the data set before the first step, such as a codebook. It must
        be the same each time, and be kept in state_dict."""

    @staticmethod
    def training_data(dataset: Any) -> Any:
        """What `fit` trains on: it has len(), and gives a batch when it is indexed by an int64 tensor of positions."""
        return dataset.train

    def evaluate(self, dataset: Any) -> dict[str, float]:
        """What the encoder is worth: shares, by the name of the test."""
        return evaluate.accuracies(self.encoder, dataset)

    def views(self, batch: Any, draw: Draw) -> tuple[Tensor, ...]:
        """Examples of a batch -> the model's inputs, with what is random drawn from `draw`; by default (B, H, W) grey
        or (B, 3, H, W) uint8 images -> a view by each of the augmentations."""
        return tuple(augment(batch, draw) for augment in self.augmentations)

    @property
    def device(self) -> torch.device:
        """Where its parameters are."""
        return next(self.parameters()).device

    def loss(self, *embeddings: Tensor) -> Tensor:
        """What `forward` returned -> 0-d loss. See the module's docstring for an argument `group`."""
        raise NotImplementedError

    def after_step(self, *embeddings: Tensor) -> None:
        """Called after the optimiser's step with what `loss` was given: moves a teacher, fills a queue."""

    def monitored(self, *embeddings: Tensor) -> Sequence[Tensor]:
        """What `loss` was given -> (B, D) embeddings of one view or of two, in which `fit` looks for a collapse."""
        return embeddings[:2]

    def assignments(self, *embeddings: Tensor) -> Tensor | None:
        """What `loss` was given -> (B, K), the teacher's distributions over prototypes, where `fit` does so too; None
        for methods that have none."""
        return None


def twins(method: Method) -> dict[str, Method]:
    """The method and its copy with the same weights, one for each implementation."""
    both = {"naive": copy.deepcopy(method), "fastssl": method}
    for impl, twin in both.items():
        twin.impl = impl
    return both
