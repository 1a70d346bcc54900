"""Shared by the command lines: one-line errors, checked numbers, a clean end on Ctrl-C."""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from fastssl.train.data.packages import DataError
from fastssl.train.method import GIVEN


class Parser(argparse.ArgumentParser):
    """Argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


class RunParser(Parser):
    """The same with the options of every run."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog, description=description)
        self.add_argument(
            "--batch-size",
            type=positive_int,
            default=1024,
            help="examples per step, however many views each is made (default: %(default)s)",
        )
        self.add_argument(
            "--seed",
            type=seed,
            default=0,
            help="of initial weights, data order and augmentation (default: %(default)s)",
        )
        self.add_argument(
            "--data",
            metavar="PATH",
            help="data of your own: a folder of images, best with a folder for each class; of recordings (wav), with a "
            "folder for each speaker; or a file where the method takes one: images and captions (CSV), text; or a "
            "folder that has the method's data set; openclipart, for images and captions; python, for sentences "
            "(default: found or fetched; images: FASTSSL_DATA)",
        )

    def add_arguments_of(self, constructor: type, default: str | None = None, group: Any = None) -> None:
        """An option for each argument of a class except those in GIVEN; its help is taken from the docstring of the
        class, or of one that it derives from. With `default`, which says what holds where an option is not given, its
        value is then None. With `group`, the options belong to that group of the parser."""
        documentation = "\n".join(kind.__doc__ or "" for kind in constructor.__mro__)
        for argument in inspect.signature(constructor, eval_str=True).parameters.values():
            if argument.name in GIVEN:
                continue
            lines = re.search(rf"^ +{argument.name}: (.*(?:\n {{12}}.*)*)", documentation, re.MULTILINE)[1]
            zero = default is not None or argument.default == 0
            kinds = {
                int: {"type": not_negative_int if zero else positive_int},
                float: {"type": not_negative_float if zero else positive_float},
                bool: {"action": argparse.BooleanOptionalAction},
            }
            (group or self).add_argument(
                f"--{argument.name.replace('_', '-')}",
                default=argument.default if default is None else None,
                help=f"{' '.join(lines.split()).replace('%', '%%').rstrip('.')} (default: {default or '%(default)s'})",
                **kinds[argument.annotation],
            )


def positive_int(text: str) -> int:
    return _positive(int, text)


def positive_float(text: str) -> float:
    return _positive(float, text)


def seed(text: str) -> int:
    """A seed that torch.manual_seed takes unchanged."""
    number = _number(int, text)
    if not 0 <= number < 2**64:
        raise argparse.ArgumentTypeError(f"must be from 0 to {2**64 - 1}, got {text}")
    return number


def share(text: str) -> float:
    value = _positive(float, text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"must be at most 1, got {text}")
    return value


def not_negative_float(text: str) -> float:
    return 0.0 if _number(float, text) == 0 else _positive(float, text)


def not_negative_int(text: str) -> int:
    return 0 if _number(int, text) == 0 else _positive(int, text)


def _positive(kind: type, text: str):
    value = _number(kind, text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be positive, got {text}")
    return value


def _number(kind: type, text: str):
    try:
        return kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number ({kind.__name__}), got {text!r}") from None


def run(main: Callable[[], None]) -> NoReturn:
    """Run a command; bad data, bad values and Ctrl-C end it with one line and an exit status, not with a traceback."""
    try:
        main()
    except (DataError, OSError, ValueError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)
