"""What documents show: blocks of code, and what they print."""

from __future__ import annotations

import re


def blocks(text: str, language: str) -> list[tuple[str, str]]:
    """Each block of that language, and the indented lines that follow it: what it prints."""
    found = re.findall(rf"(?m)^```{language}\n((?:.*\n)*?)```\n(?:\n((?:(?:    .*)?\n)+))?", text)
    return [(code, re.sub("(?m)^    ", "", printed).strip()) for code, printed in found]


def is_as_shown(printed: str, shown: str) -> bool:
    """With "..." for what differs from run to run."""
    pattern = re.escape(shown).replace(re.escape("..."), ".*")
    return re.fullmatch(pattern, printed.strip(), re.DOTALL) is not None
