"""A process and all below it: the memory that they take together, and the time of processors."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Self

import psutil


def tree(pid: int) -> Iterator[psutil.Process]:
    """Those that are there."""
    try:
        process = psutil.Process(pid)
        yield process
        yield from process.children(recursive=True)
    except psutil.NoSuchProcess:
        return


def memory(pid: int) -> int:
    """Bytes as proportional set size: a page that several of them map is counted once in all."""
    total = 0
    for process in tree(pid):
        try:
            total += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):  # it has ended
            continue
    return total


def cpu_seconds(pid: int) -> float:
    """In user and system mode, with children that have ended."""
    total = 0.0
    for process in tree(pid):
        try:
            total += sum(process.cpu_times()[:4])
        except psutil.NoSuchProcess:
            continue
    return total


class Watched:
    """The most memory that a process and those below it take, looked at every so many seconds from outside."""

    def __init__(self, pid: int, seconds: float = 0.5) -> None:
        self.peak = 0
        self._pid, self._seconds = pid, seconds
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._ended.wait(self._seconds):
            self.peak = max(self.peak, memory(self._pid))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
