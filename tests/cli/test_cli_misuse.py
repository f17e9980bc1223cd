"""What is asked for wrongly is said before anything is made, and nothing that is there is lost."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from commands import Commands
from PIL import Image

from spectral_diffusion import cli
from spectral_diffusion.adapters.adapter_file import load_adapter
from spectral_diffusion.demo import run_demo
from spectral_diffusion.errors import InputError
from spectral_diffusion.generation.album import Album
from spectral_diffusion.generation.drawing import Drawing, Picture


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--settle", 1, "--report", "r.html", "--references", "<V1>=nowhere"), "'nowhere' does not exist"),
        (("--settle", 1, "--report", "r.html", "--references", "<V9>=nowhere"), "names '<V9>', which none of the adapters has"),
        (("--settle", 1, "--report", "r.html", "--clip", "nothing"), "neither a folder with a CLIP nor an open_clip name"),
        (("--references", "<V1>=nowhere"), "--references is for the report; give --report too"),
        (("--clip", "nothing"), "--clip is for the report"),
        (("--base", "nowhere"), "--base is for --report and --settle"),
    ],
)
def test_a_fusion_looks_at_what_it_was_given_first(
    words: tuple[object, ...],
    sentence: str,
    run: Commands,
    adapters: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    run("fuse", *adapters, "--out", "pair.safetensors", *words, expect=1)
    assert sentence in run.error and {*tmp_path.iterdir()} == {*adapters}


def test_settle_before_the_adapters_is_explained(run: Commands, adapters: tuple[Path, Path], tmp_path: Path) -> None:
    run("fuse", "--settle", *adapters, "--out", tmp_path / "pair.safetensors", expect=2)
    assert "is no number of steps; write --settle behind the adapters" in run.error


def test_a_plain_fusion_leaves_the_checkpoint_of_a_settling(run: Commands, adapters: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "pair.safetensors.checkpoint").write_text("half of it")
    run("fuse", *adapters, "--out", tmp_path / "pair.safetensors", "--method", "sum")
    assert (tmp_path / "pair.safetensors.checkpoint").read_text() == "half of it"
    assert "--settle teaches it back" in run.out


def test_data_and_report_overwrite_nothing_else(run: Commands, adapters: tuple[Path, Path], tmp_path: Path) -> None:
    pair, data = tmp_path / "pair.safetensors", tmp_path / "pair.json"
    run("fuse", *adapters, "--out", pair, "--method", "sum", "--json", pair, expect=1)
    assert "pair.safetensors' is used by this command and would be overwritten; choose another --json" in run.error
    run("fuse", *adapters, "--out", pair, "--method", "sum", "--json", data)
    run("info", pair, "--json", pair, expect=1)
    assert load_adapter(pair).tokens == ("<V1>", "<V2>")
    run("export", pair, "--out", tmp_path / "lora" / "pair.safetensors", "--json", tmp_path / "lora" / "pair.json", expect=1)
    assert "choose another --json" in run.error
    run("fuse", *adapters, "--out", tmp_path / "new.safetensors", "--report", tmp_path / "pair.html", expect=1)
    assert "pair.json' exists already; give --force to overwrite it, or choose another --report" in run.error


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--regions", "auto"), "it names none without --adapter"),
        (("--confined",), "say how regions are drawn; give --region or --regions too"),
        (("--whole",), "give --adapter too"),
        (("--condition-strength", 0.5), "--condition-strength says how --condition is read"),
        (("--condition-photo",), "--condition-photo says how --condition is read"),
    ],
)
def test_what_would_count_for_nothing_is_refused(words: tuple[object, ...], sentence: str, run: Commands, tmp_path: Path) -> None:
    run("generate", "--prompt", "a dog", "--base", run.base, "--out", tmp_path / "p", *words, expect=1)
    assert sentence in run.error


def test_a_token_that_nobody_has_is_said(run: Commands, adapters: tuple[Path, Path], tmp_path: Path) -> None:
    draw = ("generate", "--steps", 1, "--base", run.base, "--out", tmp_path / "p")
    run(*draw, "--prompt", "<v1> and <V22>", "--adapter", adapters[0])
    assert "names <V22>, but the adapter has <V1>" in run.err
    run(*draw, "--prompt", "<V1> near a lake")
    assert "names <V1>, but the adapter is missing" in run.err


def test_axes_that_count_for_nothing_are_refused(run: Commands, tmp_path: Path) -> None:
    grid = ("compare", "--prompt", "a dog", "--base", run.base, "--out", tmp_path / "g.png")
    run(*grid, "--y", "seed=1,2", expect=1)
    assert "Both axes are 'seed'" in run.error
    run(*grid, "--y", "strength=0.1,1", expect=1)
    assert "The bare base has no strength" in run.error


def test_going_on_takes_no_other_band(run: Commands, adapters: tuple[Path, Path], photo_folder: Path, tmp_path: Path) -> None:
    run.train(photo_folder, tmp_path / "a.safetensors", "--token", "<V1>", "--start", adapters[0], "--band", 4, expect=1)
    assert "leave --band out" in run.error


def test_a_picture_that_is_not_there_is_said(run: Commands, tmp_path: Path) -> None:
    run("info", tmp_path / "none.png", expect=1)
    assert f"There is no picture '{tmp_path / 'none.png'}'" in run.error


def test_ctrl_c_while_the_words_are_read_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def press(words: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_build_parser", press)
    assert cli.main(["train"]) == cli.FAILED
    assert "Error: Stopped by Ctrl-C." in capsys.readouterr().err


def test_where_nobody_reads_any_more_the_work_goes_on() -> None:
    script = "from spectral_diffusion.cli.console import Console\nfor n in 'abc': Console().say(n); print(end='', flush=True)"
    program = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    program.stdout.close()
    assert (program.stderr.read().decode(), program.wait(timeout=60)) == ("", 0)
    program.stderr.close()


def test_two_programs_may_add_pictures_to_one_folder(tmp_path: Path) -> None:
    picture = Picture(
        image=Image.new("RGB", (8, 8)), seed=7, drawing=Drawing(prompt="a", guidance=1.0), tokens=(), class_words={}
    )
    one, other = Album(tmp_path, "base"), Album(tmp_path, "base")
    assert [album.add(picture).name for album in (one, other, one)] == ["0001-7.png", "0002-7.png", "0003-7.png"]


def test_a_picture_that_cannot_be_saved_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*anything: object) -> None:
        raise InputError("no")

    monkeypatch.setattr("spectral_diffusion.generation.album.save_picture", fail)
    picture = Picture(image=Image.new("RGB", (8, 8)), seed=7, drawing=Drawing(prompt="a"), tokens=(), class_words={})
    with pytest.raises(InputError):
        Album(tmp_path, "base").add(picture)
    assert not list(tmp_path.iterdir())


def test_the_demo_overwrites_no_adapter_of_others(adapters: tuple[Path, Path], tmp_path: Path) -> None:
    mine = tmp_path / "poodle.safetensors"
    mine.write_bytes(adapters[0].read_bytes())
    with pytest.raises(InputError, match=r"poodle\.safetensors' was not made by the demo"):
        run_demo(tmp_path)
    assert mine.read_bytes() == adapters[0].read_bytes()
