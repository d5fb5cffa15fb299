"""The report page in a real browser, on a phone and on a desk: silent, without requests, within the window, readable,
and its slider works.
"""

import io

import numpy as np
import pytest
from PIL import Image

from ddt_jax import reporting
from ddt_jax.evaluation import page as pages
from tests import chromium
from tests.chromium import DESKTOP, PHONE
from tests.test_reporting import write_run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not chromium.found(), reason="no chromium or google-chrome; Debian: apt-get install chromium"),
]
SIZES = {"phone": PHONE, "desk": DESKTOP}
OVERFLOW = "[document.scrollingElement.scrollWidth, innerWidth]"
# Texts that differ in colour: [what, colour, colour of what is behind].
COLOURS = """(() => {
  const behind = e => { for (; e; e = e.parentElement) {
    const c = getComputedStyle(e).backgroundColor; if (!c.startsWith("rgba(0, 0, 0, 0")) return c; } };
  const found = {}, texts = "p, td, th, a, figcaption, .right, .wrong, .faint, summary, output, text";
  for (const e of document.querySelectorAll(texts)) {
    const style = getComputedStyle(e), svg = e instanceof SVGElement;
    found[e.tagName + "." + e.getAttribute("class")] = [svg ? style.fill : style.color, behind(e)];
  }
  return Object.entries(found).map(([what, colours]) => [what, ...colours]);
})()"""
# Pairs of texts of one chart that lie on each other, and texts that lie outside of their chart.
CROWDED = """(() => {
  const found = [];
  for (const chart of document.querySelectorAll("svg")) {
    const frame = chart.getBoundingClientRect(), texts = [...chart.querySelectorAll("text:not(.bad)")];
    const boxes = texts.map(t => t.getBoundingClientRect());
    boxes.forEach((a, i) => {
      if (a.left < frame.left - 1 || a.right > frame.right + 1 || a.bottom > frame.bottom + 1 || a.top < frame.top - 1)
        found.push(texts[i].textContent + " leaves " + chart.getAttribute("aria-label"));
      boxes.slice(i + 1).forEach((b, j) => {
        if (a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 2 && b.top < a.bottom - 2)
          found.push(texts[i].textContent + " on " + texts[i + 1 + j].textContent);
      });
    });
  }
  return found;
})()"""
# Whether a table is wider than its box and scrolls in it, and whether what its rows are about stays in sight then.
SCROLLED = """(() => {
  const wide = [...document.querySelectorAll(".table")].filter(t => t.scrollWidth > t.clientWidth + 1);
  const stays = wide.map(box => {
    const cell = box.querySelector("td"), before = cell.getBoundingClientRect().left;
    box.scrollLeft = 40;
    return box.scrollLeft > 0 && Math.abs(cell.getBoundingClientRect().left - before) < 1;
  });
  return [wide.length > 0, stays.every(x => x)];
})()"""
SHOWN = """(() => {
  const box = document.querySelector(".progressive");
  const seen = [...box.querySelectorAll("img[data-label]")].filter(i => i.getBoundingClientRect().height > 0);
  return [seen.map(i => i.dataset.label), box.querySelector("output").textContent, seen[0].naturalWidth > 0];
})()"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium.Browser(tmp_path_factory.mktemp("profile")) as one:
        yield one


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The page of two runs, one with a name that is long."""
    root = tmp_path_factory.mktemp("report")
    runs = [write_run(root / "a", lr=0.1), write_run(root / f"b_{'long' * 12}", lr=0.2, loss=2.0)]
    reporting.report(runs, str(root / "page.html"))
    return root / "page.html"


def luminance(colour: str) -> float:
    """Of "rgb(…)", by WCAG 2.1."""
    values = np.array([float(x) for x in colour[colour.index("(") + 1 : -1].split(",")[:3]]) / 255
    return float(
        np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]
    )


def contrast(a: str, b: str) -> float:
    dark, light = sorted([luminance(a), luminance(b)])
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("size", SIZES)
def test_the_page_is_silent_asks_for_nothing_and_stays_in_the_window(browser, report, size):
    tab = browser.open(report, SIZES[size])
    tab.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert tab.said == []
    assert [r for r in tab.requests if not r.startswith("data:image/")] == [report.as_uri()]
    width, window = tab.evaluate(OVERFLOW)
    assert window == SIZES[size][0] and width <= window
    assert tab.evaluate(SCROLLED) == ({"phone": [True, True], "desk": [False, True]}[size])
    assert tab.evaluate(CROWDED) == []
    broken = "[...document.querySelectorAll('td, th')].filter(c => c.getBoundingClientRect().height > 400).length"
    assert tab.evaluate(broken) == 0  # no column so narrow that words stand letter below letter


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_text_can_be_read_in_both_themes(browser, report, theme, tmp_path):
    tab = browser.open(report, PHONE, theme)
    found = tab.evaluate(COLOURS)
    assert len(found) > 8
    assert not [row for row in found if contrast(row[1], row[2]) < 4.5]  # WCAG 2.1, level AA
    shot = np.asarray(Image.open(io.BytesIO(tab.screenshot(tmp_path / "page.png").read_bytes())).convert("L"), float)
    assert shot.shape == PHONE[::-1] and shot.std() > 15
    assert (np.median(shot) > 200) == (theme == "light")


def test_the_slider_changes_what_is_shown(browser, report):
    tab = browser.open(report, PHONE)
    assert tab.evaluate(SHOWN) == [["8 tokens: 21.5 dB"], "8 tokens: 21.5 dB", True]
    tab.evaluate("document.querySelector('.progressive input').focus()")
    for key, label in [("ArrowLeft", "4 tokens: 15.0 dB"), ("Home", "2 tokens: 10.0 dB"), ("End", "8 tokens: 21.5 dB")]:
        tab.press(key)
        assert tab.evaluate(SHOWN) == [[label], label, True]
    assert tab.said == []


def test_a_page_that_is_wrong_would_be_seen(browser, tmp_path):
    """What the others look for, on a page that has it."""
    body = '<img src="http://127.0.0.1:9/x.png"><div style="width: 2000px">wide</div><p style="color: #ccc">pale</p>'
    (tmp_path / "page.html").write_text(pages.page("t", "", [("a", body + "<script>console.error('no')</script>")]))
    tab = browser.open(tmp_path / "page.html", PHONE)
    assert any("Content Security Policy" in line for line in tab.said) and "error: ['no']" in tab.said
    width, window = tab.evaluate(OVERFLOW)
    assert width > window
    assert [row for row in tab.evaluate(COLOURS) if contrast(row[1], row[2]) < 4.5]
