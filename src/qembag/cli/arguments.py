"""Shared by the commands' arguments: the parser, and the types of arguments."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any, NoReturn

from .output import Failure

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

# What commands read that need tables.
TABLES = "tables in a .safetensors file, an index of several, or what `qembag convert` reads"


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


def numbers(text: str) -> list[tuple[str, int]]:
    """A number, which stands under the name "", or numbers by name: ``64``, or ``t1=64,t2=32``."""
    found = []
    for part in text.split(","):
        name, equals, number = part.rpartition("=")
        if bool(name) != bool(equals) or not (number.isascii() and number.isdecimal()) or len(number) > 9:
            raise argparse.ArgumentTypeError(f"must be a whole number, or NAME=N,..., got {text!r}")
        found.append((name, int(number)))
    return found


def add_foreign(parser: argparse.ArgumentParser) -> None:
    """Options that say of a file of another library what it does not say itself."""
    from ..interop.load import FORMATS  # not for commands that read files of ours only

    add = parser.add_argument
    add("--format", choices=FORMATS, help="what SOURCE must be (default: told by its content)")
    form: dict[str, Any] = {"metavar": "N or NAME=N,...", "type": numbers, "action": "extend", "default": []}
    add("--bits", help="bits of an element, where the file does not say: 8, 4, 2; 16, 32 for floats", **form)
    add("--dims", help="elements of a row, where the file does not say, for all tables or by name", **form)


def by_name(given: list[tuple[str, int]], option: str, wrong: Callable[[str], NoReturn]) -> int | dict[str, int] | None:
    """The numbers of an option as `load_tables` takes them."""
    found = dict(given)
    if len(found) < len(given) or ("" in found and len(found) > 1):
        wrong(f"{option} must have one number for all tables, or one for each name")
    return found.get("", found or None)


def refuse_existing(path: Path, force: bool) -> None:
    """Raise Failure if `path` exists, unless `force`."""
    if not force and os.path.lexists(path):
        raise Failure(f"{path}: exists already; --force replaces it")
