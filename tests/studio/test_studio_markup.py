"""The page's own HTML: nothing that users write becomes HTML, and charts say in words what they show."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image

from app.actions.pictures import generate
from app.actions.studio import open_studio
from app.ui.charts import band_map_chart, cross_talk_table, loss_curve
from app.ui.generate import show_album
from app.ui.markup import button, duration, image, table, text
from app.ui.painter import painted
from app.ui.regions import show_regions
from app.ui.settings import _precision
from spectral_diffusion.adapters.band_map import BandMap, GroupRow, Share
from spectral_diffusion.errors import InputError
from spectral_diffusion.generation.drawing import Drawing
from spectral_diffusion.generation.regions import Region

HOSTILE = "<script>'\"${alert(1)}{{x}}"


def test_nothing_that_users_write_becomes_html() -> None:
    for piece in (
        text(HOSTILE),
        button(HOSTILE, HOSTILE, HOSTILE, confirm=HOSTILE, title=HOSTILE),
        image(Path("x.png"), HOSTILE),
    ):
        assert "<script" not in piece and "${" not in piece and "{{" not in piece
    assert ElementTree.fromstring(button(HOSTILE, HOSTILE, HOSTILE)).get("data-name") == HOSTILE
    assert "<script" not in table([HOSTILE], [[HOSTILE]])


def test_the_band_map_shows_conflicts_and_says_who_owns_what() -> None:
    shares = (Share(token="<a>", start=0, stop=8, energy=2.0), Share(token="<b>", start=4, stop=12, energy=1.0))
    rows = (GroupRow(group="UNet, up", directions=80, shares=shares),)
    result = BandMap(tokens=("<a>", "<b>"), rows=rows, conflicts=(("<a>", "<b>"),), cross_talk=((1.0, 0.25), (None, None)))
    chart = band_map_chart(result)
    assert 'class="conflict"' in chart and "share directions 4 to 7" in chart
    assert "&lt;a&gt; owns directions 0 to 7; &lt;b&gt; owns directions 4 to 11" in chart
    assert 'class="sd-c0"' in chart and "anywhere" not in chart
    assert "25%" in cross_talk_table(result) and "not measured" in cross_talk_table(result)


def test_an_imported_lora_is_shown_as_one_without_directions() -> None:
    rows = (GroupRow(group="UNet, up", directions=80, shares=(Share(token="<a>", start=None, stop=None, energy=2.0),)),)
    chart = band_map_chart(BandMap(tokens=("<a>",), rows=rows, conflicts=(), cross_talk=((None,),)))
    assert 'class="sd-c0 anywhere"' in chart and "&lt;a&gt; owns no directions and may change all" in chart


def test_the_curve_has_as_many_points_as_fit() -> None:
    assert "begins with the first steps" in loss_curve([], 100)
    chart = ElementTree.fromstring(loss_curve([(step, 1 / step) for step in range(1, 1001)], 1000))
    lines = chart.findall("polyline")
    assert all(300 < len(line.get("points", "").split()) < 600 for line in lines) and len(lines) == 2
    assert "after step 1000 of 1000" in chart.get("aria-label", "")


@pytest.mark.parametrize(("seconds", "words"), [(None, "not measured yet"), (40, "40 s"), (700, "12 min"), (6000, "1 h 40 min")])
def test_times_are_said_as_people_do(seconds: float | None, words: str) -> None:
    assert duration(seconds) == words


def test_regions_are_shown_where_they_are_and_never_as_html(tmp_path: Path) -> None:
    studio = open_studio(tmp_path)
    _, shown = show_regions(studio, (Region(prompt=HOSTILE, box=(0.25, 0.0, 0.5, 1.0)),))
    assert "<script" not in shown and "${" not in shown
    assert "left:25.0%;top:0.0%;width:25.0%;height:100.0%" in shown and 'data-edges="0.25,0,0.5,1"' in shown


def test_a_picture_is_being_scored_only_as_long_as_its_job_goes_on(tmp_path: Path) -> None:
    studio = open_studio(tmp_path)
    job = generate(studio, None, Drawing(prompt="a dog"))
    Image.new("RGB", (8, 8)).save(studio.folder("pictures") / "0001-5.png")
    record = {"prompt": "a dog", "seed": 5, "adapter": None, "tokens": [], "job": job}
    (studio.folder("pictures") / "0001-5.json").write_text(json.dumps(record))
    assert "being scored" in show_album(studio, "newest")
    studio.jobs.cancel(job)
    assert "being scored" not in show_album(studio, "newest") and "seed 5 · not scored" in show_album(studio, "newest")


def test_a_painted_mask_arrives_whole_or_is_refused() -> None:
    def sent(picture: Image.Image, format: str = "PNG") -> str:
        content = io.BytesIO()
        picture.save(content, format)
        return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"

    layer = Image.new("RGBA", (40, 30))
    layer.paste((255, 0, 0, 255), (0, 0, 20, 30))
    mask = painted(sent(layer))
    assert (mask.mode, mask.size, mask.getpixel((5, 5)), mask.getpixel((30, 5))) == ("L", (40, 30), 255, 0)
    for wrong in ("", "data:,x", "<svg/>", sent(layer)[:-60], sent(layer.convert("RGB"), "JPEG"), sent(Image.new("L", (800, 8)))):
        with pytest.raises(InputError, match="did not arrive whole"):
            painted(wrong)


@pytest.mark.parametrize(
    ("device", "words"),
    [("cpu", "float32"), ("cuda:0", "float16, bfloat16 while training"), ("mps:0", "float16, bfloat16 while training")],
)
def test_the_precision_is_that_of_drawing_and_of_training(device: str, words: str) -> None:
    assert _precision({"device": device, "precision": words.partition(",")[0]}) == words
