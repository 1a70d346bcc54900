"""`python -m fastssl.train METHOD`: train one method on real images and say what its features are worth."""

from __future__ import annotations

import inspect

import torch
from rich.console import Console

from fastssl.train import METHODS, fit, knn_accuracy, load
from fastssl.train.cli import Parser, RunParser, positive_float, positive_int, run
from fastssl.train.two_views import IMPLEMENTATIONS


def _parser() -> Parser:
    """A command for each method, which takes the arguments of its constructor as options."""
    parser = Parser("python -m fastssl.train", description="Train a self-supervised method on Fashion-MNIST.")
    methods = parser.add_subparsers(dest="method", required=True, parser_class=RunParser)
    for name, method in METHODS.items():
        command = methods.add_parser(name, description=inspect.getmodule(method).__doc__)
        command.add_argument(
            "--impl", choices=IMPLEMENTATIONS, default="fastssl", help="what computes the loss (default: %(default)s)"
        )
        length = command.add_mutually_exclusive_group()
        length.add_argument(
            "--epochs", type=positive_int, default=5, help="passes over the images (default: %(default)s)"
        )
        length.add_argument("--steps", type=positive_int, help="instead of --epochs")
        command.add_argument(
            "--learning-rate",
            type=positive_float,
            default=2e-3,
            help="the cosine schedule's highest (default: %(default)s)",
        )
        for option in inspect.signature(method).parameters.values():
            if option.name != "impl":
                flag, default = f"--{option.name.replace('_', '-')}", option.default
                command.add_argument(
                    flag, type=positive_float, default=default, help="of the loss (default: %(default)s)"
                )
    return parser


def main() -> None:
    args = _parser().parse_args()
    console = Console()
    images = load(args.data)
    console.print(f"{images.name}: {len(images.train):,} training images, {len(images.test):,} test images")
    torch.manual_seed(args.seed)
    options = inspect.signature(METHODS[args.method]).parameters
    method = METHODS[args.method](**{name: getattr(args, name) for name in options})
    untrained = knn_accuracy(method.encoder, images)
    fit(
        {args.impl: method},
        images.train,
        batch_size=args.batch_size,
        steps=args.steps or args.epochs * max(1, len(images.train) // args.batch_size),
        learning_rate=args.learning_rate,
        seed=args.seed,
        console=console,
    )
    console.print(f"kNN accuracy {knn_accuracy(method.encoder, images):.1%}, with random weights {untrained:.1%}")


if __name__ == "__main__":
    run(main)
