"""explore.ipynb as its user meets it: in JupyterLab, in a browser, in a folder where no run exists yet. XMIC_SCREENSHOTS keeps what it looked like."""
import io
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Iterator

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("ipywidgets")
pytest.importorskip("jupyterlab")
papermill = pytest.importorskip("papermill")
playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright (pip install playwright) to open a browser")

from conftest import ROOT  # noqa: E402

pytestmark = pytest.mark.slow
SECONDS = 400  # to wait, on a busy machine
ERRORS = ".jp-RenderedText[data-mime-type='application/vnd.jupyter.error']"
QUIET = {"notification": dict(fetchNews="false", checkForUpdates=False, doNotDisturbMode=True)}
OVERFLOW = """explorer => { const right = explorer.getBoundingClientRect().right + 1;
    return [...explorer.querySelectorAll('*')].filter(e => e.getBoundingClientRect().right > right && !e.closest('option, textarea')).map(e => e.className) }"""
CONTRAST = """([explorer, page]) => { const shade = c => { const v = c.match(/[\\d.]+/g).slice(0, 3).map(x => x / 255)
        .map(x => x <= .04045 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4); return .2126 * v[0] + .7152 * v[1] + .0722 * v[2] };
    const back = shade(getComputedStyle(page).backgroundColor);
    return [...explorer.querySelectorAll('.xmic-title, .xmic-quiet, td, h4, figcaption')].map(e => { const own = shade(getComputedStyle(e).color);
        return [(Math.max(own, back) + .05) / (Math.min(own, back) + .05), e.className || e.tagName] }).sort((a, b) => a[0] - b[0])[0] }"""

LISTED = """outcome => { const message = document.querySelector('.xmic-message'), counted = message.innerText.match(`([0-9]+) ${outcome}`);
    return message.classList.contains('fault') ? message.innerText.includes(`'${outcome}'`)
        : counted && +counted[1] === document.querySelectorAll('.xmic-explorer .widget-select option').length }"""


@contextmanager
def browser() -> Iterator[Any]:
    "Headless Chromium: playwright's own, else the system's."
    with playwright.sync_playwright() as started:
        own = started.chromium.executable_path
        path = own if Path(own).exists() else next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
        if path is None:
            pytest.skip("needs Chromium: playwright install chromium")
        opened = started.chromium.launch(executable_path=path, args=["--no-sandbox"] if os.getuid() == 0 else [])
        try:
            yield opened
        finally:
            opened.close()


@contextmanager
def jupyterlab(root: Path) -> Iterator[str]:
    "JupyterLab in a project of its own; gives the address of its notebooks."
    own = root / ".jupyter"
    for name, values in QUIET.items():
        path = own / "lab" / "user-settings" / "@jupyterlab" / "apputils-extension" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    places = dict(JUPYTER_CONFIG_DIR=str(own), JUPYTER_DATA_DIR=str(own / "data"), XMIC_ROOT=str(root), OMP_NUM_THREADS="1")
    command = [sys.executable, "-m", "jupyterlab", str(root / "nbs"), "--no-browser", "--allow-root", f"--port={port}", "--ServerApp.port_retries=0",
               f"--IdentityProvider.token={token}", "--LabApp.expose_app_in_browser=True"]
    with open(root / "lab.log", "w") as log, subprocess.Popen(command, cwd=root, env=os.environ | places, stdout=log, stderr=log) as server:
        try:
            for _ in range(SECONDS):
                assert server.poll() is None, (root / "lab.log").read_text()
                with suppress(OSError):
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/api?token={token}")
                    break
                time.sleep(1)
            yield f"http://127.0.0.1:{port}/lab/tree/{{}}?token={token}"
        finally:
            server.terminate()


@pytest.fixture
def project(tmp_path) -> Path:
    "A checkout without data and runs, whose notebook asks for the smallest world."
    (tmp_path / "nbs").mkdir()
    (tmp_path / "data" / "mini").mkdir(parents=True)
    (tmp_path / "data" / "mini" / "weights").symlink_to(ROOT / "data" / "mini" / "weights")
    shutil.copy(ROOT / "settings.ini", tmp_path)
    papermill.execute_notebook(ROOT / "nbs" / "explore.ipynb", tmp_path / "nbs" / "explore.ipynb", dict(size="tiny", device="cpu"), prepare_only=True,
                               progress_bar=False)
    return tmp_path


class Shown:
    "What someone who looks at the page sees."

    def __init__(self, page: Any):
        self.page, self.explorer = page, page.locator(".xmic-explorer")

    def text(self, part: str) -> str:
        return " ".join(self.explorer.locator(part).inner_text().split())

    def side(self, side: str, of: str = ".xmic-ranking") -> list[list[str]]:
        return [row.split("\t") for row in self.explorer.locator(f"{of} [data-side={side}] tr").all_inner_texts()]

    def names(self, side: str) -> list[str]:
        return [row[0].removeprefix("✓ ") for row in self.side(side)]

    def control(self, description: str) -> Any:
        return self.explorer.get_by_label(description, exact=True)

    def wait(self, part: str, text: str) -> None:
        self.explorer.locator(part).filter(has_text=text).first.wait_for()

    def select(self, description: str, value: str) -> None:
        options = [" ".join(option.split()) for option in self.control(description).locator("option").all_inner_texts()]
        self.control(description).select_option(index=options.index(value))


def the_clip_is_shown(shown: Shown) -> None:
    "Frames that loaded, hands in boxes, bars below each frame, and both attention maps."
    frames = shown.explorer.locator(".xmic-strip img")
    assert frames.count() == 16 and all(frames.evaluate_all("all => all.map(e => e.complete && e.naturalWidth > 100 && e.clientWidth > 20)"))
    assert shown.explorer.locator(".xmic-picture i").count() > 0
    assert shown.explorer.locator(".xmic-time").count() == 16 and shown.explorer.locator(".xmic-looks").count() == 32
    assert shown.explorer.locator(".xmic-map svg").count() == 2 and shown.explorer.locator(".xmic-map rect").count() == 4 + 16 * 16


def both_sides_are_ranked(shown: Shown) -> None:
    "Five names each, the best first, with their places on the other side."
    for side, word in (("before", "then"), ("after", "was")):
        rows = shown.side(side)
        shares = [float(row[1].removesuffix(" %")) for row in rows]
        assert len(rows) == 5 and shares == sorted(shares, reverse=True) and 0 < shares[0] <= 100
        assert all(re.fullmatch(rf"{word} #\d+", row[2]) for row in rows)


def the_class_list_is_edited(shown: Shown) -> None:
    "The ranking follows; the clip stays as it is."
    frames = shown.explorer.locator(".xmic-strip").inner_html()
    first = shown.names("after")[0]
    shown.explorer.locator("textarea").fill(f"kettle of fish\n{first}\nwindow cleaner")
    shown.wait(".widget-html", "3 names compete")
    shown.wait(".xmic-message", "3 names ranked in")
    for side in ("before", "after"):
        assert sorted(shown.names(side)) == sorted(["kettle of fish", first, "window cleaner"])
    assert re.search(r"ranked in \d+ ms", shown.text(".xmic-message"))
    assert shown.explorer.locator(".xmic-strip").inner_html() == frames

    shown.explorer.locator("textarea").fill(" \n")
    shown.wait(".xmic-message.fault", "class list is empty")
    assert len(shown.names("after")) == 3
    shown.explorer.get_by_role("button", name="the dataset's names").click()
    shown.wait(".widget-html", "40 names compete")
    both_sides_are_ranked(shown)
    assert shown.names("after")[0] == first


def neighbours_are_asked_for(shown: Shown) -> None:
    shown.control("neighbours of").fill("frying pan")
    shown.control("neighbours of").press("Enter")
    shown.wait(".xmic-neighbours", "frying pan")
    assert [len(shown.side(side, ".xmic-neighbours")) for side in ("before", "after")] == [5, 5]
    assert re.search(r"turns it by [\d.]+°", shown.text(".xmic-neighbours"))


def other_clips_are_chosen(shown: Shown) -> None:
    "Another clip, another dataset, verbs, a class, and what the method wins and loses."
    clips, title = shown.explorer.locator(".widget-select select"), shown.text(".xmic-title")
    segment = clips.locator("option").nth(3).inner_text().split("·")[1].strip()
    clips.select_option(index=3)
    shown.wait(".xmic-title", segment)
    assert shown.text(".xmic-title") != title
    the_clip_is_shown(shown)

    title = shown.text(".xmic-title")
    shown.select("dataset", "ego4d")
    shown.page.wait_for_function("title => document.querySelector('.xmic-title').innerText.replace(/\\s+/g, ' ').trim() !== title", arg=title)
    nouns = shown.explorer.locator("textarea").input_value()
    shown.select("kind", "verb")
    shown.page.wait_for_function("nouns => document.querySelector('.xmic-explorer textarea').value !== nouns", arg=nouns)
    assert set(shown.names("after")) <= set(shown.explorer.locator("textarea").input_value().splitlines())
    both_sides_are_ranked(shown)

    told = 0
    for outcome in ("won", "lost", "both right", "both wrong"):
        shown.select("clips", outcome)
        shown.page.wait_for_function(LISTED, arg=outcome)
        if shown.explorer.locator(".xmic-message.fault").count():
            continue
        message = shown.text(".xmic-message")
        counts = {name: int(n) for n, name in re.findall(r"(\d+) (won|lost|both right|both wrong)", message)}
        assert sum(counts.values()) == int(re.match(r"of (\d+) test clips", message)[1])
        told += counts[outcome]
    assert told == sum(counts.values())
    shown.select("clips", "all")
    shown.wait(".widget-dropdown", "all (12 clips)")


def attention_is_put_away(shown: Shown) -> None:
    shown.explorer.get_by_role("button", name="attention").click()
    shown.explorer.locator(".xmic-time").first.wait_for(state="detached")
    assert shown.explorer.locator(".xmic-map").count() == 0 and shown.explorer.locator(".xmic-strip img").count() == 16
    shown.explorer.get_by_role("button", name="attention").click()
    shown.explorer.locator(".xmic-time").first.wait_for()
    the_clip_is_shown(shown)


def a_video_of_ones_own_is_opened(shown: Shown, video: Path) -> None:
    shown.explorer.get_by_role("button", name="a video of my own").click()
    for path, part, said in (("/nowhere/kitchen.mp4", ".xmic-message.fault", "there is no file /nowhere/kitchen.mp4"), (str(video), ".xmic-title", video.name)):
        shown.control("video file").fill(path)
        shown.control("video file").press("Enter")
        shown.wait(part, said)
    shown.explorer.locator(".xmic-picture i").first.wait_for(state="detached")  # no boxes were given
    assert shown.explorer.locator(".xmic-strip img").count() == 16
    both_sides_are_ranked(shown)
    shown.explorer.get_by_role("button", name="clips of the dataset").click()
    shown.explorer.locator(".xmic-picture i").first.wait_for()


def it_fits(shown: Shown, width: int, theme: str, kept: Path) -> None:
    "Nothing is cut off at the right, and what is written can be read."
    shown.page.set_viewport_size(dict(width=width, height=2600))
    shown.page.evaluate("theme => jupyterapp.commands.execute('apputils:change-theme', {theme})", f"JupyterLab {theme}")
    shown.page.wait_for_function("dark => (document.body.dataset.jpThemeLight === 'false') === dark", arg=theme == "Dark")
    shown.page.wait_for_timeout(700)
    explorer = shown.explorer.element_handle()
    with suppress(playwright.TimeoutError):  # the layout may take a while
        shown.page.wait_for_function(f"explorer => !({OVERFLOW})(explorer).length", arg=explorer, timeout=30_000)
    assert explorer.evaluate(OVERFLOW) == []
    contrast, where = shown.page.evaluate(CONTRAST, [explorer, shown.page.query_selector(".jp-Notebook")])
    assert contrast > 4, f"{where} has a contrast of {contrast:.1f}"
    picture = shown.explorer.screenshot()
    (kept / f"explore-{theme.lower()}-{width}.png").write_bytes(picture)
    shade = np.median(np.asarray(Image.open(io.BytesIO(picture)).convert("L")))
    assert shade < 80 if theme == "Dark" else shade > 200


def test_explore_from_nothing_in_jupyterlab(project):
    kept = Path(os.environ.get("XMIC_SCREENSHOTS", project))
    faults: list[str] = []
    with jupyterlab(project) as address, browser() as opened:
        page = opened.new_page(viewport=dict(width=1400, height=2600))
        page.set_default_timeout(1000 * SECONDS)
        page.on("pageerror", lambda e: faults.append(str(e)))
        page.goto(address.format("explore.ipynb"))
        page.locator(".jp-CodeCell").last.wait_for()
        page.locator(".jp-StatusBar-Left, #jp-bottom-panel").get_by_text("| Idle").wait_for()
        page.evaluate("jupyterapp.shell.collapseLeft()")
        page.evaluate("jupyterapp.commands.execute('notebook:run-all-cells')")
        page.locator(f".xmic-strip img, {ERRORS}").first.wait_for()
        assert page.locator(ERRORS).all_inner_texts() == []
        assert "no finished run" in page.locator(".jp-Notebook").inner_text()
        page.screenshot(path=kept / "explore-page.png")

        shown = Shown(page)
        the_clip_is_shown(shown)
        both_sides_are_ranked(shown)
        the_class_list_is_edited(shown)
        neighbours_are_asked_for(shown)
        for theme in ("Light", "Dark"):
            for width in (1400, 800, 520):
                it_fits(shown, width, theme, kept)
        other_clips_are_chosen(shown)
        attention_is_put_away(shown)
        a_video_of_ones_own_is_opened(shown, next((project / "data" / "mini-tiny").rglob("*.mp4")))
        assert page.locator(ERRORS).count() == 0 and page.locator(".jp-OutputArea .jp-mod-error").count() == 0
    assert faults == []
