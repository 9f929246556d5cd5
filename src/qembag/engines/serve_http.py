"""What HTTP says around a request: path, method, types, and a body that is counted while it arrives."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

from .serve_limits import Refused, too_large

if TYPE_CHECKING:
    from .serve_limits import Limits

JSON = "application/json"
ARROW = "application/vnd.apache.arrow.stream"
ALLOWED = {"GET", "HEAD", "POST"}


def check_path(scope: Any) -> None:
    """Refuse any path but the application's own."""
    path, root = scope["path"], scope.get("root_path", "")
    if path.removeprefix(root) not in ("", "/"):
        raise Refused(404, "path", "there is nothing here: POST bags to /, or GET / for what is served")
    if scope["method"] not in ALLOWED:
        text = f"method must be GET or POST, got {scope['method']}"
        raise Refused(405, "method", text, {"allow": ", ".join(sorted(ALLOWED))})


def types_of(headers: Any) -> tuple[str, str]:
    """The type of the body, and that of the answer: what Accept asks for, or else the body's."""
    given = _type(headers.get("content-type", ""))
    if given not in (JSON, ARROW):
        raise Refused(415, "type", f"Content-Type must be {JSON} or {ARROW}, got {given[:80]!r}")
    encoding = headers.get("content-encoding", "identity").strip().lower()
    if encoding != "identity":
        raise Refused(415, "type", f"Content-Encoding must be identity, got {encoding[:80]!r}")
    accept = headers.get("accept")
    return given, given if accept is None else _chosen(accept, given)


def _type(text: str) -> str:
    return text.partition(";")[0].strip().lower()


def _chosen(accept: str, given: str) -> str:
    """The most wanted of our types; the body's where several are wanted alike."""
    wanted: dict[str, float] = {}
    for part in accept.split(","):
        kind, _, parameters = part.partition(";")
        wanted[kind.strip().lower()] = _quality(parameters)
    best, chosen = 0.0, None
    for ours in (given, JSON, ARROW):
        quality = next((wanted[kind] for kind in (ours, "application/*", "*/*") if kind in wanted), 0.0)
        if quality > best:
            best, chosen = quality, ours
    if chosen is None:
        raise Refused(406, "type", f"Accept must allow {JSON} or {ARROW}, got {accept[:80]!r}")
    return chosen


def _quality(parameters: str) -> float:
    for parameter in parameters.split(";"):
        name, _, value = parameter.partition("=")
        if name.strip().lower() == "q":
            try:
                return float(value)
            except ValueError:
                return 0.0
    return 1.0


async def body_of(request: Any, limits: Limits) -> bytes:
    """A request's body. Refused as soon as it is too long or too slow."""
    text = f"a body must have at most {limits.max_body_bytes} bytes"
    stated = request.headers.get("content-length", "")
    if stated.isdecimal() and int(stated[:20]) > limits.max_body_bytes:
        raise too_large(f"{text}, got {stated[:20]}")
    chunks, count = [], 0
    try:
        async with asyncio.timeout(limits.body_timeout_s):
            async for chunk in request.stream():
                count += len(chunk)
                if count > limits.max_body_bytes:
                    raise too_large(f"{text}, got more")
                chunks.append(chunk)
    except TimeoutError:
        text = f"a body must arrive within {limits.body_timeout_s:g} s"
        raise Refused(408, "slow", text, {"connection": "close"}) from None
    return b"".join(chunks)


def error(text: str) -> bytes:
    return json.dumps({"error": text}).encode()
