"""What the documents show runs as it is written, and prints what they say.

A page that shows other libraries says so at its top, a line for each: ``<!-- needs: torch -->``. Where one of them is not
installed, the page is skipped.
"""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from pathlib import Path

import pytest

from support.documents import blocks, is_as_shown

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    path
    for path in [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"]
    if path.exists() and "```python" in path.read_text()
]
pytestmark = pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="the documents are not beside the tests")


def needed(text: str) -> list[str]:
    """The packages that a page's code needs."""
    return re.findall(r"(?m)^<!-- needs: (\w+) -->$", text)


def with_marks(page: Path) -> object:
    return pytest.param(page, id=page.name, marks=[pytest.mark.torch] if "torch" in needed(page.read_text()) else [])


@pytest.mark.parametrize("page", [with_marks(page) for page in PAGES])
def test_blocks_of_python_run_and_print_what_is_shown(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    others = needed(page.read_text())
    with warnings.catch_warnings():
        if others:
            warnings.simplefilter("ignore")  # theirs
        for name in others:
            pytest.importorskip(name)
        run(page)


def run(page: Path) -> None:
    names: dict[str, object] = {"__name__": "__docs__"}
    for code, shown in blocks(page.read_text(), "python"):
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(compile(code, str(page), "exec"), names)  # noqa: S102 (our own documents)
        assert is_as_shown(output.getvalue(), shown), f"{page.name}:\n{code}\nprinted\n{output.getvalue()}"


def test_blocks_and_what_they_print_are_found():
    text = "a\n\n```python\nprint(1)\n\nprint(2)\n```\n\n    1\n\n    2\n\nb\n\n```python\nx = 1\n```\n"
    assert blocks(text, "python") == [("print(1)\n\nprint(2)\n", "1\n\n2"), ("x = 1\n", "")]
    assert is_as_shown("1.25 s\nok\n", "... s\nok")
    assert not is_as_shown("1.25 s\nbad\n", "... s\nok")
    assert {page.name for page in PAGES} >= {"quality.md", "updating.md"}
    assert needed("<!-- needs: torch -->\n<!-- needs: gguf -->\n\n# A\n") == ["torch", "gguf"]
    assert needed("# A\n\nIt needs: torch\n") == []
