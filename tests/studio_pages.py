"""The studio in a real browser: started, opened, and used as a person does."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, Locator, Page, expect

from spectral_diffusion.concepts.concept import SAMPLES_FOLDER

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ROOT = Path(__file__).resolve().parents[1]
SCREENSHOTS = ROOT / "out" / "screenshots"
TABS = ("Concepts", "Fuse", "Generate", "Compare", "Export", "Settings")
PATIENCE = 240_000  # milliseconds, for a machine that is busy
LOGIN = ("ada", "correct horse")
LEFT_BEHIND = re.compile(
    r"AbortError: (signal is|BodyStreamBuffer was) aborted|Connection errored out|ERR_INCOMPLETE_CHUNKED_ENCODING|ERR_ABORTED"
)
"""What Chromium and gradio's client say of answers under way when their page is reloaded; at any other time it is an error."""

DROP = """async (address) => {
  const data = new DataTransfer(), content = await (await fetch(address)).blob();
  data.items.add(new File([content], 'drawn.png', {type: 'image/png'}));
  document.body.dispatchEvent(new DragEvent('drop', {dataTransfer: data, bubbles: true, cancelable: true}));
}"""
"""Drops the picture at an address on the page."""

FRAMES = """async () => {
  for (let frame = 0; frame < 10; frame++) await new Promise(requestAnimationFrame);
}"""
"""Waits for some frames of the page."""

expect.set_options(timeout=PATIENCE)


class Served:
    """A studio that runs as its own process."""

    def __init__(self, folder: Path, *words: str):
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        said = folder.with_suffix(".json")
        command = ["studio", "--folder", str(folder), "--port", str(port), "--json", str(said), *words]
        code = f"import sys; from spectral_diffusion.cli import main; sys.exit(main({command!r}))"
        self.log = open(folder.with_suffix(".log"), "w+")
        self.process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=self.log, stderr=self.log)
        self.wait_for(said.exists)
        self.address = json.loads(said.read_text())["address"]

    def wait_for(self, what: Callable[[], object], seconds: float = PATIENCE / 1000) -> None:
        """Wait until `what` is true, as long as the studio runs."""
        deadline = time.monotonic() + seconds
        while not what():
            assert self.process.poll() is None, Path(self.log.name).read_text()
            assert time.monotonic() < deadline, "it did not happen in time"
            time.sleep(0.05)

    def worker(self) -> int:
        """Return the process number of the worker that has the running job."""
        claims = sorted((self.folder / "jobs").glob("*/claim.json"), key=lambda path: path.stat().st_mtime)
        return int(json.loads(claims[-1].read_text())["pid"])

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()

    def close(self) -> None:
        """End it as Ctrl-C does."""
        self.process.send_signal(signal.SIGINT)
        try:
            assert self.process.wait(60) == 0
        finally:
            self.process.kill()
            self.log.close()


def forget_what_was_left_behind(wrong: list[str]) -> None:
    wrong[:] = [text for text in wrong if not LEFT_BEHIND.search(text)]


@contextmanager
def opened(browser: Browser, address: str, width: int = 1280, theme: str = "light") -> Iterator[Page]:
    """Open the page; at the end nothing may have gone wrong in it."""
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=theme)
    page.set_default_timeout(PATIENCE)
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("load", lambda: forget_what_was_left_behind(wrong))
    page.goto(address)
    expect(page.locator(".sd-head h1")).to_be_visible()
    expect(page.locator("#concept-cards .sd-cards, #concept-cards .sd-empty")).to_be_visible()
    try:
        yield page
    except BaseException as failure:
        failure.add_note(f"The page then said, of which the first lines are the console's:\n{wrong}\n{what_it_says(page)}")
        raise
    finally:
        page.close()
    assert not wrong, wrong


def what_it_says(page: Page) -> str:
    return page.locator("body").inner_text(timeout=10_000)


def go_to(page: Page, tab: str) -> None:
    """Open a tab, also where the bar is too narrow for all."""
    button = page.get_by_role("tab", name=tab, exact=True)
    if not button.is_visible():
        page.locator(".overflow-menu > button").click()
        button = page.locator(".overflow-dropdown button", has_text=tab)
    button.click()
    expect(page.locator(f"#tab-{tab.lower()}")).to_be_visible()
    page.evaluate(FRAMES)  # gradio sets all fields of a tab once more in the frame after it is first shown


def add_concept(page: Page, word: str, photos: list[Path]) -> None:
    page.get_by_role("button", name="New concept").click()
    page.get_by_label("What is it?").fill(word)
    page.get_by_label("Its token").click()
    page.locator("#new-photos input[type=file]").set_input_files(photos)
    expect(page.locator("#new-photos .file-preview")).to_be_visible()
    page.get_by_role("button", name="Add the concept").click()
    expect(page.locator("#concept-title code")).to_have_text(f"<{word}>")
    page.get_by_role("button", name="New concept").click()


def train(page: Page, steps: int) -> None:
    field = page.get_by_label("Steps", exact=True).locator("visible=true")
    if field.count() == 0:
        page.locator("#tab-concepts").get_by_role("button", name="More settings").click()
    field.fill(str(steps))
    field.press("Tab")
    page.locator("#train").click()
    expect(page.locator("#training .sd-badge").first).to_have_text(re.compile("queued|running"))


def choose_both(page: Page) -> None:
    for token in ("<leopard>", "<wizard>"):
        page.locator("#fuse-chosen").get_by_label(token).check()


def adapter_of(page: Page, tab: str) -> Locator:
    return page.locator(f"#tab-{tab}").get_by_label("Adapter", exact=True)


def choose_adapter(page: Page, tab: str, name: str) -> None:
    field = adapter_of(page, tab)
    field.click()
    page.get_by_role("option", name=re.compile(rf"{re.escape(name)}$")).click()
    expect(field).to_have_value(name)


def state(page: Page, text: str) -> None:
    expect(page.locator("#training .sd-badge").first).to_have_text(text)


def photos_of(sample: str) -> list[Path]:
    return sorted((SAMPLES_FOLDER / sample).glob("*.jpg"))


def draw_in_regions(page: Page) -> None:
    """Suggest two regions, move one by the mouse and one by a key, draw, and load them again from the picture's file."""
    page.locator("#regions").get_by_role("button", name="Regions").click()
    page.locator("#suggest-regions").click()
    boxes = page.locator("#region-board .sd-box")
    expect(boxes).to_have_count(2)
    boxes.last.locator(".sd-handle").scroll_into_view_if_needed()  # the mouse reaches only what is on the screen
    grip = boxes.last.locator(".sd-handle").bounding_box()
    canvas = page.locator("#region-board .sd-canvas").bounding_box()
    page.mouse.move(grip["x"] + 9, grip["y"] + 9)
    page.mouse.down()
    page.mouse.move(grip["x"] + 9, grip["y"] + 9 - canvas["height"] / 4, steps=4)
    page.mouse.up()
    expect(page.get_by_label("Left, top, right, bottom of region 2")).to_have_value("0.5,0,1,0.75")
    boxes.first.focus()
    boxes.first.press("Shift+ArrowLeft")
    expect(page.get_by_label("Left, top, right, bottom of region 1")).to_have_value("0,0,0.48,1")
    prompt = page.get_by_label("Prompt of region 1")
    prompt.fill("<leopard> in the snow")
    prompt.press("Tab")
    expect(boxes.first).to_contain_text("<leopard> in the snow")
    paint_a_form(page)
    page.locator("#tab-generate").get_by_role("spinbutton", name="Pictures").fill("1")
    page.locator("#draw").click()
    expect(page.locator("#pictures img")).to_have_count(3)
    page.locator("#regions").get_by_role("button", name="Remove all").click()
    expect(boxes).to_have_count(0)
    page.evaluate(DROP, page.locator("#pictures img").first.get_attribute("src"))
    expect(page.get_by_label("Prompt of region 1")).to_have_value("<leopard> in the snow")
    expect(page.get_by_alt_text("form of region 1")).to_have_count(1)


def paint_a_form(page: Page) -> None:
    """Paint the first region as a bar across the upper left of the picture and keep it."""
    page.get_by_role("button", name="Paint the form of region 1").click()
    canvas = page.locator("#region-board canvas")
    canvas.scroll_into_view_if_needed()
    paper = canvas.bounding_box()
    page.mouse.move(paper["x"] + paper["width"] * 0.1, paper["y"] + paper["height"] * 0.4)
    page.mouse.down()
    page.mouse.move(paper["x"] + paper["width"] * 0.4, paper["y"] + paper["height"] * 0.4, steps=5)
    page.mouse.up()
    page.locator("#region-board").get_by_role("button", name="Keep the form").click()
    expect(page.get_by_alt_text("form of region 1")).to_have_count(1)
    left, top, right, bottom = map(float, page.get_by_label("Left, top, right, bottom of region 1").input_value().split(","))
    assert left < 0.1 < 0.4 < right < 0.6 and 0.2 < top < 0.4 < bottom < 0.6


def take_screenshots(browser: Browser, served: Served) -> None:
    """Leave a picture of each tab, at two widths and in two themes; nothing may reach beyond the page's right side."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    for width in (1280, 390):
        for theme in ("light", "dark"):
            with opened(browser, served.address, width, theme) as page:
                for tab in TABS:
                    go_to(page, tab)
                    if tab == "Fuse":
                        choose_both(page)
                        expect(page.locator("#band-map table")).to_be_visible()
                    page.wait_for_timeout(400)
                    assert page.evaluate("document.documentElement.scrollWidth") <= width, f"{tab} is too wide at {width} pixels"
                    assert page.locator("img:not([alt])").count() == 0
                    page.screenshot(path=SCREENSHOTS / f"studio-{tab.lower()}-{width}-{theme}.png", full_page=True)
