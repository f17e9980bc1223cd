"""The page's own HTML: nothing that users write becomes HTML, and charts say in words what they show."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from app.ui.charts import band_map_chart, cross_talk_table, loss_curve
from app.ui.markup import button, duration, image, table, text
from spectral_diffusion.band_map import BandMap, GroupRow, Share

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
