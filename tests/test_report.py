"""A report in words, as JSON, as plots and as a page: what they say, and that a browser shows it."""

from __future__ import annotations

import dataclasses
import html.parser
import json
import math
import pickle
import re
import subprocess
import sys

import numpy as np
import pytest

import qembag
from conftest import child_environment
from qembag.verdict.report import cosine_text

NAME = 'a <b>"table"</b> & co\n\x00\u202e'


@pytest.fixture(scope="module")
def report():
    rows = np.random.default_rng(5).standard_normal((300, 64), dtype=np.float32)
    return qembag.compare(rows.astype(np.float16), name=NAME)


def with_cosines(report, *worst, nbytes=None):
    """The report of so many variants, of these worst pooled cosines and bytes."""
    variants = [
        dataclasses.replace(variant, bags=variant.bags._replace(worst=cosine), nbytes=size)
        for variant, cosine, size in zip(report.variants, worst, nbytes or range(1000, 2000), strict=False)
    ]
    return dataclasses.replace(report, variants=tuple(variants))


# ---- In words --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cosine", "decimals", "text"),
    [
        (0.996129, 5, ".99612"),
        (0.99999999, 5, ".99999"),
        (1.0, 5, "1.00000"),
        (0.0, 3, ".000"),
        (-0.1234567, 5, "-.12346"),
        (-1.0, 2, "-1.00"),
        (0.29, 2, ".29"),
        (0.57, 2, ".57"),
        (math.nan, 5, "-"),
    ],
)
def test_a_cosine_is_rounded_down(cosine, decimals, text):
    assert cosine_text(cosine, decimals) == text


def test_no_cosine_looks_better_than_it_is(rng):
    next_to_decimals = np.nextafter(np.arange(1, 1000) / 1000, -1)
    for cosine in (*rng.uniform(-1, 1, 500), *(1 - 10 ** rng.uniform(-9, 0, 500)), *next_to_decimals):
        for decimals in (2, 3, 5, 9):
            shown = float(cosine_text(cosine, decimals))
            assert shown <= cosine <= shown + 1.0001 * 10.0**-decimals


def test_the_smallest_variant_that_holds_is_recommended(report):
    some = with_cosines(report, 0.9999, 0.97, 0.991, 0.9, nbytes=[400, 300, 200, 100])
    assert some.smallest() is some.variants[2]
    assert some.smallest(0.995) is some.variants[0]
    assert some.smallest(0.5) is some.variants[3]
    # Of equal bytes the better one; a limit that is met exactly is met.
    equal = with_cosines(report, 0.991, 0.995, 0.99, nbytes=[100, 100, 100])
    assert equal.smallest() is equal.variants[1]
    assert equal.smallest(0.995) is equal.variants[1]


def test_a_recommendation_is_in_words(report):
    variant = dataclasses.replace(report.variants[7], times_smaller=6.4)
    assert variant.label == "4 bits in groups of 32, lsq"
    one = with_cosines(dataclasses.replace(report, variants=(variant,)), 0.9969)
    assert one.recommendation() == "4 bits in groups of 32 (lsq): 6.4 times smaller, worst cosine .996"
    assert with_cosines(one, 0.999978).recommendation().endswith("worst cosine .999978")
    assert with_cosines(one, 1.0).recommendation().endswith("worst cosine 1.000")


def test_where_none_holds_it_says_so(report):
    some = with_cosines(report, 0.98, 0.98999999, 0.7, math.nan)
    assert some.smallest() is None
    text = some.recommendation()
    assert text.startswith("None of these keeps the cosine of each pooled bag at 0.99 or more. The closest, ")
    assert some.variants[1].label in text
    assert "worst cosine .989." in text
    assert with_cosines(report, math.nan).recommendation().endswith("try smaller groups")


def test_the_text_is_a_table_with_a_caption(report):
    table, advice, caption = str(report).split("\n\n")
    lines = table.splitlines()
    assert len({len(line) for line in lines}) == 1, "columns are not aligned"
    assert len(lines) == len(report.variants) + 1
    for line, variant in zip(lines[1:], report.variants, strict=True):
        assert line.startswith(f"{variant.label} ")
        assert cosine_text(variant.bags.worst) in line
    assert advice == report.recommendation()
    for part in ("300 x 64", "float16", "2,000 sums", "Zipf-like", qembag.__version__, "one thread", "Seed 0"):
        assert part in caption
    assert repr(report) == f"Report(name={NAME!r}, num_embeddings=300, dim=64, variants=12)"


def test_a_caption_tells_samples_and_bags_apart(report):
    rows = np.ones((9, 16), np.float32)
    bags = np.array([[1, 2], [3, 4]])
    assert "all of them were" in report.caption()
    assert "the given bags, whose rows are all in the sample" in qembag.compare(rows, sample=2, bags=bags).caption()
    assert "traffic of the sampled rows" in qembag.compare(rows, sample=2).caption()
    assert "2 sums of 2.0 rows on average, the given bags." in qembag.compare(rows, bags=bags).caption()


# ---- As data ---------------------------------------------------------------------------------------------------------


def test_a_report_is_json_without_what_json_has_not():
    rows = np.zeros((3, 16), np.float32)
    for report in (qembag.compare(rows), qembag.compare(rows + 1), qembag.compare(np.eye(16, dtype=np.float32))):
        plain = report.to_dict()
        assert json.loads(json.dumps(plain, allow_nan=False)) == plain
        assert plain.keys() >= {field.name for field in dataclasses.fields(report)}
        for variant, found in zip(report.variants, plain["variants"], strict=True):
            assert found["bits"] == variant.bits
            assert found["worst_rows"] == [{"row": row, "cosine": cosine} for row, cosine in variant.worst_rows]
            for part in ("rows", "bags"):
                cosines, histogram = getattr(variant, part), found[part]["histogram"]
                assert found[part]["worst"] == (cosines.worst if cosines.num_vectors else None)
                assert sum(histogram["counts"]) == cosines.num_vectors
                assert len(histogram["edges"]) == len(histogram["counts"]) + (cosines.num_vectors > 0)


def test_a_report_pickles(report):
    assert pickle.loads(pickle.dumps(report)) == report


# ---- Plots -----------------------------------------------------------------------------------------------------------


def test_a_plot_is_drawn_in_each_format(report, tmp_path):
    pytest.importorskip("matplotlib")
    starts = {"a.svg": b"<?xml", "a.png": b"\x89PNG", "a.PDF": b"%PDF"}
    for name, start in starts.items():
        report.plot(tmp_path / name)
        picture = (tmp_path / name).read_bytes()
        assert picture.startswith(start)
        report.plot(str(tmp_path / name))
        assert (tmp_path / name).read_bytes() == picture, "the same report, other bytes"
    assert {path.name for path in tmp_path.iterdir()} == set(starts), "something was left behind"
    text = (tmp_path / "a.svg").read_text()
    for label in ("2 bits/32", "8 bits", "relative error", "cosines of pooled bags", "lsq", "minmax"):
        assert f">{label}<" in text


def test_a_plot_of_another_format_is_refused(report, tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match=r"^path must end in .svg, .png or .pdf, got '.*a.gif'$"):
        report.plot(tmp_path / "a.gif")
    with pytest.raises(OSError, match="none"):
        report.plot(tmp_path / "none" / "a.png")


def test_labels_hide_neither_points_nor_each_other(report):
    Text = pytest.importorskip("matplotlib.text").Text
    from qembag.verdict import plots

    for sizes in ((None, 32), (None, 16, 32, 48)):
        many = qembag.compare(np.random.default_rng(1).standard_normal((99, 64), dtype=np.float32), group_sizes=sizes)
        with plots.our_style():
            figure = plots.new_figure(4, 3.9)
            plots.draw_errors(many, figure)
            figure.draw_without_rendering()
            (axes,) = figure.axes
            boxes = [Text.get_window_extent(text) for text in axes.texts]  # without the line to the point
            points = [axes.transData.transform((one.nbytes, one.relative_error)) for one in many.variants]
        assert len(boxes) >= 6
        for number, box in enumerate(boxes):
            assert not any(box.contains(*point) for point in points)
            assert not any(box.overlaps(other) for other in boxes[:number])


@pytest.mark.parametrize("rows", [np.zeros((2, 16)), np.ones((2, 16)), np.eye(16)], ids=["zeros", "ones", "eye"])
def test_degenerate_tables_are_drawn(rows, tmp_path):
    """Errors of 0 have no logarithm, and zeros no cosine."""
    pytest.importorskip("matplotlib")
    for bits in (8, (4, 2)):
        report = qembag.compare(rows.astype(np.float32), bits=bits)
        report.plot(tmp_path / "a.png")
        report.to_html(tmp_path / "a.html")


GUEST = """
import sys, threading
import numpy as np, matplotlib, qembag
matplotlib.rcParams.update({"font.size": 31, "axes.facecolor": "red", "svg.fonttype": "path"})
before = matplotlib.rcParams.copy()
report = qembag.compare(np.eye(16, dtype=np.float32))
report.plot(sys.argv[1] + "/a.svg")
threads = [threading.Thread(target=report.to_html, args=[f"{sys.argv[1]}/a{n}.html"]) for n in range(3)]
[thread.start() for thread in threads], [thread.join() for thread in threads]
assert len({open(f"{sys.argv[1]}/a{n}.html", "rb").read() for n in range(3)}) == 1
assert matplotlib.rcParams.copy() == before
assert "matplotlib.pyplot" not in sys.modules
"""


@pytest.mark.slow
def test_the_callers_matplotlib_stays_as_it_was(tmp_path):
    pytest.importorskip("matplotlib")
    environment = child_environment()
    subprocess.run([sys.executable, "-c", GUEST, str(tmp_path)], check=True, timeout=120, env=environment)
    # Nor does it change what is drawn.
    report = qembag.compare(np.eye(16, dtype=np.float32))
    report.plot(tmp_path / "b.svg")
    assert "font: 31px" not in (tmp_path / "a.svg").read_text()
    assert "#ff0000" not in (tmp_path / "a.svg").read_text()


def test_without_matplotlib_it_is_said_how_to_get_it(report, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for draw in (lambda: report.plot(tmp_path / "a.png"), lambda: report.to_html(tmp_path / "a.html")):
        with pytest.raises(ImportError, match=r"pip install 'qembag\[plot\]'"):
            draw()
    assert not list(tmp_path.iterdir())
    assert str(report)


# ---- The page --------------------------------------------------------------------------------------------------------


class Page(html.parser.HTMLParser):
    """Each element with its attributes, the text, and whether tags match."""

    EMPTY = ("meta", "br", "use", "path", "link", "img", "input", "hr")

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.words, self.ids = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        if tag not in self.EMPTY:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] not in (["style"], ["title"]):
            self.words.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self):
        return " ".join("".join(self.words).split())


@pytest.fixture(scope="module")
def page(report, tmp_path_factory):
    pytest.importorskip("matplotlib")
    path = tmp_path_factory.mktemp("page") / "page.html"
    report.to_html(path)
    return path


def test_a_page_says_what_the_report_says(page, report):
    text = Page(page.read_text("utf-8")).text
    chosen = report.smallest()
    assert report.recommendation() in text
    assert f'qembag.quantize(weights, {chosen.bits}, method="{chosen.method}"' in text
    for variant in report.variants:
        assert variant.label in text
        assert cosine_text(variant.bags.worst) in text
    for number, cosine in chosen.worst_rows:
        assert f"{number:,} {cosine_text(cosine)}" in re.sub(r"(?<=\d)(?=\.)", " ", text)
    assert "2,000 sums" in text


def test_a_page_needs_nothing_else(page):
    text = page.read_text("utf-8")
    parsed = Page(text)
    assert not re.search(r"https?:|//|@import|javascript:", text)
    outside = {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    assert not {tag for tag, _ in parsed.elements} & outside
    for tag, attributes in parsed.elements:
        assert not any(name.startswith("on") or name in ("src", "srcset", "xmlns") for name in attributes), tag
        for target in [*re.findall(r"url\(([^)]*)\)", attributes.get("style") or ""), attributes.get("href") or "#"]:
            assert target.startswith("#")
        for name in ("href", "aria-labelledby"):
            if attributes.get(name):
                assert attributes[name].lstrip("#") in parsed.ids
    for target in re.findall(r"url\(#([^)]*)\)", text):
        assert target in parsed.ids
    assert len(parsed.ids) == len(set(parsed.ids)), "an id is there twice"
    policy = next(meta["content"] for meta in parsed.all("meta") if "http-equiv" in meta)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_what_users_name_is_text(page):
    text = page.read_text("utf-8")
    parsed = Page(text)
    assert not parsed.all("b") or all(not attributes for attributes in parsed.all("b"))
    assert 'a <b>"table"</b> & co\ufffd\ufffd\u202e' in "".join(parsed.words)
    assert "<b>&quot;" not in text
    assert "\x00" not in text


def test_a_name_that_is_no_text_is_shown_as_far_as_it_is(report, tmp_path):
    pytest.importorskip("matplotlib")
    dataclasses.replace(report, name="\udcff.npy").to_html(tmp_path / "a.html")
    assert "<bdi>?.npy</bdi>" in (tmp_path / "a.html").read_text("utf-8")


def test_a_page_is_for_every_reader(page):
    text = page.read_text("utf-8")
    parsed = Page(text)
    assert text.startswith("<!doctype html>\n")
    assert parsed.all("html") == [{"lang": "en"}]
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in parsed.all("meta")
    assert len(parsed.all("h1")) == len(parsed.all("main")) == 1
    assert all(head.get("scope") in ("col", "row", "colgroup") for head in parsed.all("th"))
    assert len(parsed.all("th")) > 12
    assert len(parsed.all("svg")) == 3
    assert len(parsed.all("style")) == 1, "a picture's rules would be the whole page's"
    for picture in parsed.all("svg"):
        assert picture["role"] == "img"
        assert len(picture["aria-label"]) > 20
    assert "prefers-color-scheme: dark" in text
    # Lines and letters of plots have the page's colour.
    assert text.count("currentColor") > 50
    assert "#000000" not in text


def test_where_no_variant_holds_a_page_recommends_none(report, tmp_path):
    pytest.importorskip("matplotlib")
    report.to_html(tmp_path / "a.html", min_cosine=1)
    parsed = Page((tmp_path / "a.html").read_text("utf-8"))
    assert "None of these keeps the cosine of each pooled bag at 1 or more" in parsed.text
    assert "recommended" not in parsed.text
    assert "good" not in next(part["class"] for part in parsed.all("section"))


def test_a_page_that_fails_leaves_the_old_one(report, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    path = tmp_path / "a.html"
    path.write_text("old")
    monkeypatch.setattr("os.replace", lambda *paths: (_ for _ in ()).throw(OSError("no")))
    with pytest.raises(OSError, match="no"):
        report.to_html(path)
    assert [(one.name, one.read_text()) for one in tmp_path.iterdir()] == [("a.html", "old")]
