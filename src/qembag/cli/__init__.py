"""The `qembag` command: one module per subcommand, imported only when that one runs."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, NoReturn

from .arguments import OneLineParser
from .output import Failure, complain, let_go_of_output, reason_of, show

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

COMMANDS = {
    "quantize": "quantize the tables of floats in a file to 8, 4 or 2 bits, using little memory",
    "convert": "copy the tables of another library's file (torch, TorchRec, model2vec, GGUF, ...) to a qembag file",
    "dequantize": "write the float values of a file's tables",
    "inspect": "show what a file holds: tables, layouts, bytes, metadata, scales, suspicious rows",
    "compare": "show bytes, error and speed of each bit width, method and group size",
    "lookup": "look up rows, or sums of bags of rows",
    "prune": "drop rows that are small, rarely used, or too many",
    "demo": "quantize a table, look up bags of rows, and print bytes, error and speed",
    "serve": "serve a file's tables over HTTP, with Ray Serve",
    "bench": "time lookups from a file's table on this machine, against NumPy and torch",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Parameters
    ----------
    argv : sequence of str, optional
        The arguments; those of the process if not given.

    Returns
    -------
    int
        Exit status: 0, or 1 after one line on stderr, if the job fails or is interrupted; 1 without that line if the
        reader closes the output early.

    Raises
    ------
    SystemExit
        With status 2 and one line on stderr, if the arguments are wrong; with status 0 after ``--help``.

    Examples
    --------
    >>> from qembag.cli import main
    >>> main([])  # doctest: +ELLIPSIS
    qembag   ...
    level    ...
    0
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    # The options of `qembag` itself take no value, so the first other argument is the command.
    command = next((word for word in arguments if not word.startswith("-")), None)
    prog = f"qembag {command}" if command in COMMANDS else "qembag"
    try:
        try:
            if sys.stdout is None:  # as in `qembag >&-`
                raise Failure("the output is closed")
            run(arguments, command)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:  # as in `qembag demo | head -1`
        let_go_of_output()
    except KeyboardInterrupt as interruption:
        let_go_of_output()
        complain(prog, ": ".join(["interrupted", *map(str, interruption.args)]))
    except (Failure, MemoryError, OSError) as error:
        let_go_of_output()
        complain(prog, f"error: {reason_of(error)}")
    else:
        return 0
    return 1


def run(arguments: Sequence[str], command: str | None) -> None:
    parser = OneLineParser(
        prog="qembag",
        description="Embedding lookups from 8-, 4- and 2-bit tables. Without a command: show what is installed.",
        epilog="Help for one command: qembag COMMAND --help",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    job: Callable[..., None] = describe_installation
    wrong: Callable[[str], NoReturn] = parser.error
    for name, about in COMMANDS.items():
        own = commands.add_parser(name, help=about, description=f"{about[0].upper()}{about[1:]}.")
        if name == command:
            module = importlib.import_module(f".{name}", __package__)
            module.add_arguments(own)
            own.epilog = f"Example:\n{module.EXAMPLE.rstrip()}"
            job, wrong = module.run, own.error
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        wrong(f"unrecognized arguments: {' '.join(unknown)}")
    job(options, wrong)


def describe_installation(*_: object) -> None:
    from .._runtime import show_config

    config = show_config()
    openmp = f"yes (specification {config['openmp_version']})" if config["openmp"] else "no"
    show(f"qembag   {config['version']}")
    show(f"level    {config['level']}")
    show(f"levels   {', '.join(config['levels'])}")
    show(f"OpenMP   {openmp}")
    show(f"threads  {config['num_threads']}")
