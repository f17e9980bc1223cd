"""What an export wrote, where other tools want it, and the checks before anything is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from spectral_diffusion.adapters.adapter import Adapter
from spectral_diffusion.errors import InputError

_OF_TWO_ENCODERS = (
    ', once for each tensor in it: f["clip_l"] with text_encoder=pipeline.text_encoder, tokenizer=pipeline.tokenizer, and '
    'f["clip_g"] with text_encoder=pipeline.text_encoder_2, tokenizer=pipeline.tokenizer_2, where f = load_file(...)'
)
"""How diffusers loads an embedding of SDXL; it refuses the file as a whole."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """What was written, and what to type.

    Attributes:
        format: `kohya`, `diffusers`, `embedding` or `checkpoint`.
        family: that of the base which it is for.
        path: the LoRA or the checkpoint; for embeddings their folder.
        embeddings: the file of each token that has an embedding.
        words: by token, what is typed in AUTOMATIC1111 and ComfyUI: the name of the embedding's file, or the class word.
        side_files: description and preview picture, beside a kohya LoRA.
        rank: columns of every factor of a LoRA.
        errors: of a compressed LoRA, the relative error in Frobenius norm, per group of layers and `overall`; else empty.
    """

    format: str
    family: str
    path: Path
    embeddings: dict[str, Path]
    words: dict[str, str]
    side_files: tuple[Path, ...] = ()
    rank: int | None = None
    errors: dict[str, float] = field(default_factory=dict)


def check_targets(targets: Sequence[Path], *, overwrite: bool) -> None:
    """Check that nothing in `targets` is overwritten unasked.

    Raises:
        InputError: one is a folder, or exists and may not be overwritten.
    """
    for target in targets:
        if target.is_dir():
            raise InputError(f"'{target}' is a folder; give a file name.")
        if target.exists() and not overwrite:
            raise InputError(f"'{target}' exists already; give --force to overwrite it, or choose another --out.")


def remarks(adapter: Adapter) -> list[str]:
    """Return what other tools cannot do with what is exported of `adapter`."""
    said = []
    if adapter.family == "mini":
        said.append("This adapter belongs to the embedded base, which only diffusers loads.")
    layerwise = [concept.token for concept in adapter.concepts if concept.is_layerwise]
    if layerwise:
        said.append(
            f"{', '.join(layerwise)}: no other tool holds vectors for each cross-attention layer. The embedding is their mean, "
            "the layer-shared form, with which pictures differ; train without --layerwise-token for the same pictures elsewhere."
        )
    return said


def places(export: Export) -> tuple[str, str]:
    """Return two lines: where each file goes in AUTOMATIC1111 and in ComfyUI, and which words to type."""
    files = ", ".join(path.name for path in export.embeddings.values())
    if export.format == "diffusers":
        # in capitals diffusers finds a token's first vector only
        tokens = " and ".join(token.lower() if token in export.embeddings else word for token, word in export.words.items())
        loaded = [f"{export.path.name} with load_lora_weights"] + [
            f'{file.name} with load_textual_inversion and token="{token.lower()}"' for token, file in export.embeddings.items()
        ]
        return (
            "AUTOMATIC1111 and ComfyUI do not read all of this naming; give them what --format kohya writes.",
            f"diffusers: load {', '.join(loaded)}{_OF_TWO_ENCODERS if files and export.family == 'sdxl' else ''}; type: {tokens}",
        )
    a1111, comfy = _places_of_main_file(export)
    if files:
        a1111, comfy = [*a1111, f"{files} into embeddings"], [*comfy, f"{files} into models/embeddings"]
    words = " and ".join(export.words.values())
    comfy_words = " and ".join(
        f"embedding:{word}" if token in export.embeddings else word for token, word in export.words.items()
    )
    if export.format == "kohya":
        words, comfy_words = f"<lora:{export.path.stem}:1> {words}", f"{comfy_words} (with the LoRA loaded)"
    return (
        f"AUTOMATIC1111: put {', '.join(a1111)}; type: {words}",
        f"ComfyUI: put {', '.join(comfy)}; type: {comfy_words}",
    )


def _places_of_main_file(export: Export) -> tuple[list[str], list[str]]:
    """Return what is put where in AUTOMATIC1111 and in ComfyUI, the embeddings aside."""
    name = export.path.name
    if export.format == "embedding":
        return [], []
    if export.format == "kohya":
        files = ", ".join([name, *(path.name for path in export.side_files)])
        return [f"{files} into models/Lora"], [f"{name} into models/loras"]
    if export.path.suffix:
        return [f"{name} into models/Stable-diffusion"], [f"{name} into models/checkpoints"]
    return [f"nothing of the folder {name} (export to a .safetensors file for it)"], [f"the folder {name} into models/diffusers"]
