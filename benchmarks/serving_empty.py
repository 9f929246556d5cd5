"""`qembag serve` as it is, but for the replicas, which answer an empty body.

    python -m benchmarks.serving_empty Empty FILE     # at once
    python -m benchmarks.serving_empty Reading FILE   # when they have read the request's body

The options, the proxy and the process are the command's own.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import qembag.cli
from qembag.engines import serve


class Empty:
    """In the place of a replica of qembag's, with its arguments."""

    def __init__(self, *_: Any) -> None:
        from starlette.responses import Response

        self._response = Response

    async def reconfigure(self, user_config: Any) -> None:
        pass

    async def __call__(self, request: Any) -> Any:
        return self._response(b"")


class Reading(Empty):
    """With what it costs to fetch a body: a replica calls the proxy back for it."""

    async def __call__(self, request: Any) -> Any:
        await request.body()
        return self._response(b"")


def main(arguments: list[str]) -> int:
    importable = importlib.import_module("benchmarks.serving_empty")  # this script's own classes are __main__'s
    serve.EmbeddingBags = getattr(importable, arguments[0])
    return qembag.cli.main(["serve", *arguments[1:]])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
