"""`qembag serve`: a file's tables over HTTP, by Ray Serve, until Ctrl-C or SIGTERM."""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import signal
import socket
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ..collection import EmbeddingBagCollection
from ..interop.tensors import imported
from .arguments import TABLES, count, positive
from .output import Failure, about, reason_of, show

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

EXAMPLE = """\
  qembag serve tables.safetensors
  qembag serve tables.safetensors --host 0.0.0.0 --port 8080 --replicas 4 --threads 2
"""
NAME = "qembag"  # of the application
LIMITS = ("max_body_bytes", "max_bags", "max_indices", "max_answer_bytes")
PAUSE = 2.0  # seconds between looks at whether Ray is still there


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("file", metavar="FILE", type=Path, help=f"{TABLES}; when it is replaced, the new tables are served")
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all (default: %(default)s)")
    add("--port", metavar="N", type=port, default=8000, help="port to listen on (default: %(default)s)")
    add("--replicas", metavar="N", type=count, default=1, help="processes that look up (default: %(default)s)")
    add("--threads", metavar="N", type=count, default=1, help="of a lookup, in each replica (default: %(default)s)")
    add("--max-body-bytes", metavar="N", type=count, help="bytes of a request (default: 4 MiB)")
    add("--max-bags", metavar="N", type=count, help="bags of a request (default: 65,536)")
    add("--max-indices", metavar="N", type=count, help="indices of a request (default: 1,000,000)")
    add("--max-answer-bytes", metavar="N", type=count, help="bytes of a request's vectors (default: 16 MiB)")
    add("--max-queue", metavar="N", type=count, default=512, help="requests that may wait (default: %(default)s)")
    add("--timeout", metavar="S", type=positive, default=30.0, help="seconds for a request (default: %(default)s)")
    add("--address", metavar="RAY", help="Ray cluster to serve on, for example `auto` (default: start Ray here)")


def port(text: str) -> int:
    number = count(text)
    if number > 65535:
        raise argparse.ArgumentTypeError(f"must be a port from 1 to 65535, got {text!r}")
    return number


def run(options: argparse.Namespace, wrong: Callable[[str], NoReturn]) -> None:
    # Read when Ray is imported, and by the processes that it starts.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    with quietly(), signals_interrupt():
        if options.address is None:
            with about(options.file):
                EmbeddingBagCollection.from_file(options.file)  # what is wrong with it is told at once
            check_port(options.host, options.port)
        with serving(application_of(options), options) as serve:
            show(f"Serving {options.file} on {url_of(options.host, options.port)} until Ctrl-C.")
            # Ray tells of errors on standard output, whatever it is asked.
            with contextlib.redirect_stdout(sys.stderr), contextlib.suppress(KeyboardInterrupt):
                wait(serve)


def application_of(options: argparse.Namespace) -> Any:
    given = {name: value for name in LIMITS if (value := getattr(options, name)) is not None}
    of_serve = {
        "num_replicas": options.replicas,
        "ray_actor_options": {"num_cpus": options.threads},
        "max_queued_requests": options.max_queue,
    }
    try:
        from ..engines.serve import deployment

        return deployment(
            options.file, num_threads=options.threads, body_timeout_s=options.timeout, options=of_serve, **given
        )
    except (ImportError, ValueError) as error:
        raise Failure(reason_of(error)) from None


def check_port(host: str, number: int) -> None:
    """Raise Failure if Serve could not listen there: it would try again and again."""
    try:
        found = socket.getaddrinfo(host, number, type=socket.SOCK_STREAM)
        with socket.socket(found[0][0]) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(found[0][4])
    except OSError as error:
        raise Failure(f"{url_of(host, number)}: {reason_of(error)}") from None


def url_of(host: str, number: int) -> str:
    return f"http://[{host}]:{number}/" if ":" in host else f"http://{host}:{number}/"


# ---- Serve -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def serving(application: Any, options: argparse.Namespace) -> Iterator[Any]:
    """Ray and Serve, and the application once it answers. At the end nothing is left that this has started."""
    ray, serve = imported("ray", "'qembag[serve]'"), imported("ray.serve", "'qembag[serve]'")
    own = {"include_dashboard": False, "num_cpus": options.replicas * options.threads}
    try:
        quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
        ray.init(options.address or "local", **quiet, **(own if options.address is None else {}))
        signals_raise()  # Ray has set a handler of its own
        logs = {"log_level": "ERROR", "enable_access_log": False}
        http = {"host": options.host, "port": options.port, "request_timeout_s": options.timeout}
        serve.start(http_options=http, proxy_location="HeadOnly", logging_config=logs)
        serve.run(application, name=NAME, route_prefix="/", logging_config=logs)
    except Exception as error:  # noqa: BLE001 (Ray raises Exception itself)
        stop(ray, serve, options.address is None)
        raise Failure(f"Ray Serve: {last_line(error)}") from None
    except BaseException:
        stop(ray, serve, options.address is None)
        raise
    try:
        yield serve
    finally:
        stop(ray, serve, options.address is None)


def stop(ray: Any, serve: Any, is_own: bool) -> None:
    """Of a cluster that others use too, only the application."""
    with contextlib.redirect_stdout(io.StringIO()):  # Ray tells there that actors end
        try:
            if ray.is_initialized():
                with contextlib.suppress(Exception):
                    serve.shutdown() if is_own else serve.delete(NAME)
        finally:
            ray.shutdown()


def wait(serve: Any) -> None:
    """Until a signal interrupts, or Ray is gone."""
    while True:
        time.sleep(PAUSE)
        try:
            serve.status()
        except Exception as error:  # noqa: BLE001 (whatever Ray raises)
            raise Failure(f"Ray Serve has stopped: {last_line(error)}") from None


def last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


# ---- This process ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without what Ray tells of itself. Replicas have logs of their own."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def signals_interrupt() -> Iterator[None]:
    """SIGTERM ends the command as Ctrl-C does."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signals_raise()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def signals_raise() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
