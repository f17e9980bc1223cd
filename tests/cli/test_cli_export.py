"""The commands that write and read other tools' files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from commands import Commands, tensors
from PIL import Image


def test_every_format_is_exported(run: Commands, adapters: tuple[Path, Path], tmp_path: Path) -> None:
    pair, out, data = tmp_path / "pair.safetensors", tmp_path / "out", tmp_path / "data.json"
    run("fuse", *adapters, "--out", pair, "--method", "sum")
    Image.new("RGB", (8, 8)).save(tmp_path / "drawn.png")
    kohya = ("--preview", tmp_path / "drawn.png", "--rank", 2, "--strength", "<V1>=0.5", "--strength", "<V2>=2")
    run("export", pair, "--out", out / "lora.safetensors", *kohya, "--json", data)
    assert "relative error of rank 2, UNet down: " in run.out and "relative error of rank 2, overall: " in run.out
    assert [line.partition(":")[0] for line in run.out.splitlines()[-3:-1]] == ["AUTOMATIC1111", "ComfyUI"]
    said = json.loads(data.read_text(encoding="utf-8"))
    assert said["rank"] == 2 and 0 < said["errors"]["overall"] < 1
    names = ["V1.safetensors", "V2.safetensors", "lora.json", "lora.png", "lora.safetensors"]
    assert sorted(path.name for path in out.iterdir()) == names
    for precision, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        run("export", pair, "--format", "diffusers", "--out", out / "peft.safetensors", "--precision", precision, "--force")
        assert {tensor.dtype for tensor in tensors(out / "peft.safetensors")} == {dtype}
    run("export", pair, "--format", "embedding", "--out", tmp_path / "tokens")
    assert sorted(path.name for path in (tmp_path / "tokens").iterdir()) == names[:2]
    run("export", pair, "--format", "checkpoint", "--base", run.base, "--out", tmp_path / "merged")
    assert (tmp_path / "merged" / "model_index.json").is_file() and "models/diffusers" in run.out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--out", "a"], "'a' does not end in .safetensors; a kohya LoRA is one file"),
        (["--out", "a.safetensors", "--format", "embedding"], "is a file name; give a folder"),
        (["--out", "a.ckpt", "--format", "checkpoint"], "neither a .safetensors file nor a folder"),
        (["--out", "a", "--format", "checkpoint", "--rank", "2"], "--rank is for LoRAs"),
        (["--out", "a", "--format", "embedding", "--preview", "p.png"], "--preview is for kohya LoRAs"),
        (["--out", "a.safetensors", "--base", "b"], "--base is for checkpoints"),
        (["--out", "a.safetensors", "--rank", "0"], "rank must be from 1 to 4, the adapter's own, got 0"),
        (["--out", "a.safetensors", "--strength", "<V9>=1"], "has no concept '<V9>'; its tokens are <V1>"),
        (["--out", "a.safetensors", "--strength", "<V1>=much"], "--strength needs a number after the token"),
        (["--out", "a.safetensors", "--strength", "<V1>=nan"], "Strengths must be numbers, got nan"),
        (["--out", "a.safetensors", "--strength", "<V1>=1", "--strength", "<V1>=2"], "names '<V1>' twice"),
    ],
)
def test_exports_that_cannot_be_are_refused(
    run: Commands, trained: tuple[Path, Path], words: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run("export", trained[0], *words, expect=1)
    assert sentence in run.error and not list(tmp_path.iterdir())


def test_a_checkpoint_never_overwrites_the_base_that_it_is_made_of(
    run: Commands, trained: tuple[Path, Path], tmp_path: Path
) -> None:
    base = Path(shutil.copytree(run.base, tmp_path / "base"))
    merge = ("--format", "checkpoint", "--base", base, "--out", base, "--force")
    run("export", trained[0], *merge, expect=1)
    assert f"'{base}' would overwrite the base '{base}', which is read by this export; choose another --out" in run.error
    assert list(tmp_path.iterdir()) == [base]


def test_an_exported_lora_is_imported_again(run: Commands, adapters: tuple[Path, Path], tmp_path: Path) -> None:
    lora, again = tmp_path / "lora" / "a.safetensors", tmp_path / "again.safetensors"
    run("export", adapters[0], "--out", lora)
    named = ("--token", "<V3>", "--class-word", "snow dog", "--out", again)
    run("import", lora, *named, "--embedding", tmp_path / "lora" / "V1.safetensors", "--base", run.base)
    assert "<V3>  a snow dog, strength 1, lora, " in run.out and "fingerprint unknown" in run.out
    run("import", lora, *named, expect=1)
    assert "exists already; give --force" in run.error
    data = json.loads(run("import", lora, *named, "--force", "--json", "-"))
    assert data["concepts"][0]["band"] is None and data["concepts"][0]["token_vectors"] == 0
    run("fuse", adapters[1], again, "--out", tmp_path / "pair.safetensors", expect=1)
    assert "carries no measured activations" in run.error
    run("fuse", adapters[1], again, "--out", tmp_path / "pair.safetensors", "--method", "sum")
    draw = ("--prompt", "<V2> and <V3>", "--steps", 1, "--out", tmp_path / "p", "--base", run.base, "--device", "cpu")
    run("generate", "--adapter", tmp_path / "pair.safetensors", *draw)
    run("export", tmp_path / "pair.safetensors", "--out", tmp_path / "pair-lora.safetensors")
    assert "type: <lora:pair-lora:1> V2 and snow dog" in run.out
    run("import", adapters[0], "--token", "<V4>", "--class-word", "dog", "--out", tmp_path / "x.safetensors", expect=1)
    assert "is an adapter of this program already" in run.error
