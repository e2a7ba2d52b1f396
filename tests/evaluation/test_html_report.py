"""The HTML report: what it says, that nothing in it can run or load, and how it behaves in a browser."""

import base64
import hashlib
import html.parser
import io
import json
import math
import re
import shutil

import matplotlib.image
import numpy as np
import pytest
from conftest import run_script

from vqvae_jax.data import phantom
from vqvae_jax.evaluation import html_report
from vqvae_jax.evaluation.table import Evaluation, SliceMetrics

HOSTILE = "<script>alert(1)<img src=x onerror=alert(1)>\"'&\udcff.nii"
ABOUT = html_report.About("a run", "test", "as stated", {"Data": "a.zip"})
SHAPE = (48, 32)
HISTORY = [
    {"step": step, "split": split, key: 0.1 * step}
    for step in (1, 2, 3)
    for split, key in (("train", "loss"), ("validation", "ssim"))
]


def evaluated(count=9, **measures):
    """An evaluation of ``count`` slices whose SSIM and PSNR have different orders."""
    rng = np.random.default_rng(3)
    measured = {"ssim": rng.uniform(0.4, 0.9, count), "psnr": rng.uniform(20, 30, count)} | measures
    rows = [
        SliceMetrics(f"case/file{index}.nii", "case", index, *SHAPE, float(ssim), float(psnr), 0.05, 0.9, 0.5)
        for index, (ssim, psnr) in enumerate(zip(measured["ssim"], measured["psnr"], strict=True))
    ]
    return Evaluation(rows, np.array([40.0, 0, 10, 2]), 96)


def pictures(count=9):
    """Originals are dark with a ramp to the right, reconstructions bright."""
    ramp = np.linspace(0.2, 0.4, SHAPE[0])[:, None] * np.ones(SHAPE)
    return [html_report.Picture(index, ramp, np.full(SHAPE, 0.75)) for index in range(count)]


class Page(html.parser.HTMLParser):
    """The elements of a page and its text."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.words = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)

    def all(self, tag, name=None):
        return [attrs for found, attrs in self.elements if found == tag and (name is None or name in attrs)]

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def test_the_page_has_figures_charts_and_every_shown_slice():
    result = evaluated()
    page = Page(html_report.render(ABOUT, result, HISTORY, pictures()))
    summary = result.summary()
    for words in (f"{summary['ssim']:.3f}", f"{summary['psnr']:.1f} dB", f"{summary['bits_per_pixel']:.3f}", "75 %"):
        assert words in page.text
    titles = [chart["aria-label"].split(".")[0] for chart in page.all("svg")]
    assert titles == [
        *("SSIM of the slices", "Share of each code (%)", "Training loss", "SSIM on validation slices"),
    ]
    assert [card["data-index"] for card in page.all("article")] == list("012345678")
    assert all(image["alt"] and image["src"].startswith("data:image/png;base64,") for image in page.all("img"))
    assert len(page.all("img")) == 18 and "All 9 slices are shown" in page.text


def test_nothing_comes_from_elsewhere_and_only_its_own_script_may_run():
    text = html_report.render(ABOUT, evaluated(), HISTORY, pictures())
    page = Page(text)
    for _, attributes in page.elements:
        for name in ("src", "href", "srcset", "action", "data"):
            assert attributes.get(name, "data:").startswith("data:")
    style = re.search(r"<style>(.*?)</style>", text, re.S)[1]
    assert "url(" not in style and "@import" not in style
    policy = next(meta["content"] for meta in page.all("meta", "http-equiv"))
    script = re.findall(r"<script>(.*?)</script>", text, re.S)
    assert len(script) == 1
    assert f"'sha256-{base64.b64encode(hashlib.sha256(script[0].encode()).digest()).decode()}'" in policy
    assert policy.startswith("default-src 'none'")


def test_hostile_names_are_text():
    """The page has the elements and attributes that it has with harmless names."""

    def page(name):
        about = html_report.About(name, name, name, {name: name}, name)
        row = SliceMetrics(f"case/{name}", name, 0, *SHAPE, 0.5, 20, 0.1, 0.5, 0.5)
        result = Evaluation([row], evaluated().counts, 96)
        history = [{"step": name, "split": "train", "loss": 1}, {"step": 1, "split": "train", "loss": name}]
        text = html_report.render(about, result, history, pictures(1))
        text.encode("ascii")
        return Page(text)

    hostile, harmless = page(HOSTILE), page("name")
    assert [(tag, list(names)) for tag, names in hostile.elements] == [(t, list(n)) for t, n in harmless.elements]
    assert "<img src=x onerror=alert(1)>\"'&" in hostile.text and "The only slice is shown" in hostile.text


def test_what_was_not_measured_is_said_and_breaks_nothing():
    result = evaluated(2, ssim=[math.nan, 0.5], psnr=[math.inf, 20.0])
    page = Page(html_report.render(ABOUT, result, [], pictures(2)))
    assert "not measured" in page.text and "nan" not in page.text.lower().split()
    assert [card["data-ssim"] for card in page.all("article")] == ["", "0.5"]
    assert len(page.all("polyline")) == 1


def test_how_many_slices_are_shown_is_said():
    page = Page(html_report.render(ABOUT, evaluated(), [], pictures(4)))
    assert "4 of 9 slices are shown" in page.text


def test_history_leaves_out_what_is_no_object(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert html_report.read_history(path) == []
    path.write_bytes(b'{"step": 1}\n{"step": 2, "lo\n[3]\n\xff\xfe\n{"step": 4, "loss": NaN}\n')
    assert [entry["step"] for entry in html_report.read_history(path)] == [1, 4]


def test_shown_slices_are_distinct_in_order_with_worst_median_and_best():
    for count in range(1, 40):
        order = list(np.random.default_rng(count).permutation(count))
        for limit in range(1, 45):
            shown = html_report.shown_slices(order, limit)
            places = [order.index(index) for index in shown]
            assert places == sorted(set(places)) and len(places) == min(limit, count)
            assert places[0] == 0
            if len(places) > 2:
                assert places[-1] == count - 1 and count // 2 in places


def test_png_is_the_transposed_image_to_half_a_grey_level():
    image = np.random.default_rng(0).uniform(size=(6, 4)).astype(np.float32)
    encoded = html_report.png_data_uri(image).removeprefix("data:image/png;base64,")
    decoded = matplotlib.image.imread(io.BytesIO(base64.b64decode(encoded)), format="png")
    np.testing.assert_allclose(decoded, image.T, atol=0.5 / 255 + 1e-6)


@pytest.mark.slow
def test_the_command_writes_the_page_beside_the_figures(tiny_run):
    place, _ = tiny_run
    done = run_script("report.py", "--workdir", "runs/tiny", "--slices", 3, "--split", "validation", cwd=place)
    assert done.returncode == 0, done.stderr
    folder = place / "runs/tiny/eval/validation"
    assert f"Report: {folder.relative_to(place) / 'report.html'}" in done.stdout
    page = Page((folder / "report.html").read_text())
    written = json.loads((folder / "metrics.json").read_text())
    assert f"{written['ssim']:.3f}" in page.text and f"3 of {written['slices']} slices" in page.text
    assert any("Training loss" in chart["aria-label"] for chart in page.all("svg"))
    assert "by which its best checkpoint was chosen" in page.text


@pytest.mark.slow
def test_a_run_whose_data_lie_in_the_default_place(tmp_path):
    """As the README teaches for HipMRI: no --data, the default preset's recipe (here on small slices)."""
    spec = phantom.PhantomSpec(train_cases=2, validation_cases=1, test_cases=1, slices_per_case=4, size=(32, 16))
    phantom.write_phantom(tmp_path / "data/HipMRI_study_keras_slices_data", spec)
    small = ("--image-size", 32, 16, "--hidden-channels", 8, "--num-embeddings", 32, "--batch-size", 4)
    flags = ("--platform", "cpu", *small, "--epochs", 1, "--perceptual-weight", 0, "--workdir", "runs/hip")
    done = run_script("train.py", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = run_script("eval.py", "--report", "--platform", "cpu", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "HipMRI_study_keras_slices_data" in (tmp_path / "runs/hip/eval/test/report.html").read_text()


def test_no_slices_is_refused(tmp_path):
    done = run_script("report.py", "--slices", 0, cwd=tmp_path)
    assert done.returncode == 2 and "--slices 0" in done.stderr and len(done.stderr.splitlines()) == 1


# In a browser.

_ARGUMENTS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
_ROW = """canvas => { const w = canvas.width;
  return Array.from(canvas.getContext('2d').getImageData(0, 5, w, 1).data).filter((_, i) => i % 4 == 0); }"""


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the extra 'browser'")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs Chromium")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=_ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(html_report.render(ABOUT, evaluated(), HISTORY, pictures()))
    return path


@pytest.fixture
def opened(browser, page_file):
    """A function that opens the page in a window of some kind; what the page complains of fails the test."""
    complaints, pages = [], []

    def open_page(width=1200, **kind):
        page = browser.new_page(viewport={"width": width, "height": 900}, **kind)
        pages.append(page)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: complaints.append(request.url) if request.url[:4] == "http" else None)
        page.goto(page_file.as_uri())
        page.locator("#gallery canvas").first.scroll_into_view_if_needed()
        # Not wait_for_function: the page's policy forbids its eval.
        page.locator(".limit").first.filter(has_text="more").wait_for()
        return page

    yield open_page
    for page in pages:
        page.close()
    assert complaints == []


def compared(page):
    return np.array(page.locator("#gallery canvas").first.evaluate(_ROW))


def test_the_slider_moves_the_split_by_mouse_button_and_key(opened):
    page = opened()
    slider = page.locator(".split").first
    before, after = np.rint(np.linspace(0.2, 0.4, SHAPE[0]) * 255), np.full(SHAPE[0], 191)

    def expected(edge):
        return np.where(np.arange(SHAPE[0]) < edge, before, after)

    np.testing.assert_array_equal(compared(page), expected(SHAPE[0] // 2))
    slider.focus()
    for _ in range(10):
        page.keyboard.press("ArrowRight")
    assert slider.input_value() == "60"
    np.testing.assert_array_equal(compared(page), expected(round(0.6 * SHAPE[0])))
    page.get_by_role("button", name="Reconstruction").first.click()
    np.testing.assert_array_equal(compared(page), after)
    page.get_by_role("button", name="Original").first.click()
    np.testing.assert_array_equal(compared(page), before)
    box = page.locator("#gallery canvas").first.bounding_box()
    page.mouse.click(box["x"] + box["width"] / 4, box["y"] + box["height"] / 2)
    np.testing.assert_array_equal(compared(page), expected(SHAPE[0] // 4))


def test_window_and_level_are_a_straight_line_of_grey(opened):
    page = opened()
    page.get_by_role("button", name="Original").first.click()
    page.get_by_label("Window").fill("20")
    page.get_by_label("Level").fill("30")
    grey = np.rint(np.linspace(0.2, 0.4, SHAPE[0]) * 255) / 255
    np.testing.assert_allclose(compared(page), np.clip((grey - 0.2) / 0.2, 0, 1) * 255, atol=0.51)
    page.get_by_role("button", name="Reset").click()
    assert compared(page)[0] == 51 and compared(page)[-1] == 191


def test_the_difference_is_coloured_as_in_the_picture(opened):
    page = opened()
    canvas = page.locator(".difference canvas").first
    pixel = "(canvas, x) => Array.from(canvas.getContext('2d').getImageData(x, 3, 1, 1).data).slice(0, 3)"
    magma = matplotlib.colormaps["magma"]
    assert canvas.evaluate(pixel, 0) == [round(255 * part) for part in magma(255)[:3]]  # 0.55, beyond 0.25
    page.get_by_label("Brightest difference").fill("100")
    assert canvas.evaluate(pixel, 0) == [round(255 * part) for part in magma(191 - 51)[:3]]


def test_slices_are_sorted_and_more_are_shown_on_demand(opened):
    page = opened()
    rows = evaluated().rows
    indices = "cards => cards.filter(card => !card.hidden).map(card => Number(card.dataset.index))"

    def visible():
        return page.locator("article").evaluate_all(indices)

    assert visible() == list(range(html_report.FIRST_SHOWN))
    for choice, key, sign in (("ssim", "ssim", 1), ("-ssim", "ssim", -1), ("psnr", "psnr", 1), ("-psnr", "psnr", -1)):
        page.get_by_label("Order").select_option(choice)
        order = sorted(range(len(rows)), key=lambda index: sign * getattr(rows[index], key))
        assert visible() == order[: html_report.FIRST_SHOWN]
    page.get_by_role("button", name="Show more").click()
    assert visible() == order and page.get_by_role("button", name="Show more").count() == 0


def test_a_phone_needs_no_scrolling_sideways(opened):
    page = opened(360, is_mobile=True, has_touch=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.locator(".compare").first.bounding_box()["width"] > 250


def test_dark_is_dark_and_text_has_contrast_in_both(opened):
    colours = "['body', '.meaning', '.kicker'].map(name => getComputedStyle(document.querySelector(name)).color)"
    ground = "getComputedStyle(document.body).backgroundColor"
    grounds = []
    for scheme in ("light", "dark"):
        page = opened(color_scheme=scheme)
        grounds.append(luminance(page.evaluate(ground)))
        for colour in page.evaluate(colours):
            bright, dim = sorted((luminance(colour), grounds[-1]), reverse=True)
            assert (bright + 0.05) / (dim + 0.05) > 4.5  # WCAG 2.1, level AA
    assert grounds[0] > 0.8 and grounds[1] < 0.02


def luminance(colour):
    """Relative luminance of "rgb(r, g, b)", WCAG 2.1."""
    parts = np.array([float(part) for part in re.findall(r"[\d.]+", colour)[:3]]) / 255
    linear = np.where(parts <= 0.03928, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])
