"""A report's page in Chromium: it is drawn, in both schemes, and the page never scrolls sideways.

Debian has it as the package `chromium`.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess

import numpy as np
import pytest

import qembag
from conftest import UNDER_SANITIZER

CHROMIUM = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed"),
    pytest.mark.skipif(UNDER_SANITIZER, reason="the browser would be loaded with the sanitizer"),
]
# No first run, no network, and none of the user's settings.
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars --virtual-time-budget=5000"
)
WIDTHS = {360: 780, 768: 1024, 1280: 900}
# What the page measures of itself inside a frame, read from outside; the page has no script.
MEASURE = """
const one = document.querySelector("iframe"), inside = one.contentDocument, root = inside.documentElement;
const width = element => element.getBoundingClientRect().width;
const box = inside.querySelector(".scroll");
document.body.dataset.found = JSON.stringify({
  asked: one.clientWidth, page: root.scrollWidth, height: root.scrollHeight,
  scrolls: box.scrollWidth > box.clientWidth, box: width(box),
  plots: [...inside.querySelectorAll("svg")].map(width),
  letters: Math.min(...[...inside.querySelectorAll("svg text")].map(text => text.getBoundingClientRect().height)),
  lost: [...inside.querySelectorAll("body *:not(.scroll *, svg *)")]
    .filter(one => one.getBoundingClientRect().right > root.clientWidth + 1).length,
  ink: inside.defaultView.getComputedStyle(inside.querySelector("svg text")).fill,
});
"""


@pytest.fixture(scope="module")
def report():
    pytest.importorskip("matplotlib")
    rows = np.random.default_rng(5).standard_normal((2000, 128), dtype=np.float32)
    name = "a_name_of_a_file_that_has_no_place_to_break_" * 4 + ".safetensors, model.embed_tokens.weight"
    return qembag.compare(rows, name=name)


@pytest.fixture(scope="module")
def page(report, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "page.html"
    report.to_html(path)
    return path


def chromium(profile, *arguments) -> str:
    command = [CHROMIUM, *FLAGS.split(), f"--user-data-dir={profile}", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, check=True, timeout=120, encoding="utf-8").stdout


def pixels(path):
    from matplotlib import image

    return np.round(image.imread(path)[..., :3] * 255).astype(int)


def share_of(picture, color):
    return (np.abs(picture - color).max(axis=2) <= 2).mean()


@pytest.mark.parametrize("width", WIDTHS)
def test_a_page_does_not_scroll_sideways(page, tmp_path, width):
    frame = tmp_path / "frame.html"
    inside = html.escape(page.read_text("utf-8"))
    frame.write_text(
        f'<!doctype html><body style="margin: 0"><iframe width="{width}" height="{WIDTHS[width]}" style="border: 0" '
        f'srcdoc="{inside}"></iframe><script>onload = () => {{{MEASURE}}}</script>',
        "utf-8",
    )
    dom = chromium(tmp_path / "profile", "--dump-dom", "--window-size=1400,1000", frame.as_uri())
    found = json.loads(html.unescape(re.search(r'data-found="([^"]*)"', dom)[1]))
    assert found["asked"] == width
    assert found["page"] == width
    assert found["lost"] == 0
    assert found["scrolls"] == (width < 1280), "the table fits, or scrolls in its own box"
    assert found["box"] <= width - 20
    assert len(found["plots"]) == 3
    assert min(found["plots"]) >= 300
    assert found["letters"] >= 11
    assert found["height"] > 1000


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_page_is_drawn(page, tmp_path, width, scheme):
    picture = tmp_path / "page.png"
    dark = ["--force-dark-mode", "--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    size = f"--window-size={width},{WIDTHS[width]}"
    chromium(tmp_path / "profile", *dark, f"--screenshot={picture}", size, page.as_uri())
    drawn = pixels(picture)
    assert drawn.shape == (WIDTHS[width], width, 3)
    paper, good = (
        ((0xFF, 0xFF, 0xFF), (0xE3, 0xF4, 0xEA)) if scheme == "light" else ((0x14, 0x17, 0x1A), (0x17, 0x34, 0x26))
    )
    ink = (0x1B, 0x1F, 0x24) if scheme == "light" else (0xE6, 0xE9, 0xEC)
    assert 0.4 < share_of(drawn, paper) < 0.95
    assert share_of(drawn, good) > 0.03, "the recommendation's panel"
    assert share_of(drawn, ink) > 0.003, "letters"
    # Something is in each quarter from top to bottom.
    for part in np.array_split(drawn, 4):
        assert len(np.unique(part.reshape(-1, 3), axis=0)) > 10


def test_a_blank_page_is_found(tmp_path):
    blank, picture = tmp_path / "blank.html", tmp_path / "blank.png"
    blank.write_text("<!doctype html><title>blank</title>")
    chromium(tmp_path / "profile", f"--screenshot={picture}", "--window-size=360,780", blank.as_uri())
    assert share_of(pixels(picture), (255, 255, 255)) == 1


def test_plots_are_drawn_in_their_colours(report, page, tmp_path):
    """Further down than a screen."""
    picture = tmp_path / "page.png"
    chromium(tmp_path / "profile", f"--screenshot={picture}", "--window-size=1280,2200", page.as_uri())
    drawn = pixels(picture)
    for color in ((0x3B, 0x82, 0xC4), (0xD9, 0x76, 0x2B)):
        assert share_of(drawn, color) > 0.0003
