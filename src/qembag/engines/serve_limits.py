"""What a request may ask of a replica, and how it is refused."""

from __future__ import annotations

from typing import NamedTuple


class Limits(NamedTuple):
    """What one request may have at most."""

    max_body_bytes: int
    max_bags: int
    """Of each feature."""
    max_indices: int
    """Of all features together."""
    max_answer_bytes: int
    """Of the vectors, before they are written as Arrow or JSON."""
    body_timeout_s: float
    """From the headers to the last byte of the body."""


# A compressed or dictionary-encoded column is refused. So is a stream of many small batches, each of which costs tens
# of microseconds however few bags it has.
MAX_ARROW_BATCHES = 256


class Refused(Exception):
    """A request that is not answered: with which status, why, and under which name refusals are counted."""

    def __init__(self, status: int, reason: str, text: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(text)
        self.status = status
        self.reason = reason
        self.headers = {} if headers is None else headers


def too_large(text: str) -> Refused:
    # What is left of a body that is not read to its end would be taken as the next request's.
    return Refused(413, "too large", text, {"connection": "close"})


def check_bags(count: int, limits: Limits) -> None:
    if count > limits.max_bags:
        raise too_large(f"a request must have at most {limits.max_bags} bags, got {count}")


def check_indices(count: int, limits: Limits) -> None:
    if count > limits.max_indices:
        raise too_large(f"a request must have at most {limits.max_indices} indices, got {count}")


def check_answer(nbytes: int, limits: Limits) -> None:
    if nbytes > limits.max_answer_bytes:
        raise too_large(f"vectors must take at most {limits.max_answer_bytes} bytes, got {nbytes}: send fewer bags")
