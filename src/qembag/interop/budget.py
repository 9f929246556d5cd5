"""What reading a file may make in memory, counted before it is made."""

from __future__ import annotations

# A dictionary's share of an item at its fullest: 6 slots of an index, 4 entries, and half as much while it grows.
ITEM = 160
# A place in a list, with the room that it keeps to grow, and in two copies of some of it.
PLACE = 32
# What any object takes but for its content: its head, the garbage collector's, and rounding.
OBJECT = 80


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
            raise ValueError(f"{self.what} must not hold objects of more than {self.total} bytes")
