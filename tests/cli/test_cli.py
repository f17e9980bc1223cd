"""The command line: whole sequences of commands, what they leave behind, exit codes and error sentences."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import open_clip
import pytest
import torch
from commands import Commands
from PIL import Image
from safetensors.torch import save_file

from spectral_diffusion.adapters.adapter_file import load_adapter
from spectral_diffusion.cli import COMMANDS, main
from spectral_diffusion.training import TrainingSettings


def test_from_photos_to_pictures_and_exported_files(run: Commands, photo_folder: Path, tmp_path: Path) -> None:
    one, two, pair = (tmp_path / f"{name}.safetensors" for name in ("one", "two", "pair"))
    run.train(photo_folder, one, "--token", "<V1>", "--preset", "fast")
    assert "room for" in run.out and "directions 0-1" in run.out
    run.train(photo_folder, two, "--token", "<V2>", "--preset", "fast", "--avoid", one)
    assert "directions 2-3" in run.out
    run("fuse", one, two, "--out", pair)
    assert load_adapter(pair).tokens == ("<V1>", "<V2>") and "trained apart" in run.out
    base = ("--base", run.base)
    run("fuse", one, two, "--out", tmp_path / "settled.safetensors", "--settle", 2, "--device", "cpu", *base)
    settled = load_adapter(tmp_path / "settled.safetensors")
    assert "trained apart" not in run.out
    assert settled.method == "sum" and [part.settings["steps"] for part in settled.concepts] == [2, 2]
    assert not list(tmp_path.glob("*.checkpoint"))
    pictures = tmp_path / "pictures"
    draw = (
        "generate",
        "--adapter",
        pair,
        "--prompt",
        "<V1> and <V2> near a lake",
        "--steps",
        2,
        "--out",
        pictures,
        *base,
        "--device",
        "cpu",
    )
    run(*draw, "--count", 3, "--seed", 1, "--batch", 2)
    assert sorted(path.name for path in pictures.iterdir()) == ["0001-1.png", "0002-2.png", "0003-3.png"]
    run("export", pair, "--format", "kohya", "--out", tmp_path / "lora" / "pair-lora.safetensors")
    assert "models/Lora" in run.out and "models/loras" in run.out and "embedding:V1" in run.out
    exported = sorted(path.name for path in (tmp_path / "lora").iterdir())
    assert exported == ["V1.safetensors", "V2.safetensors", "pair-lora.json", "pair-lora.safetensors"]
    run("info", pair, *base)
    assert "<V1>" in run.out and "directions 2-3" in run.out and "fits" in run.out


def test_progress_and_text_do_not_mix_with_data(run: Commands, photo_folder: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "one.safetensors"
    trained = json.loads(run.train(photo_folder, adapter, "--token", "<V1>", "--json", "-"))
    assert trained["steps"] == 2 and trained["concepts"][0]["band"] == [0, 1]
    assert "training" in run.err and "room for" in run.err
    info = json.loads(run("info", adapter, "--json", "-", "--base", run.base))
    assert info["base"]["fits"] and info["base"]["trained_on_it"]
    assert info["bytes"] == adapter.stat().st_size
    assert info["parameters"] == sum(concept["parameters"] for concept in info["concepts"]) > 0


def test_data_goes_to_files(run: Commands, adapters: tuple[Path, Path], tmp_path: Path) -> None:
    one, two = adapters
    pair, data = tmp_path / "pair.safetensors", tmp_path / "new" / "data.json"
    run("fuse", one, two, "--out", pair, "--strength", 1, 0.5, "--method", "sum", "--json", data)
    fused = json.loads(data.read_text(encoding="utf-8"))
    assert fused["method"] == "sum" and [concept["strength"] for concept in fused["concepts"]] == [1.0, 0.5]
    run("export", pair, "--out", tmp_path / "lora" / "pair.safetensors", "--json", data)
    assert json.loads(data.read_text(encoding="utf-8"))["words"] == {"<V1>": "V1", "<V2>": "V2"}
    draw = ("generate", "--prompt", "a dog", "--steps", 1, "--out", tmp_path / "pictures")
    run(*draw, "--base", run.base, "--device", "cpu", "--json", data)
    (picture,) = json.loads(data.read_text(encoding="utf-8"))["pictures"]
    assert Path(picture["path"]).is_file() and picture["prompt"] == "a dog"


def test_pictures_are_numbered_on_and_never_overwritten(run: Commands, adapters: tuple[Path, Path], tmp_path: Path) -> None:
    draw = ("generate", "--prompt", "a dog", "--steps", 1, "--seed", 5, "--out", tmp_path / "p", "--base", run.base)
    run(*draw, "--sampler", "Euler a", "--size", "40x32")
    run(*draw, "--adapter", adapters[0])
    assert "names none of the adapter's concepts (<V1>)" in run.err
    assert sorted(path.name for path in (tmp_path / "p").iterdir()) == ["0001-5.png", "0002-5.png"]
    with Image.open(tmp_path / "p" / "0001-5.png") as picture:
        assert picture.size == (40, 32)


def test_concepts_that_never_met_are_said_to_disturb_each_other(
    run: Commands, adapters: tuple[Path, Path], tmp_path: Path
) -> None:
    pair, draw = tmp_path / "pair.safetensors", ("generate", "--prompt", "<V1> and <V2>", "--steps", 1, "--base", run.base)
    run("fuse", *adapters, "--out", pair, "--method", "sum")
    apart = "<V1>, <V2> were trained apart"
    for number, (words, said) in enumerate((((), True), (("--regions", "auto"), False))):
        run(*draw, "--adapter", pair, "--out", tmp_path / str(number), *words)
        assert (apart in run.err) is said


def test_scores_come_from_the_chosen_clip(run: Commands, photo_folder: Path, tmp_path: Path) -> None:
    clip, data = make_clip(tmp_path / "clip"), tmp_path / "scores.json"
    run("score", photo_folder, "--references", f"<V1>={photo_folder}", "--clip", clip, "--json", data)
    scores = json.loads(data.read_text(encoding="utf-8"))
    assert len(scores["pictures"]) == 5 and set(scores["clip_image"]) == {"<V1>"}
    assert "mean of 5" in run.out
    twice = ("--references", f"<V1>={photo_folder}", "--references", f"<V1>={photo_folder}")
    run("score", photo_folder, *twice, "--clip", clip, expect=1)
    assert "names '<V1>' twice" in run.error


def make_clip(folder: Path) -> Path:
    """Save a tiny random CLIP in open_clip's form."""
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    torch.manual_seed(0)
    save_file(open_clip.CLIP(**config).state_dict(), folder / "open_clip_model.safetensors")
    return folder


def test_what_cannot_be_fused_is_refused_before_it_is_settled(
    run: Commands, adapters: tuple[Path, Path], photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def settle(*anything: object, **named: object) -> None:
        pytest.fail("It was settled.")

    three, pair = tmp_path / "three.safetensors", tmp_path / "pair.safetensors"
    run.train(photo_folder, three, "--token", "<V3>", "--band", 1)
    monkeypatch.setattr("spectral_diffusion.training.settling.settle", settle)
    how = ("--out", pair, "--settle", 2, "--base", run.base, "--device", "cpu")
    run("fuse", adapters[0], three, *how, expect=1)
    assert "share singular directions" in run.error
    run("fuse", *adapters, *how, "--strength", 1, 1, 1, expect=1)
    assert "2 adapters need as many strengths, got 3" in run.error


def test_damaged_and_missing_adapters_are_named(run: Commands, adapters: tuple[Path, Path], tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(adapters[0].read_bytes()[:2000])
    for command in (
        ("info",),
        ("export", "--out", tmp_path / "x.safetensors"),
        ("fuse", "--out", tmp_path / "x.safetensors"),
    ):
        run(command[0], damaged, *command[1:], expect=1)
        assert "damaged.safetensors' is damaged" in run.error
        run(command[0], tmp_path / "missing.safetensors", *command[1:], expect=1)
        assert "There is no adapter file" in run.error
    run("generate", "--adapter", damaged, "--prompt", "<V1>", "--out", tmp_path / "p", "--base", run.base, expect=1)
    assert "is damaged" in run.error


def test_two_concepts_with_one_token_are_not_fused(run: Commands, adapters: tuple[Path, Path], tmp_path: Path) -> None:
    run("fuse", adapters[0], adapters[0], "--out", tmp_path / "pair.safetensors", expect=1)
    assert "Two concepts use the token '<V1>'" in run.error


def test_inputs_and_other_adapters_are_never_overwritten(run: Commands, adapters: tuple[Path, Path], tmp_path: Path) -> None:
    run("fuse", *adapters, "--out", adapters[0], "--force", expect=1)
    assert "would be overwritten" in run.error
    run("export", adapters[0], "--out", adapters[0], "--force", expect=1)
    assert "would be overwritten" in run.error
    shutil.copy(adapters[1], tmp_path / "V1.safetensors")
    run("export", adapters[0], "--out", tmp_path / "lora.safetensors", expect=1)
    assert "would overwrite the adapter" in run.error and load_adapter(tmp_path / "V1.safetensors")


def test_places_that_cannot_be_written_are_found_before_the_work(
    run: Commands, adapters: tuple[Path, Path], photo_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    blocked = tmp_path / "file" / "a.safetensors"
    run.train(photo_folder, blocked, "--token", "<V1>", expect=1)
    assert "could not be written" in run.error and "training" not in run.err
    run("fuse", *adapters, "--out", blocked, expect=1)
    run("generate", "--prompt", "a dog", "--out", tmp_path / "file", "--base", run.base, expect=1)
    run("info", adapters[0], "--json", tmp_path, expect=1)
    assert "is a folder" in run.error


def test_missing_photos_tokens_and_bases_are_said(run: Commands, photo_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.safetensors"
    run.train(tmp_path / "nothing", out, "--token", "<V1>", expect=1)
    assert "does not exist" in run.error
    run.train(photo_folder, out, expect=1)
    assert "says no token" in run.error
    run.train(photo_folder, out, "--token", "<V1>", "--base", tmp_path, expect=1)
    assert "is not a diffusers folder" in run.error
    run.train(photo_folder, out, "--token", "<V1>", "--device", "abacus", expect=1)
    assert "There is no device 'abacus'" in run.error
    run.train(photo_folder, out, "--token", "<V1>", "--steps", 0, expect=1)
    assert "steps must be at least 1" in run.error


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "COMMAND"),
        (["paint"], "invalid choice: 'paint'"),
        (["train", "photos"], "--out"),
        (["train", "photos", "--out", "a.safetensors", "--preset", "quick"], "invalid choice: 'quick'"),
        (["train", "photos", "--out", "a.ckpt"], "'a.ckpt' does not end in .safetensors"),
        (["train", "photos", "--out", "a.safetensors", "--steps", "many"], "invalid int value: 'many'"),
        (["generate", "--prompt", "x", "--out", "p", "--size", "large"], "'large' is not a size such as 512x768"),
        (["score", "p", "--references", "photos"], "'photos' is not of the form"),
        (["export", "a", "--format", "ckpt", "--out", "b.safetensors"], "invalid choice: 'ckpt'"),
    ],
)
def test_wrong_use_is_one_sentence_and_code_2(run: Commands, words: list[str], sentence: str) -> None:
    run(*words, expect=2)
    assert sentence in run.error and run.error == run.err.strip()
    assert "--help" in run.error


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(run: Commands, command: str) -> None:
    assert command in run("--help")
    text = run(command, "--help")
    assert f"spectral-diffusion {command}" in text and "--json" in text


def test_settings_are_explained_in_their_own_words(run: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    text = run("train", "--help")
    for field in fields(TrainingSettings):
        assert f"--{field.name.replace('_', '-')} " in text and field.metadata["help"] in text


def test_the_unexpected_is_one_sentence_too(
    run: Commands, adapters: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("spectral_diffusion.adapters.adapter_file.load_adapter", raiser(ZeroDivisionError("oh")))
    run("info", adapters[0], expect=1)
    assert "Something unexpected went wrong (ZeroDivisionError: oh)" in run.error and "--debug" in run.error
    assert main(["info", str(adapters[0]), "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setattr("spectral_diffusion.adapters.adapter_file.load_adapter", raiser(KeyboardInterrupt()))
    run("info", adapters[0], expect=1)
    assert "Stopped by Ctrl-C" in run.error
    monkeypatch.setattr(
        "spectral_diffusion.adapters.adapter_file.load_adapter", raiser(torch.OutOfMemoryError("CUDA out of memory."))
    )
    run("info", adapters[0], expect=1)
    assert "Memory does not suffice" in run.error and "close what else uses the GPU, or choose the CPU as device." in run.error


def raiser(error: BaseException) -> Callable[..., None]:
    def raise_it(*anything: object) -> None:
        raise error

    return raise_it


def test_no_handler_stays_behind(run: Commands) -> None:
    before = list(logging.getLogger("spectral_diffusion").handlers)
    run("--version")
    assert logging.getLogger("spectral_diffusion").handlers == before


def test_help_does_not_import_torch() -> None:
    code = "import sys; from spectral_diffusion.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, env=os.environ).returncode == 0


def test_help_of_what_needs_no_base_does_not_import_one() -> None:
    code = (
        "import sys; from spectral_diffusion.cli import main; main(['fuse', '--help']); main(['train', '--help']); "
        "sys.exit('diffusers' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, env=os.environ).returncode == 0
