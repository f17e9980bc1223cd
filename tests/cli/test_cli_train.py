"""`train`: several at once, bands and neighbours, what is gone on from, Ctrl-C, and what lies beside the adapter."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import pytest
import torch
from commands import Commands, tensors

from spectral_diffusion.adapters.adapter_file import load_adapter
from spectral_diffusion.cli.console import stop_on_interrupt


def test_several_concepts_are_trained_in_one_go(run: Commands, photo_folder: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    words = ("--out", one, two, "--token", "<V1>", "<V2>", "--class-word", "dog", "cat", "--sample-every", 2, "--json", "-")
    base = ("--base", run.base, "--device", "cpu", "--steps", 2, "--batch", 1, "--rank", 2, "--no-weakest-first")
    trained = json.loads(run("train", photo_folder, photo_folder, *words, *base))
    assert [data["concepts"][0]["token"] for data in trained] == ["<V1>", "<V2>"]
    assert [data["concepts"][0]["band"] for data in trained] == [[0, 1], [2, 3]]
    assert [load_adapter(file).tokens for file in (one, two)] == [("<V1>",), ("<V2>",)]
    assert [len(list((tmp_path / f"{name}-samples").iterdir())) for name in ("one", "two")] == [2, 2]
    assert not list(tmp_path.glob("*.checkpoint"))
    run("train", photo_folder, photo_folder, *words[:6], "<V3>", *base, "--force", expect=1)
    assert "--token has 3 values for 2 folder(s) of photos" in run.error
    run("train", photo_folder, photo_folder, "--out", one, one, *words[3:9], *base, "--force", expect=1)
    assert "Two concepts have the same --out" in run.error


def test_training_goes_on_from_an_adapter(run: Commands, adapters: tuple[Path, Path], photo_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "longer.safetensors"
    run.train(photo_folder, out, "--token", "<V2>", "--start", adapters[1], "--avoid", adapters[1].parent)
    was, now = (load_adapter(path).concepts[0] for path in (adapters[1], out))
    assert now.band == was.band != load_adapter(adapters[0]).concepts[0].band
    assert (was.settings["steps_done"], now.settings["steps_done"], now.settings["among"]) == (2, 4, ["<V1>"])
    run.train(photo_folder, out, "--token", "<V3>", "--start", adapters[1], "--force", expect=1)
    assert "has no concept '<V3>'; its tokens are <V2>" in run.error


def test_training_does_not_go_on_where_an_avoided_adapter_has_the_band(
    run: Commands, adapters: tuple[Path, Path], photo_folder: Path, tmp_path: Path
) -> None:
    out, other = tmp_path / "longer.safetensors", tmp_path / "other.safetensors"
    start = load_adapter(adapters[0]).concepts[0].band.start
    run.train(photo_folder, other, "--token", "<V3>", "--band", start)
    goes_on = (photo_folder, out, "--token", "<V1>", "--start", adapters[0], "--avoid", other)
    run.train(*goes_on, expect=1)
    assert re.search(r"'<V1>' was trained on the directions .* and '<V3>' \('.*other.*'\) on .*cannot be summed", run.error)
    run.train(*goes_on, "--allow-overlap")
    assert load_adapter(out).concepts[0].settings["among"] == ["<V3>"]


def test_a_folder_is_avoided_with_every_adapter_in_it(
    run: Commands, adapters: tuple[Path, Path], photo_folder: Path, tmp_path: Path
) -> None:
    run("export", adapters[0], "--out", tmp_path / "lora.safetensors")
    run.train(photo_folder, tmp_path / "three.safetensors", "--token", "<V3>", "--avoid", tmp_path)
    assert "directions 4-5" in run.out and "trained among <V1>, <V2>" in run.out
    run.train(photo_folder, tmp_path / "four.safetensors", "--token", "<V1>", "--avoid", adapters[0])
    assert "can never be fused" in run.err


def test_a_lora_is_trained_longer_at_its_rank_only(run: Commands, photo_folder: Path, tmp_path: Path) -> None:
    lora, longer = tmp_path / "lora.safetensors", tmp_path / "longer.safetensors"
    words = ("--token", "<V1>", "--parametrisation", "lora")
    run.train(photo_folder, lora, *words)
    run.train(photo_folder, longer, *words, "--start", lora)
    assert load_adapter(longer).concepts[0].settings["steps_done"] == 4
    run.train(photo_folder, longer, *words, "--start", lora, "--rank", 3, "--force", expect=1)
    assert "'<V1>' was trained with rank 2, not 3; choose that, or start it anew" in run.error
    run.train(photo_folder, longer, "--token", "<V1>", "--start", lora, "--force", expect=1)
    assert "'<V1>' was trained with parametrisation lora, not additive" in run.error


def test_a_taken_band_is_refused_unless_allowed(
    run: Commands, adapters: tuple[Path, Path], photo_folder: Path, tmp_path: Path
) -> None:
    words = ("--token", "<V3>", "--avoid", adapters[0], "--band", 1)
    run.train(photo_folder, tmp_path / "three.safetensors", *words, expect=1)
    assert "Directions 1-2 overlap with those of '<V1>' (0-1" in run.error
    run.train(photo_folder, tmp_path / "three.safetensors", *words, "--allow-overlap")
    run("fuse", adapters[0], tmp_path / "three.safetensors", "--out", tmp_path / "pair.safetensors", expect=1)
    assert "share singular directions" in run.error
    run("fuse", adapters[0], tmp_path / "three.safetensors", "--out", tmp_path / "pair.safetensors", "--allow-overlap")


def test_a_band_beyond_the_base_is_refused(run: Commands, photo_folder: Path, tmp_path: Path) -> None:
    run.train(photo_folder, tmp_path / "a.safetensors", "--token", "<V1>", "--band", 1000, expect=1)
    assert "lies beyond layer" in run.error
    run.train(photo_folder, tmp_path / "a.safetensors", "--token", "<V1>", "--rank", 1000, expect=1)
    assert "smaller rank" in run.error


def test_an_existing_adapter_is_overwritten_by_force_only(run: Commands, adapters: tuple[Path, Path], photo_folder: Path) -> None:
    before = adapters[0].read_bytes()
    run.train(photo_folder, adapters[0], "--token", "<V9>", expect=1)
    assert "exists already; give --force" in run.error
    assert adapters[0].read_bytes() == before
    run.train(photo_folder, adapters[0], "--token", "<V9>", "--force")
    assert load_adapter(adapters[0]).tokens == ("<V9>",)


def test_a_stopped_training_goes_on_where_it_was(
    run: Commands, photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed, stopped = tmp_path / "undisturbed.safetensors", tmp_path / "stopped.safetensors"
    run.train(photo_folder, undisturbed, "--token", "<V1>")
    with monkeypatch.context() as patch:
        patch.setattr("spectral_diffusion.cli.displays.TrainingDisplay.show", press_ctrl_c)
        run.train(photo_folder, stopped, "--token", "<V1>", expect=1)
    assert "Stopped after step 1 of 2" in run.err and "run the same command again" in run.err
    checkpoint = tmp_path / "stopped.safetensors.checkpoint"
    assert checkpoint.is_file() and not stopped.exists()
    run.train(photo_folder, stopped, "--token", "<V1>")
    assert "goes on from step 1" in run.err
    assert not checkpoint.exists()
    assert all(torch.equal(a, b) for a, b in zip(tensors(undisturbed), tensors(stopped), strict=True))


def press_ctrl_c(*anything: object) -> None:
    signal.raise_signal(signal.SIGINT)


def test_the_second_ctrl_c_ends_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    started_with = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets what runs behind it ignore Ctrl-C
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), stop_on_interrupt("stopping") as should_stop:
        assert not should_stop()
        press_ctrl_c()
        assert should_stop() and "stopping" in capsys.readouterr().err
        press_ctrl_c()
    assert signal.getsignal(signal.SIGINT) == before
    signal.signal(signal.SIGINT, started_with)


def test_sample_pictures_are_kept_beside_the_adapter(run: Commands, photo_folder: Path, tmp_path: Path) -> None:
    run.train(photo_folder, tmp_path / "one.safetensors", "--token", "<V1>", "--sample-every", 2)
    names = sorted(path.name for path in (tmp_path / "one-samples").iterdir())
    assert names == ["step-000002-1.png", "step-000002-2.png"]
