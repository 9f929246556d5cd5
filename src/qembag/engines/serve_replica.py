"""One replica: a collection behind HTTP, in a process that Ray Serve starts, watches and stops."""

from __future__ import annotations

import asyncio
import json
import logging
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .. import _arguments
from .._batches import Bags
from ..interop.tensors import imported
from . import serve_arrow, serve_http, serve_json
from .opened import let_go, opened, opening, stamp_of
from .serve_limits import Refused, check_answer

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from ..collection import EmbeddingBagCollection
    from .opened import Opening, Stamp
    from .serve_limits import Limits

OPTIONS = ("mode", "dtype", "padding_idx", "invalid", "names")

# What takes a fraction of a millisecond is done where requests are read: to hand it to another thread costs 0.1 ms.
LIGHT_INDICES = 4096
LIGHT_VALUES = 8192

logger = logging.getLogger("ray.serve")


class Served(NamedTuple):
    """A version of the tables. A request keeps the one that it began with."""

    wanted: Opening
    collection: EmbeddingBagCollection
    stamp: Stamp
    itemsize: int
    """Of the vectors' elements."""

    @property
    def version(self) -> str:
        return f"{self.stamp.changed_ns:x}-{self.stamp.nbytes:x}"


class Asked(NamedTuple):
    """A request, read."""

    served: Served
    indices: dict[str, Any]
    """By feature: tuples of JSON's indices and offsets, or lists of `Bags` of Arrow's columns."""
    weights: dict[str, Any] | None
    num_bags: int
    num_indices: int
    bags: dict[str, list[Bags]] | None
    """To be looked up together with other requests' bags; None for what the library may refuse at once."""

    @property
    def is_light(self) -> bool:
        values = self.num_bags * self.served.collection.dim
        return self.num_indices <= LIGHT_INDICES and values <= LIGHT_VALUES


class EmbeddingBags:
    """What Serve calls. Its methods run in one event loop, except those that say otherwise."""

    def __init__(
        self, limits: Limits, max_batch_size: int, batch_wait_timeout_s: float, num_threads: int | None
    ) -> None:
        serve = imported("ray.serve", "'qembag[serve]'")
        self._responses = imported("starlette.responses", "'qembag[serve]'")
        self._gone = imported("starlette.requests", "'qembag[serve]'").ClientDisconnect
        self._limits = limits
        self._num_threads = num_threads
        self._served: Served | None = None
        self._wanted: Opening | None = None
        self._failure: str | None = None
        self._rolling = asyncio.Lock()
        self._background: asyncio.Task[None] | None = None
        # One at a time: what heavy requests take in memory is that of one of them.
        self._heavy = ThreadPoolExecutor(1, "qembag-heavy")
        self._together: Any = None
        if max_batch_size > 1:
            batching = serve.batch(max_batch_size=max_batch_size, batch_wait_timeout_s=batch_wait_timeout_s)
            self._together = batching(self._look_up_together)
        counter = imported("ray.serve.metrics", "'qembag[serve]'").Counter
        self._bags = counter("qembag_serve_bags", "Bags that were looked up, of each feature.")
        self._refused = counter("qembag_serve_refused", "Requests that were refused.", tag_keys=("reason",))
        self._rolled = counter("qembag_serve_rolled_versions", "Versions of the tables that were rolled in.")
        self._failed = counter("qembag_serve_failed_rolls", "Versions of the tables that could not be opened.")

    # ---- Versions ----------------------------------------------------------------------------------------------------

    async def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """Serve another file, or the same in another way. Called by Serve: at the start, and when its config changes.

        The first file must open. Later ones are tried again until they do; until then the old one is served.
        """
        wanted = _opening(user_config)
        async with self._rolling:
            self._wanted = wanted
            if self._served is None:
                self._served = await asyncio.to_thread(_served, wanted)
            else:
                await self._roll()

    async def check_health(self) -> None:
        """Called by Serve every few seconds. Starts to roll in a new version, and does not wait for it."""
        if self._served is not None and not self._rolling.locked():
            self._background = asyncio.create_task(self._roll_if_new())

    async def _roll_if_new(self) -> None:
        async with self._rolling:
            served, wanted = self._both()
            try:
                is_new = (
                    served.wanted.key() != wanted.key()
                    or await asyncio.to_thread(stamp_of, wanted.path) != served.stamp
                )
            except OSError as error:
                self._tell(error)
                return
            if is_new:
                await self._roll()

    def _both(self) -> tuple[Served, Opening]:
        assert self._served is not None  # Serve calls `reconfigure` first
        assert self._wanted is not None
        return self._served, self._wanted

    async def _roll(self) -> None:
        served, wanted = self._both()
        try:
            new = await asyncio.to_thread(_served, wanted)
        except Exception as error:  # noqa: BLE001 (whatever is wrong with a file, the old one is still there)
            self._tell(error)
            return
        self._served, self._failure = new, None
        if served.wanted.key() != wanted.key():
            let_go(served.wanted)
        if new.stamp != served.stamp or served.wanted.key() != wanted.key():
            self._rolled.inc()
            logger.info(f"qembag: serves version {new.version} of {wanted.path} in place of {served.version}")

    def _tell(self, error: Exception) -> None:
        """Count and log a failure once, however often it is met again."""
        text = f"{type(error).__name__}: {error}"
        if text != self._failure:
            self._failure = text
            self._failed.inc()
            logger.error(f"qembag: the old tables are still served, for the new ones cannot be opened: {text}")

    # ---- Requests ----------------------------------------------------------------------------------------------------

    async def __call__(self, request: Any) -> Any:
        """Called by Serve for each HTTP request. Whatever a client sends, it gets an answer and no stack trace."""
        served, _ = self._both()
        try:
            serve_http.check_path(request.scope)
            if request.method != "POST":
                return self._response(json.dumps(self._described(served)).encode(), served)
            kind, wanted_kind = serve_http.types_of(request.headers)
            body = await serve_http.body_of(request, self._limits)
            answer = await self._answer(body, kind, wanted_kind, served)
            return self._response(answer, served, media_type=wanted_kind)
        except Refused as refusal:
            return self._refusal(served, refusal.status, refusal.reason, str(refusal), refusal.headers)
        except (IndexError, TypeError, ValueError) as error:
            return self._refusal(served, 400, "wrong", str(error))
        except self._gone:
            return self._refusal(served, 499, "gone", "the client has closed the connection")
        except MemoryError:
            return self._refusal(served, 503, "memory", "not enough memory")
        except Exception:
            logger.exception("qembag: a request has failed")
            return self._refusal(served, 500, "failed", "internal error")

    def _response(self, body: bytes, served: Served, status: int = 200, **more: Any) -> Any:
        headers = {"qembag-version": served.version, **more.pop("headers", {})}
        return self._responses.Response(body, status, headers, **{"media_type": serve_http.JSON, **more})

    def _refusal(
        self, served: Served, status: int, reason: str, text: str, headers: dict[str, str] | None = None
    ) -> Any:
        self._refused.inc(tags={"reason": reason})
        return self._response(serve_http.error(text), served, status, headers=headers or {})

    def _described(self, served: Served) -> dict[str, Any]:
        """What GET answers."""
        collection = served.collection
        features = {
            feature: {
                "table": table,
                "num_embeddings": collection.tables[table].num_embeddings,
                "mode": collection.modes[feature],
                "dim": collection.dims[feature],
                "columns": [collection.columns[feature].start, collection.columns[feature].stop],
            }
            for feature, table in collection.features.items()
        }
        dtype = f"float{8 * served.itemsize}"
        return {
            "version": served.version,
            "features": features,
            "dim": collection.dim,
            "dtype": dtype,
            "limits": self._limits._asdict(),
        }

    async def _answer(self, body: bytes, kind: str, wanted_kind: str, served: Served) -> bytes:
        asked = _asked(body, kind, served, self._limits)
        write = serve_arrow.stream_of if wanted_kind == serve_http.ARROW else serve_json.text_of
        if asked.is_light:
            if self._together is None or asked.bags is None:
                found = self._alone(asked)
            else:
                found = await self._together(asked)
                if isinstance(found, Exception):
                    raise found
            answer = write(found)
        else:
            loop = asyncio.get_running_loop()
            answer = await loop.run_in_executor(self._heavy, lambda: write(self._alone(asked)))
        self._bags.inc(max(asked.num_bags, 1))
        return answer

    # ---- Lookups -----------------------------------------------------------------------------------------------------

    async def _look_up_together(self, requests: Sequence[Asked]) -> list[Any]:
        """The vectors of each request, or its own error. They come from one call for each version of the tables."""
        by_version: dict[int, list[Asked]] = {}
        for asked in requests:
            by_version.setdefault(id(asked.served), []).append(asked)
        found = {version: iter(self._of_one_version(some)) for version, some in by_version.items()}
        return [next(found[id(asked.served)]) for asked in requests]

    def _of_one_version(self, requests: Sequence[Asked]) -> list[Any]:
        if len(requests) > 1:
            try:
                return self._at_once(requests)
            except (IndexError, TypeError, ValueError):
                pass  # of one of them
        return [self._tried(asked) for asked in requests]

    def _at_once(self, requests: Sequence[Asked]) -> list[NDArray[Any]]:
        collection = requests[0].served.collection
        joined: dict[str, list[Bags]] = {feature: [] for feature in collection.features}
        for asked in requests:
            assert asked.bags is not None
            for feature, bags in joined.items():
                bags += asked.bags[feature]
        vectors = collection(joined, num_threads=self._num_threads)
        ends = np.cumsum([asked.num_bags for asked in requests]).tolist()
        return np.split(vectors, ends[:-1])

    def _tried(self, asked: Asked) -> Any:
        try:
            return self._alone(asked)
        except (IndexError, TypeError, ValueError) as error:
            return error

    def _alone(self, asked: Asked) -> NDArray[Any]:
        """In any thread."""
        vectors: NDArray[Any] = asked.served.collection(
            asked.indices, per_sample_weights=asked.weights, num_threads=self._num_threads
        )
        return vectors


# ---- A version -------------------------------------------------------------------------------------------------------


def _opening(user_config: Mapping[str, Any]) -> Opening:
    given = dict(user_config)
    path, features = given.pop("path", None), given.pop("features", None)
    if path is None or not given.keys() <= set(OPTIONS):
        raise ValueError(f"user_config must have path, and may have features, {', '.join(OPTIONS)}, got {user_config}")
    return opening(path, features, given)


def _served(wanted: Opening) -> Served:
    """A version, opened. In any thread."""
    collection, stamp = opened(wanted)
    number, kind = _arguments.out_type(collection.dtype, None)
    if number == 2:
        raise ValueError("dtype must be 'float32' or 'float16' to be served, got bfloat16, which Arrow has no type for")
    return Served(wanted, collection, stamp, kind.itemsize)


# ---- A request -------------------------------------------------------------------------------------------------------


def _asked(body: bytes, kind: str, served: Served, limits: Limits) -> Asked:
    features = served.collection.features
    indices: dict[str, Any]
    weights: dict[str, Any] | None = None
    bags: dict[str, list[Bags]] | None
    if kind == serve_http.ARROW:
        bags = indices = serve_arrow.bags_in(body, features, limits)
        sizes = {name: sum(some.num_bags for some in column) for name, column in bags.items()}
        num_indices = sum(serve_arrow.num_indices(some) for column in bags.values() for some in column)
    else:
        indices, weights = serve_json.bags_in(body, features, limits)
        bags = _bags_of(indices, weights, served.collection)
        sizes = {name: len(ends) - 1 for name, (_, ends) in indices.items()}
        num_indices = sum(len(some) for some, _ in indices.values())
    num_bags = max(sizes.values(), default=0)
    check_answer(num_bags * served.collection.dim * served.itemsize, limits)
    if sizes.keys() != features.keys() or min(sizes.values()) != num_bags:
        bags = None  # the library refuses it
    return Asked(served, indices, weights, num_bags, num_indices, bags)


def _bags_of(
    indices: dict[str, Any], weights: dict[str, Any] | None, collection: EmbeddingBagCollection
) -> dict[str, list[Bags]] | None:
    """What JSON holds, as columns have it; None where the library has to look at it."""
    if not all(isinstance(some, np.ndarray) for some, _ in indices.values()):
        return None
    if weights is None:
        return {name: [Bags(some, ends)] for name, (some, ends) in indices.items()}
    modes = collection.modes
    if any(name not in indices or modes.get(name, "max") == "max" for name in weights):
        return None
    own = {name: _arguments.as_float32(some) for name, some in weights.items()}
    return {name: [Bags(some, ends, own.get(name))] for name, (some, ends) in indices.items()}
