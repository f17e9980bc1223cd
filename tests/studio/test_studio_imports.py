"""LoRAs of other tools in the studio: as the command imports them, with what they do not say, and beside trained concepts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from random_adapters import random_adapter
from safetensors.torch import load_file, save_file
from studios import work

from app.actions.adapters import adapter_cards, fuse
from app.actions.concepts import create_concept
from app.actions.imports import add_lora
from app.actions.photos import MAX_UPLOAD, add_photos
from app.actions.pictures import drawing_from, generate
from app.actions.studio import Studio
from app.jobs import State
from spectral_diffusion.adapters.adapter_file import load_adapter, save_adapter
from spectral_diffusion.bases.base import Base
from spectral_diffusion.cli import main
from spectral_diffusion.errors import InputError
from spectral_diffusion.export import export_embeddings, export_kohya


@pytest.fixture
def lora(base: Base, tmp_path: Path) -> Path:
    """A LoRA as kohya's scripts write it, with its embedding in `V1.safetensors` beside it."""
    return export_kohya(random_adapter(base), tmp_path / "friend.safetensors", dtype=torch.float32).path


def test_a_lora_is_imported_as_the_command_does_and_never_over_another(
    tiny_studio: Studio, base: Base, lora: Path, tmp_path: Path
) -> None:
    export_embeddings(random_adapter(base), tmp_path / "words", dtype=torch.float32)
    embedding = tmp_path / "words" / "V1.safetensors"
    create_concept(tiny_studio, "<V3!>", "dog")  # whose adapter will be V3
    made = add_lora(tiny_studio, [lora], " <V3> ", "cat", embedding)
    assert (made.name, made.job, made.remarks) == ("adapters/V3-2.safetensors", None, ())
    (card,) = adapter_cards(tiny_studio)
    assert card.label == "<V3> (imported)"
    named = ["--token", "<V3>", "--class-word", "cat", "--embedding", str(embedding)]
    assert main(["import", str(lora), *named, "--out", str(tmp_path / "out.safetensors")]) == 0
    by_command = load_file(tmp_path / "out.safetensors")
    assert all(torch.equal(tensor, by_command[name]) for name, tensor in load_file(card.path).items())
    with pytest.raises(InputError, match=r"has the token '<V3>'; choose another, such as '<cat>'"):
        add_lora(tiny_studio, [lora], "<v3>", "cat")
    with pytest.raises(InputError, match="has the token '<V3>'"):
        create_concept(tiny_studio, "<V3>", "cat")
    generate(tiny_studio, card.name, drawing_from({"prompt": "<V3>", "steps": 1, "count": 1}))
    assert work(tiny_studio) == [State.DONE], tiny_studio.jobs.jobs()[0].reason
    assert not list(tiny_studio.folder("uploads").iterdir())


def test_what_is_no_lora_is_refused_by_the_name_it_was_uploaded_under(tiny_studio: Studio, lora: Path, tmp_path: Path) -> None:
    whole, notes = tmp_path / "whole.safetensors", tmp_path / "notes.json"
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.ones(1)}, whole)
    notes.write_text("{}")
    for files, sentence in (
        ([], "Give the file of one LoRA"),
        ([lora, whole], "Give the file of one LoRA"),
        ([lora, notes], "'notes.json' is no part of a LoRA"),
        ([whole], "^'whole.safetensors' is a whole checkpoint, not a LoRA; give it as the base in the tab Settings"),
    ):
        with pytest.raises(InputError, match=sentence):
            add_lora(tiny_studio, files, "<V3>", "cat")
    assert not list(tiny_studio.folder("adapters").iterdir()) and not tiny_studio.jobs.jobs()


def test_a_lora_of_peft_is_as_strong_as_its_configuration_says(tiny_studio: Studio, tmp_path: Path) -> None:
    name = "base_model.model.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    matrices = {f"{name}.lora_A.weight": torch.ones(1, 48), f"{name}.lora_B.weight": torch.ones(64, 1)}
    lora, configuration = tmp_path / "adapter_model.bin", tmp_path / "adapter_config.json"
    torch.save(matrices, lora)
    configuration.write_text(json.dumps({"lora_alpha": 3, "r": 1}))
    (alone, told) = (add_lora(tiny_studio, files, f"<V{len(files)}>", "cat") for files in ([lora], [configuration, lora]))
    assert told.remarks == () and [text.split(";")[0] for text in alone.remarks] == [
        "'adapter_model.bin' does not say by what its change is scaled, 1 is taken"
    ]
    changes = [load_adapter(card.path).deltas() for card in adapter_cards(tiny_studio)]
    for key, delta in changes[0].items():
        torch.testing.assert_close(3 * delta.dense(), changes[1][key].dense(), rtol=2e-3, atol=0)  # kept in half precision


def test_where_nothing_tells_the_family_a_job_takes_the_chosen_base(tiny_studio: Studio, tmp_path: Path) -> None:
    lora = tmp_path / "slider.safetensors"
    name = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
    save_file({f"{name}.lora_down.weight": torch.ones(1, 64), f"{name}.lora_up.weight": torch.ones(64, 1)}, lora)
    wide = shutil.copyfile(lora, tmp_path / "wide.safetensors")
    save_file({f"{name}.lora_down.weight": torch.ones(1, 320), f"{name}.lora_up.weight": torch.ones(320, 1)}, wide)
    made = [add_lora(tiny_studio, [file], token, "cat") for file, token in ((lora, "<V3>"), (wide, "<V4>"))]
    assert [one.name for one in made] == [None, None]
    lora.unlink()  # as uploads go away in time
    assert work(tiny_studio) == [State.DONE, State.FAILED]
    failed, done = tiny_studio.jobs.jobs()
    assert done.result == {"adapter": "adapters/V3.safetensors"} and not (tiny_studio.jobs.folder / done.name / "files").exists()
    assert load_adapter(tiny_studio.folder("adapters") / "V3.safetensors").family == "mini"
    assert str(tmp_path) not in (failed.reason or "")


def test_an_imported_lora_is_fused_by_the_sum(tiny_studio: Studio, base: Base, lora: Path) -> None:
    save_adapter(random_adapter(base, token="<V2>", measured=True), tiny_studio.folder("adapters") / "V2.safetensors")
    add_lora(tiny_studio, [lora], "<V3>", "cat")
    names = [card.name for card in adapter_cards(tiny_studio)]
    with pytest.raises(InputError, match="<V3> was imported, and nothing was measured of it; choose “sum” under “How to join”"):
        fuse(tiny_studio, names, [1.0, 1.0])
    fuse(tiny_studio, names, [1.0, 0.5], title="pair", method="sum")
    assert work(tiny_studio) == [State.DONE], tiny_studio.jobs.jobs()[0].reason


def test_larger_uploads_for_loras_let_no_larger_photos_in(tiny_studio: Studio, tmp_path: Path) -> None:
    name = create_concept(tiny_studio, "<dog>", "dog")
    for file in (tmp_path / "1.png", tmp_path / "1.txt"):
        with open(file, "wb") as content:
            content.truncate(MAX_UPLOAD + 1)
    findings = add_photos(tiny_studio, name, [tmp_path / "1.png", tmp_path / "1.txt"])
    assert [finding.text for finding in findings] == ["It is larger than 64 MB; scale it down first."] * 2
