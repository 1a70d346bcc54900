"""`python -m fastssl.train METHOD`: train one method on real images and say what its features are worth."""

from __future__ import annotations

import torch
from rich.console import Console

from fastssl.train import METHODS, fit, knn_accuracy, load
from fastssl.train.cli import Parser, positive_float, positive_int, run


def main() -> None:
    parser = Parser("python -m fastssl.train", "Train a self-supervised method on Fashion-MNIST.")
    parser.add_argument("method", choices=METHODS)
    parser.add_argument(
        "--impl", choices=("fastssl", "naive"), default="fastssl", help="what computes the loss (default: %(default)s)"
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=positive_int, default=5, help="passes over the images (default: %(default)s)")
    length.add_argument("--steps", type=positive_int, help="instead of --epochs")
    parser.add_argument(
        "--learning-rate",
        type=positive_float,
        default=2e-3,
        help="the cosine schedule's highest (default: %(default)s)",
    )
    parser.add_argument("--temperature", type=positive_float, default=0.2, help="of the loss (default: %(default)s)")
    args = parser.parse_args()

    console = Console()
    images = load(args.data)
    console.print(f"{images.name}: {len(images.train):,} training images, {len(images.test):,} test images")
    torch.manual_seed(args.seed)
    method = METHODS[args.method](temperature=args.temperature, impl=args.impl)
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
