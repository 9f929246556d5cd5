"""Shared by the commands' arguments: the parser, and the types of arguments."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any, NoReturn

from .output import Failure

if TYPE_CHECKING:
    from pathlib import Path


class OneLineParser(argparse.ArgumentParser):
    """Reports an error in one line, without the usage; prints the epilog as written."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)
        self.color = False  # Python 3.14 would colour the help

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def count(text: str) -> int:
    return whole_number(text, 1)


def from_zero(text: str) -> int:
    return whole_number(text, 0)


def whole_number(text: str, minimum: int) -> int:
    try:
        number = int(text)
    except ValueError:
        number = minimum - 1
    if number < minimum:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least {minimum}, got {text!r}")
    return number


def positive(text: str) -> float:
    """A finite number above zero."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return number


def key_and_value(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise argparse.ArgumentTypeError(f"must be KEY=VALUE, got {text!r}")
    return key, value


def refuse_existing(path: Path, force: bool) -> None:
    """Raise Failure if `path` exists, unless `force`."""
    if not force and os.path.lexists(path):
        raise Failure(f"{path}: exists already; --force replaces it")
