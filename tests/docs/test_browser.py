"""The built pages in a browser: at 1440 px no code block and no table is cut off, at 390 px no page is wider.

It needs the system's Chromium and the `docs` extra, and skips without them: `make test-pages`. Chromium opens one page
that holds every page of the site as a frame, measures them there, and prints what it found. No driver is needed.
"""

import functools
import html
import http.server
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--dump-dom",
]  # fmt: skip
WIDE, NARROW = 1440, 390

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium, which this machine does not have"),
    pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="needs mkdocs: `make test-pages`"),
]

# Measures every frame when all have been loaded. A pixel is left to rounding.
SCRIPT = """
const cut = element => element.clientWidth > 0 && element.scrollWidth > element.clientWidth + 1;
const kind = element => (element.closest(".language-python") ? "python " : "") + element.tagName.toLowerCase();
const told = element => `${kind(element)} ${element.scrollWidth} > ${element.clientWidth} px: `
    + element.textContent.trim().slice(0, 60);
const high = element => element.clientHeight > 3 * parseFloat(getComputedStyle(element).lineHeight);
const shade = element => element && getComputedStyle(element).backgroundColor;
const like = page => element => shade(element) === shade(page.querySelector(".language-python code"));
const measure = frame => {
    const page = frame.contentDocument, within = page.querySelector(".md-content");
    return {
        page: frame.dataset.page, width: frame.clientWidth, title: page.title,
        pageWidth: page.documentElement.scrollWidth,
        blocks: within.querySelectorAll("pre").length, tables: within.querySelectorAll("table").length,
        cut: [...within.querySelectorAll("pre, pre code, table, .md-typeset__scrollwrap")].filter(cut).map(told),
        squeezed: [...within.querySelectorAll("tr:has([style*=right]) > td:first-child")].filter(high).map(told),
        outputs: within.querySelectorAll(".language-text").length,
        buttons: [...within.querySelectorAll(".language-text .md-code__nav")].filter(e => e.offsetParent).map(told),
        alike: [...within.querySelectorAll(".language-text code")].filter(like(page)).map(told),
        broken: [...within.querySelectorAll("img")].filter(image => !image.naturalWidth).map(image => image.src),
    };
};
onload = () => {
    const found = document.createElement("pre");
    found.id = "found";
    found.textContent = JSON.stringify([...document.querySelectorAll("iframe")].map(measure));
    document.body.replaceChildren(found);
};
"""


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder, and `/measure`: its pages as frames of both widths."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        if self.path != "/measure":
            return super().do_GET()
        frames = [
            f'<iframe src="/{page}" data-page="{page}" style="width: {width}px; height: 900px; border: 0"></iframe>'
            for page in pages_in(Path(self.directory))
            for width in (WIDE, NARROW)
        ]
        body = f"<!doctype html><body><script>{SCRIPT}</script>{''.join(frames)}</body>".encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def pages_in(site):
    return sorted(path.relative_to(site).as_posix() for path in site.rglob("*.html") if path.name != "404.html")


def show(address, profile, *flags):
    """Opens a page and prints it as it is when its scripts have run."""
    command = [CHROMIUM, *FLAGS, *flags, f"--user-data-dir={profile}", f"--window-size={WIDE},900", address]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def measure(site, profile):
    """What Chromium finds in each page of a built site, by (page, width)."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        done = show(f"http://127.0.0.1:{server.server_port}/measure", profile)
    finally:
        server.shutdown()
        server.server_close()
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, f"Chromium measured nothing: {done.stderr[-2000:]}"
    return {(record["page"], record["width"]): record for record in json.loads(html.unescape(found[1]))}


def build(site):
    """The site, built as `make docs` does."""
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(site)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return site


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    return build(tmp_path_factory.mktemp("pages") / "site")


@pytest.fixture(scope="module")
def found(site, tmp_path_factory):
    return measure(site, tmp_path_factory.mktemp("profile"))


def test_every_page_was_measured(found):
    names = {path.stem for path in (ROOT / "docs").glob("*.md")}
    assert {page for page, _ in found} == {f"{name}.html" for name in names}
    assert all(record["title"] for record in found.values())
    assert sum(record["blocks"] for record in found.values()) > 100
    assert sum(record["tables"] for record in found.values()) > 100


def test_no_code_block_and_no_table_is_cut_off_on_a_desktop(found):
    cut = {page: record["cut"] for (page, width), record in found.items() if width == WIDE}
    assert not {page: texts for page, texts in cut.items() if texts}


def test_the_first_column_of_a_table_of_numbers_is_not_squeezed(found):
    squeezed = {page: record["squeezed"] for (page, width), record in found.items() if width == WIDE}
    assert not {page: texts for page, texts in squeezed.items() if texts}


def test_no_page_is_wider_than_its_window(found):
    assert not {key: record["pageWidth"] for key, record in found.items() if record["pageWidth"] > key[1]}


def test_no_output_is_cut_off_on_a_phone(found):
    cut = {
        page: [text for text in record["cut"] if not text.startswith(("python", "table", "div"))]  # these scroll there
        for (page, width), record in found.items()
        if width == NARROW
    }
    assert not {page: texts for page, texts in cut.items() if texts}


def test_output_does_not_look_like_code(found):
    assert sum(record["outputs"] for record in found.values()) > 200
    assert not {page: record["buttons"] for (page, _), record in found.items() if record["buttons"]}
    assert not {page: record["alike"] for (page, _), record in found.items() if record["alike"]}


def test_every_picture_is_there(found):
    assert not {page: record["broken"] for (page, _), record in found.items() if record["broken"]}


def test_links_between_pages_name_files(site):
    for page in pages_in(site):
        for link in re.findall(r'<a [^>]*href="([^"#?]+)', (site / page).read_text()):
            assert re.match("https?://", link) or (site / page).parent.joinpath(link).is_file(), f"{page}: {link}"


def test_no_page_loads_anything_from_elsewhere(site):
    for page in pages_in(site):
        assert not re.findall(
            r'<(?:script|img|link|iframe)[^>]* (?:src|href)="https?:[^"]*"', (site / page).read_text()
        )


def test_the_search_works_from_disk(site, tmp_path):
    shown = show(f"{(site / 'index.html').as_uri()}?q=sliding", tmp_path / "profile", "--virtual-time-budget=20000")
    found = re.findall(r'<a href="([^"]*)" class="md-search-result__link"', shown.stdout)
    assert any("writing-mods.html" in link for link in found), found


def test_the_signatures_of_the_api_are_broken_over_lines(site):
    page = (site / "api.html").read_text()
    signatures = re.findall(r'<div class="[^"]*doc-signature.*?</div>', page, re.DOTALL)
    longest = max(len(line) for text in signatures for line in html.unescape(re.sub(r"<[^>]+>", "", text)).splitlines())
    assert len(signatures) > 20
    assert longest <= 88


def test_a_page_that_is_cut_off_is_found(tmp_path):
    site = tmp_path / "site"
    site.mkdir()
    style = "<style>pre { overflow: auto } div { overflow: auto } td { white-space: nowrap }</style>"
    wide = f"<div class='md-typeset__scrollwrap'><table><tr><td>{'wide ' * 900}</td></tr></table></div>"
    content = f"<div class='md-content'><pre>{'long ' * 900}</pre>{wide}<img src='no.png'></div>"
    (site / "index.html").write_text(f"<!doctype html><title>cut</title>{style}{content}")
    record = measure(site, tmp_path / "profile")["index.html", WIDE]
    assert [text.split()[0] for text in record["cut"]] == ["pre", "div"]
    assert len(record["broken"]) == 1
