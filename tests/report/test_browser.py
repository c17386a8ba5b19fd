"""The report page in a real browser: it fits a phone, can be read and operated by keyboard, and loads nothing."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import snpc
from snpc.report import write_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine: apt install chromium"),
]
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser: pip install playwright")

DATA = Path(snpc.__file__).parent / "data" / "digits"
MODEL = DATA / "digits_vit.onnx"
PHONE, DESKTOP = 390, 1400

# Every text of the page with its color and what is behind it, both as the browser paints them: [[text, color, paper]].
COLORS_OF_TEXTS = """() => {
  const behind = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const color = getComputedStyle(e).backgroundColor;
      if (!color.endsWith(", 0)") && color !== "transparent") return color;
    }
    return getComputedStyle(document.documentElement).colorScheme.includes("dark") ? "none" : "rgb(255, 255, 255)";
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    const text = walker.currentNode.textContent.trim();
    if (!text || ["title", "style"].includes(element.localName)) continue;
    const style = getComputedStyle(element);
    found.push([text, element.localName === "text" ? style.fill : style.color, behind(element)]);
  }
  return found;
}"""

# What the reader tabs to: [[name of the element, width of its outline]], until focus is back at the start.
FOCUSED = """() => {
  const e = document.activeElement, style = getComputedStyle(e);
  return [e.localName, style.outlineStyle === "none" ? 0 : parseFloat(style.outlineWidth), e.scrollWidth];
}"""
INTERACTIVE = "summary, a[href], button, input, [tabindex='0']"


def pages(folder: Path) -> dict[str, Path]:
    """A page of a model that was just pruned, and one of two files."""
    half, more, single, several = (folder / name for name in ("half.onnx", "more.onnx", "one.html", "two.html"))
    data = snpc.load_calibration(str(DATA / "calib.npz"), snpc.load(MODEL).inputs, samples=16)
    plan = snpc.plan(snpc.analyze(snpc.load(MODEL)), snpc.Budget(ratio=0.5), data)
    write_report(snpc.apply(plan, half), single, plan=plan)
    snpc.prune(MODEL, more, ratio=0.9, tokens="topk:3@1-3")
    timed = snpc.bench([MODEL, half, more], protocol=snpc.TimingProtocol(1, 3))
    write_report(snpc.compare_files(MODEL, [half, more], calibration=data), several, bench=timed)
    return {"one": single, "two": several}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return pages(tmp_path_factory.mktemp("pages"))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield opened
        opened.close()


def open_page(browser: Any, path: Path, width: int, scheme: str = "light") -> tuple[Any, list[str]]:
    """The page with every folded part open, and the addresses that it asked for."""
    page = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme).new_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(path.as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(e => e.open = true)")
    return page, asked


def luminance(color: str) -> float:
    """Relative luminance of ``rgb(r, g, b)`` (https://www.w3.org/TR/WCAG21/#dfn-relative-luminance)."""
    parts = [float(part) / 255 for part in color.partition("(")[2].rstrip(")").split(",")[:3]]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(weight * p for weight, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(a: str, b: str) -> float:
    """Contrast ratio, from 1 to 21."""
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_that_of_the_definition() -> None:
    assert contrast("rgb(0, 0, 0)", "rgb(255, 255, 255)") == pytest.approx(21)
    assert contrast("rgb(119, 119, 119)", "rgb(255, 255, 255)") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("name", ["one", "two"])
def test_the_page_fits_its_window_and_loads_nothing(name: str, written: dict[str, Path], browser: Any) -> None:
    for width in (PHONE, DESKTOP):
        page, asked = open_page(browser, written[name], width)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        outside = "[...document.querySelectorAll('svg text')].filter(e => e.getBoundingClientRect().right > innerWidth)"
        assert page.evaluate(f"{outside}.length") == 0  # nor is a text of a chart cut off
        assert all(url == written[name].as_uri() or url.startswith("data:") for url in asked) and asked
        page.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["one", "two"])
def test_every_text_can_be_read(name: str, scheme: str, written: dict[str, Path], browser: Any) -> None:
    page, _ = open_page(browser, written[name], DESKTOP, scheme)
    texts = page.evaluate(COLORS_OF_TEXTS)
    assert len(texts) > 100
    papers = {paper for _, _, paper in texts}
    assert all((luminance(paper) < 0.1) is (scheme == "dark") for paper in papers)
    poor = {(text, color, paper) for text, color, paper in texts if contrast(color, paper) < 4.5}
    assert not poor
    page.context.close()


def test_a_keyboard_reaches_everything(written: dict[str, Path], browser: Any) -> None:
    page, _ = open_page(browser, written["two"], PHONE)
    expected = page.evaluate(f'[...document.querySelectorAll("{INTERACTIVE}")].map(e => e.localName)')
    assert expected.count("summary") >= 3
    reached = []
    for _ in expected:
        page.keyboard.press("Tab")
        name, outline, _ = page.evaluate(FOCUSED)
        assert outline >= 2, f"{name} does not show that it has the focus"
        reached.append(name)
    assert reached == expected
    scrolled = (
        "[...document.querySelectorAll('*')].filter(e => e.scrollWidth > e.clientWidth + 1 && e.clientWidth && "
        "['auto', 'scroll'].includes(getComputedStyle(e).overflowX) && e.tabIndex < 0).length"
    )
    assert page.evaluate(scrolled) == 0  # what scrolls can be scrolled by keys
    page.focus("summary")
    page.keyboard.press("Enter")
    assert not page.evaluate("document.activeElement.parentElement.open")
    page.context.close()
