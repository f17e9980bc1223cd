"""Conditioning: what the UNet is given in training is what the pipeline gives it when drawing."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from narrow_bases import FAMILIES, NarrowBase, change_json

from spectral_diffusion.adapters.attach import with_tokens
from spectral_diffusion.bases.base import Base, load_base
from spectral_diffusion.prompts.conditioning import encode, prompts, tokenize

CAPTIONS = ("a dog near a lake", "", "two cats in the snow")


@torch.no_grad()
def given_to_the_unet(base: Base) -> list[dict[str, torch.Tensor]]:
    """Return what the pipeline gives the UNet for `CAPTIONS`, without guidance."""
    given: list[dict[str, torch.Tensor]] = []

    def record(module: torch.nn.Module, positional: tuple[object, ...], named: dict[str, object]) -> None:
        given.append({"states": named["encoder_hidden_states"], **(named.get("added_cond_kwargs") or {})})

    handle = base.pipeline.unet.register_forward_pre_hook(record, with_kwargs=True)
    side = base.resolution
    base.pipeline(list(CAPTIONS), num_inference_steps=1, guidance_scale=1.0, height=side, width=side, output_type="latent")
    handle.remove()
    return given


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_it_is_what_the_pipeline_gives(family: str, loaded_bases: dict[str, Base]) -> None:
    base = loaded_bases[family]
    (expected,) = given_to_the_unet(base)
    ids = tokenize(base, CAPTIONS)
    assert ids.shape == (3, len(base.text_encoders), 77)
    conditioning = encode(base, ids)
    assert torch.equal(conditioning["encoder_hidden_states"], expected.pop("states"))
    added = conditioning.get("added_cond_kwargs", {})
    assert added.keys() == expected.keys() == ({"text_embeds", "time_ids"} if family == "sdxl" else set())
    assert all(torch.equal(added[name], expected[name]) for name in added)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_pipeline_draws_from_it_what_it_draws_from_the_words(family: str, loaded_bases: dict[str, Base]) -> None:
    base = loaded_bases[family]
    drawn = []
    for what in ({"prompt": ["a dog"], "negative_prompt": ["snow"]}, prompts(base, ["a dog"], ["snow"])):
        seeded = torch.Generator().manual_seed(3)
        images = base.pipeline(**what, num_inference_steps=2, height=64, width=64, generator=seeded, output_type="latent").images
        drawn.append(images)
    assert torch.equal(*drawn)


@torch.no_grad()
def test_the_pooled_output_is_taken_at_the_end_of_the_text_also_with_new_tokens(
    narrow_bases: dict[str, NarrowBase], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(narrow_bases["sdxl"].folder, tmp_path / "as released"))
    for part in ("text_encoder", "text_encoder_2"):
        change_json(folder / part / "config.json", eos_token_id=2)
    base = load_base(folder, device="cpu")
    words = {part: tokenizer("dog", add_special_tokens=False).input_ids for part, tokenizer in base.tokenizers.items()}
    vectors = {part: base.text_encoders[part].get_input_embeddings().weight[ids] for part, ids in words.items()}
    before = encode(base, tokenize(base, ["a dog near a lake"]))
    with with_tokens(base, {"<V1>": vectors}):
        after = encode(base, tokenize(base, ["a <V1> near a lake"]))
    assert torch.equal(after["encoder_hidden_states"], before["encoder_hidden_states"])
    assert torch.equal(after["added_cond_kwargs"]["text_embeds"], before["added_cond_kwargs"]["text_embeds"])
