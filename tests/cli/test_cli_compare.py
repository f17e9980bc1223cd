"""`compare` and what `info` says of a picture."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from commands import Commands
from PIL import Image

ONE_STEP = ("--device", "cpu", "--steps", 1, "--seed", 3)


def test_a_grid_with_its_table(run: Commands, adapters: tuple[Path, Path], photo_folder: Path, tmp_path: Path) -> None:
    out, words = tmp_path / "grid.png", ("--base", run.base, *ONE_STEP)
    chosen = ("--adapter", adapters[0], "--adapter", adapters[1], "--references", f"<V1>={photo_folder}")
    axes = ("--x", "adapter=one,two,none", "--y", "prompt=<V1>, red | a dog")
    run("compare", *chosen, *axes, "--out", out, "--json", "-", *words)
    with open(out.with_suffix(".csv"), encoding="utf-8") as table:
        rows = list(csv.reader(table))
    assert [row[:2] for row in rows[1:4]] == [["<V1>, red", name] for name in ("one", "two", "none")]
    assert rows[0][3:5] == ["clip_text", "clip_image <V1>"] and len(rows) == 7
    with Image.open(out) as sheet:
        assert sheet.width > 3 * 100
    assert len(json.loads(run.out)["scores"]) == 6
    run("compare", *chosen, *axes, "--out", out, *words, expect=1)
    assert "exists already" in run.error
    run("compare", *chosen, "--y", "adapter=three", "--prompt", "x", "--out", tmp_path / "b.png", *words, expect=1)
    assert "no adapter 'three'" in run.error
    run("compare", "--y", "seed=1", "--out", tmp_path / "b.jpg", *words, expect=1)
    assert "does not end in .png" in run.error


def test_info_tells_how_a_picture_was_drawn(run: Commands, tmp_path: Path) -> None:
    region = ("--region", "0,0,0.5,1=a cat")
    run("generate", "--prompt", "a dog", *region, *ONE_STEP, "--base", run.base, "--out", tmp_path)
    run("info", tmp_path / "0001-3.png", "--json", tmp_path / "told.json")
    assert "a dog" in run.out and "seed 3" in run.out and "0,0,0.5,1=a cat" in run.out
    told = json.loads((tmp_path / "told.json").read_text())
    assert (told["prompt"], told["steps"], told["regions"][0]["prompt"]) == ("a dog", 1, "a cat")
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    run("info", tmp_path / "plain.png", expect=1)
    assert "does not say how it was drawn" in run.error
