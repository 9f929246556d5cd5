"""What reading a file may make in memory, counted before it is made."""

from __future__ import annotations

# A dictionary's share of an item at its fullest: 6 slots of an index, 4 entries, and half as much while it grows.
ITEM = 160
# A place in a list, with the room that it keeps to grow, and in two copies of some of it.
PLACE = 24
# A character of a text, at its widest, for each byte of UTF-8.
WIDEST = 4
# A small object: a text but for its characters, a number, a tuple of three.
OBJECT = 80


def characters(*texts: str | bytes) -> int:
    """What texts take when they are joined, but for the head; bytes are UTF-8."""
    return sum(map(len, texts)) * (1 if all(text.isascii() for text in texts) else WIDEST)


class Budget:
    """A number of bytes that may be spent once.

    Nothing is given back when an object goes: the sum bounds the work, too.
    """

    def __init__(self, what: str, total: int) -> None:
        self.what = what
        self.total = self.left = total

    def spend(self, nbytes: int) -> None:
        """Raises ValueError if more than the total was spent."""
        self.left -= nbytes
        if self.left < 0:
            raise ValueError(f"is too large: {self.what} must not need more than {self.total} bytes of memory")
