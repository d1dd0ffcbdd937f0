"""The report: nothing untrusted gets through, nothing is fetched, and a real browser shows it."""

import base64
import html.parser
import io
import json
import os
import re
import shutil
import subprocess

import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image
from test_plots import network

from utils import plots, report, tables
from utils.errors import InputError

EVIL = '"><script>document.title="owned"</script><img src=http://evil.example/x onerror=alert(1)>'


class Page(html.parser.HTMLParser):
    """Every element with its attributes, and all text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A page of which every string is out to get us."""
    folder = tmp_path_factory.mktemp("report")
    run = network(folder, "vanilla", 0, model_name=EVIL, path=folder / (EVIL[:20] + "\udcff.pt"))
    run.data = {**run.data, "dataset": EVIL, "classes": [EVIL, "b"]}
    other = network(folder, "label-smoothing", 1)
    config = {"environment": {"torch": EVIL, "command": ["x" * 3000]}}
    other.path.with_name("config.json").write_text(json.dumps(config))
    drawings = []
    for number, width in enumerate((plots.PAGE, plots.COLUMN)):
        figure = Figure(figsize=(width, 2))
        figure.subplots().plot([0, 1])
        drawings.append(plots.save(figure, folder, f"figure{number}", EVIL, EVIL + " caption"))
    cells = pd.DataFrame(
        {
            "Training": [EVIL, "vanilla | a\\b **not bold**"],
            "ECE": [tables.Measured("0.1234", " ± 0.001", True), tables.Measured("0.2")],
        }
        | {f"column {i}": ["wide " * 5] * 2 for i in range(12)}
    )
    narrow = pd.DataFrame({"a": ["1", ""], "**b**": ["x|y", EVIL]})
    texts = {
        EVIL: tables.markdown(cells, "A caption of the table."),
        "Narrow": tables.markdown(narrow, ""),
    }
    path = folder / "new folder" / "report.html"
    report.write(path, texts, drawings, [run, other])
    return path, Page(path.read_text()), drawings


def test_no_string_becomes_an_element(page):
    path, parsed, _ = page
    tags = {name for name, _ in parsed.elements}
    assert not tags & {"script", "iframe", "object", "link", "base", "form", "svg", "a"}
    for name, attributes in parsed.elements:
        assert not any(key.startswith("on") for key in attributes), (name, attributes)
    assert all(a["src"].startswith("data:image/png;base64,") for a in parsed.all("img"))
    # It is all there, as text: heading, cell, caption, dataset, class and environment.
    assert parsed.text.count(EVIL) >= 6
    assert "http://" not in re.sub(re.escape(EVIL.split("src=")[1][:22]), "", path.read_text())


def test_the_policy_lets_the_browser_load_nothing(page):
    _, parsed, _ = page
    (policy,) = [a["content"] for a in parsed.all("meta") if "http-equiv" in a]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["img-src"] == "data:"
    assert rules["style-src"].startswith("'sha256-")
    assert "script-src" not in rules
    assert not re.search(r"url\(|@import", report.CSS)


def test_tables_hold_the_cells(page):
    _, parsed, _ = page
    text = page[0].read_text()
    assert "<strong>0.1234</strong> ± 0.001" in text
    assert "vanilla | a\\b **not bold**" in parsed.text
    assert "<td>x|y</td>" in text
    assert '<th scope="col">**b**</th>' in text
    assert "A caption of the table." in parsed.text
    rows = re.findall(r"<tr>.*?</tr>", text, re.DOTALL)
    assert [len(re.findall(r"<t[hd]", row)) for row in rows] == [14] * 3 + [2] * 3


def test_figures_are_inside_the_page(page):
    _, parsed, drawings = page
    for attributes, drawing in zip(parsed.all("img"), drawings, strict=True):
        data = base64.b64decode(attributes["src"].partition(",")[2], validate=True)
        assert data == drawing.png.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            assert (str(image.width), str(image.height)) == (
                attributes["width"], attributes["height"],
            )  # fmt: skip
        assert attributes["alt"] == EVIL
    assert [a["class"] for a in parsed.all("img")] == ["page", "column"]


def test_each_run_has_its_configuration(page):
    _, parsed, _ = page
    assert len(parsed.all("details")) == 2
    assert '"label-smoothing"' in parsed.text
    assert "x" * 3000 in parsed.text  # from config.json
    assert "unknown: no readable config.json" in parsed.text  # the other has none


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b"{}", b"[" * 200_000, b" " * 2_000_000])
def test_a_damaged_config_is_not_the_end(tmp_path, content):
    run = network(tmp_path)
    run.path.with_name("config.json").write_bytes(content)
    report.write(tmp_path / "r.html", {}, [], [run])
    assert "unknown: no readable config.json" in (tmp_path / "r.html").read_text()


def test_a_place_that_cannot_be_written_is_bad_input(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        report.write(tmp_path / "file" / "r.html", {}, [], [network(tmp_path)])
    with pytest.raises(InputError, match="cannot write"):
        report.write(tmp_path, {}, [], [network(tmp_path)])


# ------------------------------------------------------------------------------ a real browser

# A window is never narrower than 500 pixels, but a frame in it is as wide as it is told to be.
FRAME = """<!DOCTYPE html><script>
onmessage = (event) => { document.documentElement.dataset.measured = event.data; };
</script><iframe src="copy.html" style="width: WIDTHpx; height: 1500px; border: 0"></iframe>"""

# Runs in the test's copy alone, whose policy lets it.
MEASURE = """<script>
const overflowing = [...document.querySelectorAll("body *")].filter(element =>
  !element.closest(".scroll") && element.getBoundingClientRect().right > innerWidth + 0.5);
parent.postMessage(JSON.stringify({
  inner: innerWidth,
  scroll: document.documentElement.scrollWidth,
  overflowing: overflowing.map(element => element.tagName),
  inside: [...document.querySelectorAll(".scroll")].map(e => [e.clientWidth, e.scrollWidth]),
  images: [...document.images].map(image => [image.complete, image.naturalWidth, image.width]),
  border: getComputedStyle(document.querySelector("thead th")).borderBottomWidth,
}), "*");
</script></body>"""


@pytest.fixture(scope="module")
def chromium() -> str:
    found = shutil.which("chromium")
    if not found:
        if os.environ.get("CI"):
            pytest.fail("no chromium: apt-get install chromium")
        pytest.skip("the browser test needs Debian's package chromium")
    return found


def browse(chromium: str, profile, width: int, *arguments) -> str:
    profile.mkdir()
    process = subprocess.run(
        [
            chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
            "--no-first-run", "--disable-background-networking", "--disable-component-update",
            "--disable-sync", f"--user-data-dir={profile}", f"--window-size={width},2000",
            *map(str, arguments),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return process.stdout


@pytest.mark.parametrize(("width", "phone"), [(1280, False), (390, True)])
def test_a_browser_shows_the_page_without_sideways_scrolling(
    chromium, page, tmp_path, width, phone
):
    path, _, _ = page
    text = path.read_text()
    measured = re.sub("default-src 'none'", "default-src 'none'; script-src 'unsafe-inline'", text)
    assert measured != text
    # Opened, as a reader would: what is folded away must fit too.
    measured = measured.replace("<details>", "<details open>").replace("</body>", MEASURE)
    (tmp_path / "copy.html").write_text(measured)
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME.replace("WIDTH", str(width)))
    profile = tmp_path / "profile"
    shown = browse(
        chromium, profile, 1400, "--virtual-time-budget=20000", "--dump-dom", frame.as_uri()
    )
    (values,) = [a["data-measured"] for a in Page(shown).all("html")]
    values = json.loads(values)
    assert values["inner"] == width
    assert values["scroll"] <= width
    assert values["overflowing"] == []
    assert values["border"] == "2px"  # the style sheet is accepted by its hash
    # The wide table scrolls in its box, at either width; the wide figure on the telephone.
    boxes = values["inside"]
    assert boxes[0][1] > boxes[0][0]
    assert (boxes[2][1] > boxes[2][0]) == phone
    assert boxes[3][1] <= boxes[3][0]
    for complete, natural, drawn in values["images"]:
        assert complete
        assert natural > drawn > 300


def test_a_browser_runs_no_script_of_the_page(chromium, page, tmp_path):
    """Were a string to get through as a script, the policy would still stop it."""
    path, _, _ = page
    copy = tmp_path / "copy.html"
    attack = '<script>document.documentElement.dataset.ran = "yes"</script></body>'
    copy.write_text(path.read_text().replace("</body>", attack))
    shown = Page(browse(chromium, tmp_path / "profile", 800, "--dump-dom", copy.as_uri()))
    assert shown.all("html") == [{"lang": "en"}]
    assert "Calibration report" in shown.text
    picture = tmp_path / "shot.png"
    browse(chromium, tmp_path / "profile2", 800, f"--screenshot={picture}", path.as_uri())
    with Image.open(picture) as image:
        assert image.width == 800
        assert len(image.convert("L").getcolors()) > 20
