"""The studio in a real browser: from uploaded photos to a downloaded file that diffusers loads, and what disturbs it."""

from __future__ import annotations

import io
import json
import re
import shutil
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright
from studio_pages import (
    CHROMIUM,
    LOGIN,
    PATIENCE,
    Served,
    adapter_of,
    add_concept,
    choose_adapter,
    choose_both,
    draw_in_regions,
    go_to,
    opened,
    photos_of,
    state,
    take_screenshots,
    train,
)

from spectral_diffusion.adapters.adapter_file import load_adapter
from spectral_diffusion.bases.base import EMBEDDED_BASE
from spectral_diffusion.export import export_kohya

if CHROMIUM is None:
    pytest.skip("There is no Chromium here; install it (apt-get install chromium) to test the studio.", allow_module_level=True)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with Served(tmp_path_factory.mktemp("served") / "studio") as served:
        yield served


@pytest.fixture
def page(browser: Browser, served: Served) -> Iterator[Page]:
    with opened(browser, served.address) as page:
        yield page


def jobs_of(served: Served) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(served.folder.glob("jobs/*/job.json"))]


def test_from_uploaded_photos_to_a_file_that_diffusers_loads(
    page: Page, browser: Browser, served: Served, tmp_path: Path
) -> None:
    bad = tmp_path / "drawing.jpg"
    bad.write_text("<svg onload='alert(1)'/>")
    add_concept(page, "leopard", [*photos_of("leopard"), bad])
    expect(page.locator("#findings")).to_contain_text("6 of 7 files are used")
    expect(page.locator("#findings .sd-no")).to_contain_text("drawing.jpg The file is an SVG drawing")
    for token in ("<poodle>", "<leopard>"):
        page.locator("#concept-cards button", has_text=token).click()
        expect(page.locator("#concept-title code")).to_have_text(token)
        expect(page.locator("#findings li")).to_have_count(0)  # they were about another concept
    expect(page.locator("#photos img")).to_have_count(6)
    captions = {f"<TOK> {words}" for words in ("in the snow", "asleep", "from behind")}
    for field, caption in zip(page.locator("#photos input").all(), captions, strict=False):
        field.fill(caption)  # the one before is still being kept
        field.press("Tab")
    folder = served.folder / "concepts" / "leopard"
    served.wait_for(lambda: captions <= {path.read_text().strip() for path in folder.glob("*.txt")})
    train(page, 3)
    add_concept(page, "wizard", photos_of("wizard"))
    train(page, 3)
    state(page, "done")
    expect(page.locator("#training svg.sd-curve")).to_be_visible()

    go_to(page, "Fuse")
    choose_both(page)
    expect(page.locator("#band-map svg")).to_have_attribute(
        "aria-label", "Band map: <leopard> owns directions 28 to 31; <wizard> owns directions 24 to 27"
    )
    expect(page.locator("#band-map table")).to_contain_text("100%")
    page.locator("#tab-fuse").get_by_label("Name").fill("pair")
    settle = page.locator("#tab-fuse").get_by_label("Settle")
    expect(settle).to_be_checked()  # they were trained apart
    settle.uncheck()
    page.locator("#fuse").click()
    expect(page.locator("#fused")).to_contain_text("<leopard> + <wizard>")
    report = page.locator("#reports iframe").content_frame
    expect(report.get_by_role("heading", name="<wizard>", exact=True)).to_be_visible()
    expect(report.locator("img")).to_have_count(24)
    assert report.locator("img").first.evaluate("image => image.complete && image.naturalWidth") == 64

    go_to(page, "Generate")
    expect(adapter_of(page, "generate")).to_have_value("pair (<leopard> + <wizard>)")
    choose_adapter(page, "generate", "<wizard>")
    page.wait_for_timeout(2500)  # the page looks for adapters once a second
    expect(adapter_of(page, "generate")).to_have_value("<wizard>")
    choose_adapter(page, "generate", "pair (<leopard> + <wizard>)")
    page.get_by_role("button", name="Add <leopard> to the prompt").click()
    expect(page.locator("#prompt textarea")).to_have_value("<leopard>")
    page.locator("#prompt textarea").fill("<leopard> and <wizard> near a lake")
    page.locator("#tab-generate").get_by_role("spinbutton", name="Pictures").fill("2")
    page.locator("#tab-generate").get_by_role("button", name="More settings").click()
    page.locator("#tab-generate").get_by_label("number input for Steps").fill("3")
    page.locator("#tab-generate").get_by_label("number input for Steps").press("Tab")
    page.get_by_label("Attach all concepts").check()
    page.locator("#draw").click()
    expect(page.locator("#pictures img")).to_have_count(2)
    assert [job["arguments"]["whole"] for job in jobs_of(served) if job["kind"] == "generate"] == [True]
    page.get_by_label("Attach all concepts").uncheck()
    expect(page.locator("#pictures .sd-card").first).to_contain_text(re.compile(r"<wizard> -?\d\."))
    last = page.locator("#pictures .sd-card").last
    seed = last.inner_text().split("seed ")[1].split()[0]
    last.get_by_role("button", name="Copy the settings").click()
    expect(page.locator("#tab-generate").get_by_role("spinbutton", name="Seed")).to_have_value(seed)
    draw_in_regions(page)

    go_to(page, "Compare")
    page.locator("#compare-adapters").get_by_label("pair").check()
    page.locator("#compare-prompt textarea, #compare-prompt input").fill("<leopard> near a lake")
    page.locator("#tab-compare").get_by_label("Not in the picture").fill("a lake")
    page.locator("#tab-compare").get_by_role("button", name="More settings").click()
    page.locator("#tab-compare").get_by_label("number input for Steps").fill("2")
    page.locator("#tab-compare").get_by_label("number input for Steps").press("Tab")
    page.locator("#compare").click()
    expect(page.locator("#comparisons img")).to_have_count(1)
    drawing = next(job for job in jobs_of(served) if job["kind"] == "compare")["arguments"]["drawing"]
    assert (drawing["negative_prompt"], drawing["steps"]) == ("a lake", 2)

    go_to(page, "Export")
    choose_adapter(page, "export", "pair (<leopard> + <wizard>)")
    strength = page.locator("#tab-export").get_by_label("number input for Strength of <wizard>")
    strength.fill("0.5")
    strength.press("Tab")
    page.locator("#export").click()
    with page.expect_download() as download:
        page.locator("#exports").get_by_role("link", name="Download").click()
    download.value.save_as(tmp_path / "pair.zip")
    assert [job["arguments"]["strengths"] for job in jobs_of(served) if job["kind"] == "export"] == [{"<wizard>": 0.5}]
    with zipfile.ZipFile(tmp_path / "pair.zip") as archive:
        archive.extractall(tmp_path / "pair")
    pipeline = StableDiffusionPipeline.from_pretrained(
        EMBEDDED_BASE, torch_dtype=torch.float32, safety_checker=None, feature_extractor=None
    )
    pipeline.load_lora_weights(str(tmp_path / "pair"), weight_name="pair-lora.safetensors")
    pipeline.load_textual_inversion(str(tmp_path / "pair" / "leopard.safetensors"), token="<leopard>")
    assert pipeline("<leopard>", num_inference_steps=1, output_type="np").images.shape == (1, 64, 64, 3)
    take_screenshots(browser, served)


def test_a_training_survives_reloading_stopping_and_a_killed_worker(page: Page, served: Served) -> None:
    page.locator("#concept-cards").get_by_role("button", name="<raccoon>").click()
    train(page, 500)
    state(page, "running")
    expect(page.locator("#training svg.sd-curve")).to_be_visible()
    page.reload()
    expect(page.locator("#concept-title code")).to_have_text("<raccoon>")
    expect(page.locator("#training svg.sd-curve")).to_be_visible()

    page.locator("#training").get_by_role("button", name="Stop").click()
    state(page, "cancelled")
    expect(page.locator("#training")).to_contain_text("what was learnt is kept")
    stopped = page.locator("#training").inner_text().split("Stopped after step ")[1].split()[0]
    page.locator("#training").get_by_role("button", name="Resume").click()
    state(page, "running")
    expect(page.locator("#training")).to_contain_text("of 500,")
    deadline = time.monotonic() + 120  # what is prepared anew can be stopped too, and does not go on from anywhere then
    while f"goes on from step {stopped}." not in "".join(path.read_text() for path in served.folder.glob("jobs/*/log.txt")):
        assert time.monotonic() < deadline, "it did not go on from where it was stopped"
        page.wait_for_timeout(100)

    psutil.Process(served.worker()).kill()
    state(page, "interrupted")  # in how many seconds is tested without a page, on which a busy machine spends more
    expect(page.locator("#activity")).to_contain_text("was interrupted")
    page.locator("#training").get_by_role("button", name="Resume").click()
    state(page, "running")
    page.locator("#training").get_by_role("button", name="Stop").click()
    state(page, "cancelled")


def test_two_pages_see_one_studio(page: Page, browser: Browser, served: Served) -> None:
    with opened(browser, served.address, theme="dark") as other:
        add_concept(other, "pinata", photos_of("pinata")[:2])
        expect(page.locator("#concept-cards")).to_contain_text("<pinata>")
        page.locator("#concept-cards").get_by_role("button", name="<pinata>").click()
        train(page, 2)
        other.locator("#train").click()
        expect(other.get_by_text("<pinata> is ", exact=False)).to_be_visible()
        state(page, "done")
        state(other, "done")
    assert [job["title"] for job in jobs_of(served)].count("Train <pinata>") == 1


def test_the_stream_of_answers_never_closes(page: Page) -> None:
    """A stream that closes while an event is being sent ends the page's whole connection, see `Live.wire`."""
    streams: list[str] = []
    page.on("request", lambda request: streams.append(request.url) if "/queue/data" in request.url else None)
    for name in ("raccoon", "black-cat", "poodle") * 2:
        page.locator("#concept-cards").get_by_role("button", name=f"<{name}>").click()
        expect(page.locator("#concept-title code")).to_have_text(f"<{name}>")
    assert streams == []


def test_masks_are_suggested_shown_and_corrected(page: Page, served: Served) -> None:
    masks = served.folder / "concepts" / "doll"
    add_concept(page, "doll", photos_of("nesting-doll")[:2])
    page.locator("#make-masks").click()
    expect(page.locator("#photos .sd-inset")).to_have_count(2)
    assert len(list(masks.glob("*-mask.png"))) == 2
    edit = page.locator("#photos").get_by_role("button", name="Mask and crops of").first
    edit.click()
    expect(page.locator("#crops img")).to_have_count(4)
    before = (masks / "1-mask.png").read_bytes()
    paper = page.locator("#painter canvas").bounding_box()
    page.mouse.move(paper["x"] + 3, paper["y"] + 3)
    page.mouse.down()
    page.mouse.move(paper["x"] + 60, paper["y"] + 3, steps=3)
    page.mouse.up()
    page.locator("#painter").get_by_role("button", name="Keep the mask").click()
    expect(page.locator("#painter canvas")).to_have_count(0)
    after = Image.open(io.BytesIO((masks / "1-mask.png").read_bytes()))
    assert Image.open(io.BytesIO(before)).getpixel((4, 2)) < 9 and after.getpixel((4, 2)) > 200
    assert after.histogram()[255] > 0.05 * after.width * after.height  # what was there before stays
    edit.click()
    page.locator("#painter").get_by_role("button", name="No mask").click()
    expect(page.locator("#photos .sd-inset")).to_have_count(1)
    assert len(list(masks.glob("*-mask.png"))) == 1


def test_refusals_are_sentences_on_the_page(page: Page) -> None:
    page.get_by_role("button", name="New concept").click()
    page.get_by_label("What is it?").fill("dog")
    page.get_by_label("Its token").fill("two words")
    page.get_by_role("button", name="Add the concept").click()
    expect(page.get_by_text("write it as one word such as '<V1>'", exact=False)).to_be_visible()
    go_to(page, "Generate")
    page.locator("#draw").click()
    expect(page.get_by_text("The prompt is empty; say what to draw.")).to_be_visible()
    go_to(page, "Settings")
    page.locator("#base textarea, #base input").fill("/nowhere")
    page.locator("#keep-settings").click()
    expect(page.get_by_text("There is no base '/nowhere'", exact=False)).to_be_visible()


def test_what_changes_in_the_folder_disturbs_no_open_page(browser: Browser, adapters: tuple[Path, Path], tmp_path: Path) -> None:
    with Served(tmp_path / "studio") as served:
        first, second = (served.folder / "adapters" / path.name for path in adapters)
        for path, adapter in zip((first, second), adapters, strict=True):
            shutil.copyfile(adapter, path)
        with opened(browser, served.address) as page:
            go_to(page, "Fuse")
            for token in ("<V1>", "<V2>"):
                page.locator("#fuse-chosen").get_by_label(token).check()
            strength = page.get_by_label("number input for Strength of <V2>")
            strength.fill("0.5")
            knob = page.get_by_label("Strength of <V2>", exact=True)
            expect(knob).to_have_value("0.5")
            for _ in range(3):
                knob.press("ArrowLeft")
            first.rename(served.folder / "away")
            expect(page.get_by_label("number input for Strength of <V1>")).to_have_count(0)
            expect(page.locator("#fuse-chosen").get_by_label("<V1>")).to_have_count(0)
            expect(strength).to_have_value("0.35")
            (served.folder / "away").rename(first)
            expect(page.locator("#fuse-chosen").get_by_label("<V1>")).not_to_be_checked()

            go_to(page, "Concepts")
            page.locator("#concept-cards").get_by_role("button", name="<raccoon>").click()
            folder = served.folder / "concepts"
            (folder / "raccoon" / "1.txt").write_bytes("in a café".encode("cp1252"))
            (folder / "poodle" / "concept.toml").write_text('note = "mine"')
            expect(page.locator("#photos")).to_contain_text("is not UTF-8 text")
            expect(page.locator("#concept-cards")).to_contain_text("has unknown keys (note)")
            page.locator("#concept-cards").get_by_role("button", name="<black-cat>").click()
            expect(page.locator("#concept-title code")).to_have_text("<black-cat>")
            expect(page.locator(".toast-body")).to_have_count(0)


def test_steps_to_settle_and_those_never_drawn_with_reach_the_jobs(
    browser: Browser, adapters: tuple[Path, Path], tmp_path: Path
) -> None:
    with Served(tmp_path / "studio") as served:
        for adapter in adapters:
            shutil.copyfile(adapter, served.folder / "adapters" / adapter.name)
        with opened(browser, served.address) as page:
            page.locator("#more-settings").get_by_role("button", name="More settings").click()
            for token in ("<V1>", "<V2>"):  # they are of another base, beside which the training would end at once
                page.locator("#apart").get_by_label(token).check()
            train(page, 1)
            go_to(page, "Fuse")
            for token in ("<V1>", "<V2>"):
                page.locator("#fuse-chosen").get_by_label(token).check()
            expect(page.locator("#band-map table")).to_be_visible()  # what lies below it moves down
            expect(page.locator("#tab-fuse").get_by_label("Settle", exact=True)).to_be_checked()
            page.locator("#settling-steps input").fill("7")
            page.locator("#settling-steps input").press("Tab")
            page.locator("#fuse").click()
            served.wait_for(lambda: len([job for job in jobs_of(served) if job["kind"] in ("train", "fuse")]) == 2)
    asked = {job["kind"]: job["arguments"] for job in jobs_of(served)}
    assert asked["train"]["apart_from"] == [f"adapters/{adapter.name}" for adapter in adapters]
    assert asked["fuse"]["settle"] == 7


def test_a_lora_is_imported_and_can_be_chosen(browser: Browser, adapters: tuple[Path, Path], tmp_path: Path) -> None:
    lora = export_kohya(load_adapter(adapters[0]), tmp_path / "lora.safetensors").path
    with Served(tmp_path / "studio") as served:
        shutil.copyfile(adapters[1], served.folder / "adapters" / adapters[1].name)
        with opened(browser, served.address) as page:
            go_to(page, "Fuse")
            page.locator("#fuse-chosen").get_by_label("<V2>").check()
            expect(page.get_by_label("number input for Strength of <V2>")).to_be_visible()
            page.get_by_role("button", name="Import a LoRA").click()
            page.get_by_label("What does it show?").fill("cat")
            page.get_by_label("Its new token").fill("<friend>")
            page.locator("#lora input[type=file]").set_input_files([lora])
            expect(page.locator("#lora .file-preview")).to_be_visible()
            page.locator("#import-lora").click()
            page.locator("#fuse-chosen").get_by_label("<friend> (imported)").check()
            expect(page.locator("#band-map")).to_contain_text("<friend> was imported: choose “sum”")
            expect(page.get_by_label("What does it show?")).to_have_value("")
            expect(page.locator(".toast-body")).to_have_count(0)
            page.on("dialog", lambda dialog: dialog.accept())
            page.locator("#fused").get_by_role("button", name="Remove <friend> (imported)").click()
            expect(page.locator("#fuse-chosen").get_by_label("<friend> (imported)")).to_have_count(0)
            expect(page.get_by_label("number input for Strength of <friend>")).to_have_count(0)


def test_only_who_logs_in_gets_in(browser: Browser, tmp_path: Path) -> None:
    with Served(tmp_path / "studio", "--listen", "0.0.0.0", "--auth", ":".join(LOGIN)) as served:
        address = served.address.replace("0.0.0.0", "127.0.0.1")
        page = browser.new_page()
        page.set_default_timeout(PATIENCE)
        thumbnail = next((served.folder / "thumbnails").rglob("*.webp"))
        shown, hidden = f"{address}gradio_api/file={thumbnail}", f"{address}gradio_api/file={served.folder / 'settings.json'}"
        assert page.request.get(shown).status == 401
        assert page.request.get(f"{address}config").status == 401
        page.goto(address)
        page.get_by_label("username").fill(LOGIN[0])
        page.get_by_label("password").fill("wrong horse!")
        page.get_by_role("button", name="Login").click()
        expect(page.get_by_text("Incorrect credentials", exact=False)).to_be_visible()
        expect(page.get_by_label("username")).to_have_value("")  # gradio empties both fields
        page.get_by_label("username").fill(LOGIN[0])
        page.get_by_label("password").fill(LOGIN[1])
        page.get_by_role("button", name="Login").click()
        expect(page.locator("#concept-cards .sd-cards")).to_be_visible()
        assert page.request.get(shown).status == 200
        for refused in (hidden, f"{address}gradio_api/file=/etc/passwd", f"{address}gradio_api/file=http://127.0.0.1/x"):
            assert page.request.get(refused).status == 403
        assert LOGIN[1] not in page.content() and LOGIN[1] not in page.request.get(f"{address}config").text()
        page.close()
