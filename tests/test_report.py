"""The page and the tables: nothing on them comes from elsewhere, nothing a prompt says becomes markup, the best is
marked only among values of one kind, and the file stays small however many images were measured."""

import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from nanomed.evaluation import imagesets, measuring, reports, table, webpage
from nanomed.metrics import entries, memorisation
from nanomed.metrics.colour import measure

NASTY = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</title></style></bdi><!-- <b>bold</b> & &amp; &lt;",
    "\u202etxet sdrawkcab\u202c \u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627",
    "javascript:alert(1) http://example.com/a.png",
    "nul \x00 bell \x07 lone surrogate \ud800 emoji \U0001f9a0",
    "word " * 2000,  # 10 kB
    "",
]
ALLOWED = {
    "html": {"lang"}, "head": set(), "meta": {"charset", "http-equiv", "content", "name"}, "title": set(),
    "style": set(), "body": set(), "main": set(), "h1": set(), "h2": set(), "h3": set(), "p": {"class"},
    "section": set(),
    "div": {"class"}, "bdi": set(), "table": {"class"}, "thead": set(), "tr": set(), "th": set(),
    "td": {"class", "data-label"}, "span": {"class", "title"}, "ul": set(), "li": set(), "b": {"style"},
    "figure": set(), "figcaption": set(), "img": {"class", "alt", "src"}, "details": set(), "summary": set(),
    "svg": {"viewbox", "role"}, "polygon": {"points", "style"}, "line": {"x1", "y1", "x2", "y2", "style"},
    "polyline": {"points", "style"}, "text": {"x", "y", "text-anchor", "style"},
}  # fmt: skip


class Reader(HTMLParser):
    """Everything a browser would see: elements with their attributes, and the texts of <bdi>."""

    def __init__(self, page: str):
        super().__init__()
        self.elements, self.texts, self.inside = [], [], 0
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag == "bdi":
            self.inside += 1
            self.texts.append("")

    def handle_endtag(self, tag):
        self.inside -= tag == "bdi"

    def handle_data(self, data):
        if self.inside:
            self.texts[-1] += data


def picture(seed: int, side: int = 64) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


@pytest.fixture
def outcome(tmp_path) -> measuring.Outcome:
    """An evaluation of images whose names, prompts, notes and metrics are all hostile."""
    for name, first in (("real", 0), ("fake", 100)):
        (tmp_path / name).mkdir()
        for i in range(24):
            Image.fromarray(picture(first + i)).save(tmp_path / name / f"{i:02d} <b>&'.png")
    real, fake = (imagesets.find(str(tmp_path / name), f'{name} "<i>&') for name in ("real", "fake"))
    prompts = tuple((NASTY[i % len(NASTY)],) for i in range(24))
    real, fake = (imagesets.replace(images, prompts=prompts) for images in (real, fake))
    pixels = [{"pixels": memorisation.pixels(s.image(i) for i in range(24))} for s in (real, fake)]
    colours = {s.name: measure(s.image(i) for i in range(24)) for s in (real, fake)}
    entry = entries.share([True, False, True], "<script>protocol</script>") | {"flag": NASTY[1], "network": "ab" * 32}
    return measuring.Outcome(
        measuring.Sets({real.name: real}, fake, real), {real.name: {NASTY[0]: entry}}, {}, NASTY, colours,
        memorisation.examine(*pixels),
    )  # fmt: skip


def test_nothing_that_is_written_on_the_page_becomes_markup(outcome):
    page = reports.page(outcome)
    page.encode("utf-8")  # lone surrogates too
    seen = Reader(page)
    for tag, attributes in seen.elements:
        assert tag in ALLOWED and set(attributes) <= ALLOWED[tag], (tag, attributes)
    for prompt in NASTY[:6]:
        assert prompt in seen.texts, prompt  # it is there, to the letter
    assert NASTY[7] in seen.texts and NASTY[7][: webpage.SHOWN] + "…" in seen.texts  # folded, but whole
    assert "nul  bell  lone surrogate ? emoji \U0001f9a0" in seen.texts


def test_nothing_comes_from_elsewhere(outcome):
    """No element that loads, and a policy that forbids it should one slip in."""
    page = reports.page(outcome)
    elements = Reader(page).elements
    sources = [attributes["src"] for tag, attributes in elements if tag == "img"]
    assert len(sources) > 50 and all(source.startswith("data:image/jpeg;base64,") for source in sources)
    style = re.search(r"<style>(.*?)</style>", page, re.DOTALL).group(1)
    assert "url(" not in style and "@import" not in style
    styles = [attributes["style"] for _, attributes in elements if "style" in attributes]
    assert styles and not any("url(" in style for style in styles)
    policies = [a["content"] for tag, a in elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_real_and_generated_images_of_a_prompt_stand_side_by_side(outcome):
    rows = list(reports._rows(*outcome.sets.reals.values(), outcome.sets.fake))
    assert len(rows) == len(NASTY)
    for row in rows:
        said = "" if row.heading == "(no prompt)" else row.heading
        for images, pictures in ((*outcome.sets.reals.values(), row.real), (outcome.sets.fake, row.fake)):
            expected = [i for i in range(24) if images.prompts[i] == (said,)][: reports.STRIP]
            assert [p.caption for p in pictures] == [images.title(i) for i in expected]
            assert all((p.image == images.image(i)).all() for p, i in zip(pictures, expected))


def test_classes_go_before_prompts_and_files_without_either_stand_in_order(outcome):
    (real,), fake = outcome.sets.reals.values(), outcome.sets.fake
    labels = tuple("ab"[i % 2] for i in range(24))
    by_class = list(reports._rows(imagesets.replace(real, labels=labels), imagesets.replace(fake, labels=labels)))
    assert [row.heading for row in by_class] == ["a", "b"]
    plain = list(reports._rows(imagesets.replace(real, prompts=()), imagesets.replace(fake, prompts=())))
    assert [p.caption for p in plain[1].fake] == [fake.title(i) for i in range(4, 8)]
    half = list(reports._rows(imagesets.replace(real, prompts=()), fake))
    assert [p.caption for p in half[1].real] == [real.title(i) for i in range(4, 8)] and "not known" in half[1].label


def test_a_page_of_5000_large_images_is_a_small_file(tmp_path, outcome):
    """The least compressible images there are, 5,000 generated ones with as many prompts: the number of pictures and
    the length of lists are bounded. The bar is 25 MB."""
    Image.fromarray(picture(0, 512)).save(tmp_path / "noise.png")
    prompts = tuple((f"{i} " + "word " * 2000,) for i in range(5000))
    many = imagesets.ImageSet("many", (tmp_path / "noise.png",) * 5000, prompts)
    pairs = [memorisation.Pair(i, i, "pixels", 0.0, 0.0, True) for i in range(5000)]
    found = memorisation.Memorisation(outcome.nearest.spaces, np.zeros(5000), list(range(5000)), pairs, 0.01, False)
    colours = {"many": measure([picture(0)])}
    page = reports.page(
        measuring.Outcome(measuring.Sets({"many": many}, many, many), {"many": {}}, {}, [], colours, found)
    )
    assert page.count("<img") <= 2 * reports.ROWS * reports.STRIP + 2 * reports.PAIRS
    assert len(page.encode()) < 5e6


def test_drawings_are_well_formed_and_show_the_shares():
    shares = np.array([0.0, 0.25, 0.5, 0.25])
    drawn = webpage.histogram("a < b", {"real": shares, "generated": shares[::-1]}, 0, 1)
    svg = ElementTree.fromstring(re.search(r"<svg.*?</svg>", drawn).group().replace('role="img"', ""))
    polygons = svg.findall("polygon")
    heights = [float(point.split(",")[1]) for point in polygons[0].get("points").split()]
    base, top = max(heights), min(heights)
    assert len(polygons) == 2 and [round((base - y) / (base - top), 2) for y in heights[1:-1:2]] == [0, 0.5, 1, 0.5]
    assert webpage.binned(np.array([-1.0, 0.1, 0.9, 7.0]), 0, 1, 2).tolist() == [0.5, 0.5]


# ------------------------------------------------------------------------------------------------------------ tables


def entry(value, protocol="p", network="n", real="r", n=3000) -> dict:
    return {"value": value, "protocol": protocol, "network": network, "real": real, "n_real": n, "n_fake": n}


def test_every_metric_knows_which_way_is_better():
    lower = ["FID", "KID", "KFD", "HFD", "FID [single]", "toy-classifier Frechet distance", "toy-classifier KID",
             "colour mean distance", "HLDF colour distance", "copies of training images"]  # fmt: skip
    higher = ["IS", "IS med", "precision", "recall", "F1", "density", "coverage", "prompt faithfulness",
              "polyp position", "box artefact yes/no", "classifier F1 macro [real]",
              "classifier balanced accuracy [real]"]  # fmt: skip
    assert [table.direction(name) for name in lower] == [-1] * len(lower)
    assert [table.direction(name) for name in higher] == [1] * len(higher)
    assert table.direction("IS std") == table.direction("nearer than held-out, pixels") == 0


def test_the_best_is_marked_in_each_column():
    runs = {"a": {"FID": entry(3.0), "recall": entry(0.4)}, "b": {"FID": entry(2.0), "recall": entry(0.6)},
            "c": {"FID": entry(None), "recall": entry(0.6)}}  # fmt: skip
    assert table.best_of("FID", runs) == {"b"} and table.best_of("recall", runs) == {"b", "c"}
    lines = table.columns(runs).splitlines()
    assert lines[1].split() == ["a", "3.0000", "0.4000"] and lines[2].split() == ["b", "*2.0000", "*0.6000"]
    assert lines[3].split() == ["c", "undefined", "*0.6000"]
    assert "\033[1m   2.0000\033[0m" in table.columns(runs, bold=True) and "*" not in table.columns(runs, mark=False)
    assert webpage.comparison(runs).count('class="best"') == 3


@pytest.mark.parametrize("what", ["protocol", "network", "real"])
def test_values_of_different_kinds_have_no_best(what):
    """A lower FID under another protocol, network or set of real images is no better one."""
    runs = {"a": {"FID": entry(3.0)}, "b": {"FID": entry(2.0)}, "other": {"FID": entry(1.0, **{what: "x"})}}
    assert table.best_of("FID", runs) == {"b"}
    assert table.best_of("FID", {"a": runs["a"], "other": runs["other"]}) == set()
    assert any(f"FID: the runs differ in {table.DECISIVE[what]}" in line for line in table.caveats(runs))


def test_different_numbers_of_images_are_pointed_out():
    runs = {"a": {"FID": entry(3.0)}, "b": {"FID": entry(2.0, n=500)}}
    assert "FID: computed at different N (500, 3,000), on which the bias depends" in table.caveats(runs)


def test_columns_wrap_where_the_terminal_ends_and_sets_become_lines():
    results = {f"metric {i} [{name}]": entry(0.5) for i in range(20) for name in ("single", "both")}
    rows = table.by_set("run", results)
    assert list(rows) == ["run [single]", "run [both]"] and list(rows["run [both]"])[0] == "metric 0"
    text = table.columns(rows, width=80)
    assert max(map(len, text.splitlines())) <= 80 and text.count("run [both]") > 2
    assert table.columns({}) == "" and table.columns({"a": {}}) == ""


def test_small_numbers_of_images_are_flagged():
    assert "biased upwards" in entries.small(2047, biased=True)["flag"] and entries.small(2048) == {}
    assert "too few images for an interval" in entries.small(19)["flag"]
    results = {"FID": entry(2.0, n=50) | entries.small(50, biased=True)}
    assert "! FID: N = 50 is below 2,048" in table.full(results)
    assert "below 2,048" in webpage.measures(results)


def test_the_curve_of_precision_over_recall_goes_through_its_points():
    points = [(0.0, 1.0), (0.5, 0.75), (1.0, 0.0)]
    drawn = webpage.curves(NASTY[0], {"generated": points, "real <b>": points[:2]}, "recall", "precision <i>")
    reader = Reader(drawn)
    assert all(set(attributes) <= ALLOWED[tag] for tag, attributes in reader.elements)
    svg = ElementTree.fromstring(re.search(r"<svg.*?</svg>", drawn).group())
    lines = [line.get("points") for line in svg.findall("polyline")]
    low, middle, high = (tuple(map(float, point.split(","))) for point in lines[0].split())
    assert lines[1] == " ".join(lines[0].split()[:2])
    assert low[0] < middle[0] == (low[0] + high[0]) / 2 and low[1] < middle[1] < high[1]  # SVG counts downwards
    assert (high[1] - middle[1]) / (high[1] - low[1]) == pytest.approx(0.75, abs=1e-3)
