"""`python -m fastssl.train METHOD`: train one method on real data and say what its features are worth.

torchrun runs it in several processes (`torchrun --nproc-per-node 2 -m fastssl.train METHOD`): see
`fastssl.train.parallel`.
"""

from __future__ import annotations

import argparse
import copy
import inspect
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fastssl.distributed import rank
from fastssl.train import METHODS, Run, checkpoint, cli, create, fit, fsdp, parallel
from fastssl.train.cli import Parser, RunParser, not_negative_float, positive_float, positive_int, share
from fastssl.train.data.augment import Augmentation
from fastssl.train.device import choose
from fastssl.train.files import check_writable, open_regular
from fastssl.train.method import GIVEN, IMPLEMENTATIONS
from fastssl.train.optimizers import OPTIMIZERS
from fastssl.train.run import AMP


def _parser() -> Parser:
    """A command for each method, which takes the arguments of its constructor as options."""
    parser = Parser("python -m fastssl.train", description="Train a self-supervised method.")
    methods = parser.add_subparsers(dest="method", metavar="METHOD", required=True, parser_class=RunParser)
    for name, method in METHODS.items():
        paper = inspect.getmodule(method).__doc__
        command = methods.add_parser(name, help=paper, description=paper)
        command.add_argument(
            "--impl",
            choices=IMPLEMENTATIONS,
            default="fastssl",
            help="what computes losses and moving averages; views and measurements are shared (default: %(default)s)",
        )
        length = command.add_mutually_exclusive_group()
        length.add_argument(
            "--epochs", type=positive_int, default=5, help="passes over the data (default: %(default)s)"
        )
        length.add_argument("--steps", type=positive_int, help="instead of --epochs")
        command.add_argument(
            "--optimizer", choices=OPTIMIZERS, default="adamw", help="what updates the weights (default: %(default)s)"
        )
        command.add_argument(
            "--learning-rate",
            type=positive_float,
            help=f"the schedule's highest (default: {method.learning_rate}, with LARS 0.3 x batch size / 256)",
        )
        command.add_argument(
            "--weight-decay",
            type=not_negative_float,
            help=f"of weights that are matrices (default: {method.weight_decay}, with LARS 1e-6)",
        )
        command.add_argument(
            "--final-weight-decay", type=not_negative_float, help="where a cosine takes it (default: see the method)"
        )
        command.add_argument(
            "--layer-decay",
            type=share,
            default=1.0,
            metavar="SHARE",
            help="learning rate of each of the encoder's stages, as a share of the next one's (default: %(default)s)",
        )
        command.add_argument("--clip", type=positive_float, metavar="NORM", help="cut gradients longer than that")
        command.add_argument(
            "--device", default="auto", metavar="auto|cpu|cuda[:N]", help="where to train (default: a GPU, if any)"
        )
        command.add_argument(
            "--amp",
            nargs="?",
            const="bfloat16",
            default=False,
            choices=AMP,
            help="forward pass and loss under autocast (to bfloat16, if it is not said to what)",
        )
        command.add_argument(
            "--channels-last", action="store_true", help="keep images with their channels last, faster on GPUs"
        )
        command.add_argument(
            "--chunk-size",
            type=positive_int,
            metavar="N",
            help="embed the batch N examples at a time, twice, and keep the activations of no more; N is of all "
            "processes together, as is the batch size",
        )
        command.add_argument(
            "--fsdp",
            action="store_true",
            help="the processes share out the weights of Transformer layers, which each has for the time it takes",
        )
        command.add_argument(
            "--backbone", metavar="NAME", help="a model of timm as image encoder (default: a small one)"
        )
        command.add_argument(
            "--from", dest="encoder", type=Path, metavar="FILE", help="begin with the encoder of that checkpoint"
        )
        command.add_argument("--compile", action="store_true", help="torch.compile the encoder")
        command.add_argument(
            "--checkpoint",
            type=Path,
            metavar="FILE",
            help="save there now and then, at the end, on Ctrl-C and on SIGTERM",
        )
        command.add_argument(
            "--save-every", type=positive_int, default=200, metavar="STEPS", help="how often (default: %(default)s)"
        )
        command.add_argument("--resume", action="store_true", help="go on from the checkpoint")
        command.add_argument("--tensorboard", metavar="DIR", help="log there")
        if hasattr(method, "pictures"):
            command.add_argument("--pictures", type=Path, metavar="FILE", help="draw what it has learnt (PNG)")
        command.set_defaults(batch_size=method.batch_size)
        command.add_arguments_of(method)
        if "size" in inspect.signature(method.load).parameters:
            command.add_argument(
                "--image-size", type=positive_int, metavar="PIXELS", help="of a folder's images (default: 32)"
            )
        if method.augmentations:
            command.add_arguments_of(Augmentation, "the method's", command.add_argument_group("of all its views"))
    return parser


def _writer(directory: str | None) -> Any:
    if directory is None:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("--tensorboard needs tensorboard: pip install tensorboard") from None
    return SummaryWriter(directory) if rank() == 0 else None


def main() -> None:
    parser = _parser()
    args = parser.parse_args()
    if args.resume and args.checkpoint is None:
        parser.error("--resume needs --checkpoint")
    if not args.resume and args.checkpoint is not None and args.checkpoint.exists():
        parser.error(f"--checkpoint: {args.checkpoint} exists; --resume goes on from it")
    device = choose(args.device)
    with parallel.process_group(device):
        _train(args, device)


def _train(args: argparse.Namespace, device: torch.device) -> None:
    kind = METHODS[args.method]
    options = {name: getattr(args, name) for name in inspect.signature(kind).parameters.keys() - GIVEN}
    strengths = {field.name: getattr(args, field.name, None) for field in fields(Augmentation)}
    options["augment"] = {name: value for name, value in strengths.items() if value is not None}
    parallel.check_shares(args.batch_size, args.chunk_size)
    create(args.method, 1, **options)  # raises now rather than after the data have been fetched
    if args.encoder is not None:
        parallel.in_first_process(lambda: open_regular(args.encoder).close())
    if args.checkpoint is not None:
        with parallel.held_by_first_process(checkpoint.reserved(args.checkpoint, args.resume)):
            pass  # raises now rather than after the data have been fetched; `fit` does it again
    writer = _writer(args.tensorboard)
    console = Console(quiet=rank() > 0)
    if hasattr(args, "image_size"):  # every process maps the same file, which the first one has written
        parallel.in_first_process(lambda: kind.load(args.data, args.image_size) and None)
        dataset = kind.load(args.data, args.image_size)
    else:
        dataset = parallel.in_first_process(lambda: kind.load(args.data))
    data = kind.training_data(dataset)
    console.print(f"{dataset.name}: {len(data):,} training examples", markup=False)
    if args.batch_size > len(data):
        raise ValueError(f"--batch-size must be at most the number of examples ({len(data)}), got {args.batch_size}")
    pictures = getattr(args, "pictures", None)
    if pictures is not None:
        parallel.in_first_process(lambda: check_writable(pictures))
    steps = args.steps or args.epochs * max(1, len(data) // args.batch_size)
    torch.manual_seed(args.seed)
    method = create(args.method, steps, dataset, backbone=args.backbone, **options)
    method.impl = args.impl
    method.to(device)
    untrained = parallel.in_first_process(lambda: method.evaluate(dataset))
    if args.encoder is not None:
        checkpoint.load_encoder(method.encoder, args.encoder)
    trained = method
    if args.fsdp:  # which leaves a method without its whole weights, and the first process could not evaluate it
        fsdp.check(args.method, method, args.amp)
        trained = copy.deepcopy(method)
        method.to("cpu")
    if args.compile:
        trained.encoder.compile()
    run = Run(
        batch_size=args.batch_size,
        steps=steps,
        optimizer=args.optimizer,
        learning_rate=args.learning_rate,
        weight_decay=args.weight_decay,
        final_weight_decay=args.final_weight_decay,
        layer_decay=args.layer_decay,
        clip=args.clip,
        amp=args.amp,
        device=device,
        channels_last=args.channels_last,
        chunk_size=args.chunk_size,
        fsdp=args.fsdp,
        seed=args.seed,
        checkpoint=args.checkpoint,
        save_every=args.save_every,
        resume=args.resume,
    )
    history = fit({args.method: trained}, data, run, writer=writer, console=console)
    if args.fsdp:
        method.load_state_dict(fsdp.whole(trained.state_dict()))
        method.to(device)
    if writer is not None:
        writer.close()
    for test, value in parallel.in_first_process(lambda: method.evaluate(dataset)).items():
        console.print(f"{test} {value:.1%}, with random weights {untrained[test]:.1%}")
    for text in parallel.in_first_process(lambda: method.samples(dataset)) if hasattr(method, "samples") else ():
        console.print(text, markup=False, highlight=False)
    if pictures is not None:
        parallel.in_first_process(lambda: method.pictures(dataset, pictures))
    if collapse := history[args.method][-1].health.collapse:
        console.print(f"The run has collapsed:\n{collapse}.")


if __name__ == "__main__":
    cli.run(main)
