"""`python -m benchmarks.serving_empty FILE`: `qembag serve`, but with replicas that answer an empty body at once.

The options, the proxy and the process are the command's own.
"""

from __future__ import annotations

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


def main(arguments: list[str]) -> int:
    from benchmarks.serving_empty import Empty  # not this script's own, which replicas could not import

    serve.EmbeddingBags = Empty
    return qembag.cli.main(["serve", *arguments])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
