"""Import of an ordinary LoRA: kohya's, diffusers' or PEFT's file becomes an adapter of one concept without a band."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from spectral_diffusion.adapters.adapter import Adapter, ConceptPart, LayerPart
from spectral_diffusion.adapters.attach import check_fits_base
from spectral_diffusion.bases.base import Base
from spectral_diffusion.bases.layer_names import PEFT_START, layer_key_of, patch_side
from spectral_diffusion.concepts.concept import check_class_word, check_token
from spectral_diffusion.errors import FamilyError, InputError
from spectral_diffusion.imports.tensors import peft_scales, read_embedding, read_tensors, refuse_what_is_no_lora
from spectral_diffusion.joining import LowRank

logger = logging.getLogger(__name__)

_ENDINGS = {
    ".alpha": "alpha",
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
}
"""How the names of a module's tensors end in kohya's, PEFT's and diffusers' files, and what they are."""

_FAMILY_OF_TEXT_WIDTH = {768: "sd1", 1024: "sd2", 2048: "sdxl"}
"""By the width of what cross-attention reads; no released base is as narrow as the embedded one."""
_ONLY_IN_SDXL = re.compile(
    r"(input|output)_blocks|middle_block|label_emb|add_embedding|lora_te[12]_|text_encoder_2|transformer_blocks[._][1-9]"
)
"""What stands in a module's name in files for SDXL alone."""
_METADATA = ("ss_base_model_version", "modelspec.architecture")
_FAMILY_OF_METADATA = {
    "sdxl": "sdxl",
    "stable-diffusion-xl": "sdxl",
    "sd_v2": "sd2",
    "sd_2": "sd2",
    "stable-diffusion-v2": "sd2",
    "sd_v1": "sd1",
    "sd_1": "sd1",
    "stable-diffusion-v1": "sd1",
}
"""How these fields begin, in files of kohya's scripts and of ai-toolkit, and what they mean."""
_EMBEDDING_WIDTHS = {
    "sd1": {"text_encoder": 768},
    "sd2": {"text_encoder": 1024},
    "sdxl": {"text_encoder": 768, "text_encoder_2": 1280},
}


def import_lora(path: Path, *, token: str, class_word: str, embedding: Path | None = None, base: Base | None = None) -> Adapter:
    """Return the LoRA in the file `path` as an adapter of one concept, called `token`.

    Args:
        class_word: what the concept is, or all the words that call it; without an embedding the token stands for them.
        embedding: the file of the embedding that was trained with the LoRA.
        base: one that the LoRA must fit; without it the family is told from the shapes, the names or the metadata.

    Raises:
        InputError: a file is damaged, not what it should be, or a kind of LoRA that is not supported; or a word is none; or
            nothing tells the family.
        AdapterError: it does not fit `base`.
    """
    check_token(token)
    check_class_word(class_word)
    tensors, metadata = read_tensors(path)
    refuse_what_is_no_lora(path, set(tensors), metadata)
    modules = _modules(path, tensors)
    configuration = peft_scales(path, tensors, metadata)
    if not configuration and any(name.startswith(PEFT_START) and "alpha" not in parts for name, parts in modules.items()):
        logger.warning(
            "'%s' does not say by what its change is scaled, 1 is taken; PEFT's adapter_config.json says it: copy that here.",
            path,
        )
    layers: dict[str, LayerPart] = {}
    for name, parts in modules.items():
        key = layer_key_of(name) or layer_key_of(f"unet.{name}")  # a UNet that is saved by itself does not say what it is
        if key is None:
            raise InputError(
                f"'{path}' changes '{name}', which is no layer of Stable Diffusion 1, 2 or XL that LoRAs are known to change; "
                "give a plain LoRA for one of these."
            )
        if key in layers:
            raise InputError(f"'{path}' changes layer '{key}' twice, under two names; it cannot be used.")
        layers[key] = _layer(path, name, key, parts, configuration)
    family = _family(layers, modules, base) or _family_of_metadata(path, metadata)
    vectors = read_embedding(embedding) if embedding else {}
    if embedding:
        _check_embedding(embedding, vectors, family)
    concept = ConceptPart(
        token=token,
        class_word=class_word,
        band=None,
        parametrisation="lora",
        embeddings=vectors,
        layers=layers,
        settings={"imported": path.name},
    )
    predicted = base.prediction_type if base is not None else ""
    adapter = Adapter(family=family, fingerprint="", prediction_type=predicted, concepts=(concept,), weights=(1.0,))
    if base is not None:
        check_fits_base(base, adapter)
    return adapter


def _modules(path: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """Return the tensors by module and by what they are: `up`, `down`, `alpha`."""
    modules: dict[str, dict[str, torch.Tensor]] = {}
    bundled = {name.split(".")[1] for name in tensors if name.startswith("bundle_emb.")}
    if bundled:
        logger.warning(
            "'%s' holds embeddings (%s), which are not read; give the embedding's own file as --embedding.",
            path,
            ", ".join(sorted(bundled)),
        )
    for name, tensor in tensors.items():
        if name.startswith("bundle_emb."):
            continue
        ending = next((ending for ending in _ENDINGS if name.endswith(ending)), None)
        if ending is None:
            raise InputError(f"'{path}' is not a LoRA that is known: it holds '{name}'.")
        is_number = not tensor.is_complex() if _ENDINGS[ending] == "alpha" else tensor.is_floating_point()  # some write integers
        if not is_number or not torch.isfinite(tensor.float()).all():
            raise InputError(f"'{name}' in '{path}' holds NaN, infinite or no floating-point numbers; it cannot be used.")
        modules.setdefault(name.removesuffix(ending), {})[_ENDINGS[ending]] = tensor.float()
    if not modules:
        raise InputError(f"'{path}' holds no LoRA.")
    return modules


def _layer(path: Path, name: str, key: str, parts: Mapping[str, torch.Tensor], configuration: Mapping[str, Any]) -> LayerPart:
    if not {"up", "down"} <= parts.keys():
        raise InputError(f"'{name}' in '{path}' lacks its up or its down matrix; copy the file again.")
    up, down = _up_matrix(parts["up"]), _down_matrix(parts["down"], key)
    if up.ndim != 2 or down.ndim != 2 or up.shape[1] != len(down) or not up.numel() or not down.numel():
        raise InputError(
            f"'{name}' in '{path}' has matrices of shape {tuple(up.shape)} and {tuple(down.shape)}, "
            "expected (out, rank) and (rank, in); it is damaged or no plain LoRA."
        )
    if "alpha" in parts and parts["alpha"].numel() != 1:
        raise InputError(f"The alpha of '{name}' in '{path}' is not one number; copy the file again.")
    rank = len(down)
    scale = parts["alpha"].item() / rank if "alpha" in parts else _peft_scale(path, key, rank, configuration)
    change = LowRank(up=scale * up, down=down.T).balanced()
    if not all(torch.isfinite(factor).all() for factor in (change.up, change.down)):
        raise InputError(f"'{name}' in '{path}' comes out as NaN or infinite numbers, by its alpha; it cannot be used.")
    return LayerPart(band=None, tensors={"up": change.up.contiguous(), "down": change.down.contiguous()})


def _up_matrix(tensor: torch.Tensor) -> torch.Tensor:
    """Return a convolution of one pixel as the matrix that it is; anything else as it stands."""
    return tensor[:, :, 0, 0] if tensor.ndim == 4 and tensor.shape[2:] == (1, 1) else tensor


def _down_matrix(tensor: torch.Tensor, key: str) -> torch.Tensor:
    """Return the kernels of layer `key`, of three pixels a side or one, as the matrix that they are; others as they stand."""
    side = patch_side(key, "") or 1
    return tensor.flatten(1) if tensor.ndim == 4 and tensor.shape[2:] == (side, side) else tensor


def _peft_scale(path: Path, key: str, rank: int, configuration: Mapping[str, Any]) -> float:
    """Return what PEFT multiplies a module without an alpha of its own by: 1, or what its configuration says."""
    part, _, layer = key.partition(".")
    prefix = f"{part}." if f"{part}.lora_alpha" in configuration else ""
    if f"{prefix}lora_alpha" not in configuration:
        return 1.0
    if configuration.get(f"{prefix}use_dora"):
        raise InputError(f"'{path}' is a DoRA, which is not supported; give a plain LoRA.")
    patterns = configuration.get(f"{prefix}alpha_pattern") or {}
    try:
        own = (alpha for pattern, alpha in patterns.items() if _means(pattern, layer))
        alpha = float(next(own, configuration[f"{prefix}lora_alpha"]))
    except (AttributeError, TypeError, ValueError, re.error) as error:
        raise InputError(f"The configuration of the LoRA '{path}' is damaged ({error}); copy it again.") from error
    return alpha / (rank**0.5 if configuration.get(f"{prefix}use_rslora") else rank)


def _means(pattern: str, layer: str) -> bool:
    """Tell whether `pattern`, to PEFT a regular expression for a name's end, means `layer`, with `text_model.` or without."""
    return any(re.match(rf"(.*\.)?({pattern})$", name) for name in (layer, f"text_model.{layer}"))


def _family(layers: Mapping[str, LayerPart], names: Collection[str], base: Base | None) -> str | None:
    """Return the family whose cross-attention is as wide as that of `layers`, or whose modules have such `names`, or whose text
    encoder is as wide, or else `base`'s; None where nothing tells it."""
    reading_text = [part for key, part in layers.items() if key.endswith((".attn2.to_k", ".attn2.to_v"))]
    encoding_text = [part for key, part in layers.items() if key.startswith("text_encoder.") and "q_proj" in key]
    if not reading_text and any(map(_ONLY_IN_SDXL.search, names)):
        return "sdxl"
    widths = [part.shape[1] for part in (*reading_text, *encoding_text)]
    of_other_widths = base.family if base is not None else "mini" if widths else None
    return _FAMILY_OF_TEXT_WIDTH.get(widths[0], of_other_widths) if widths else of_other_widths


def _family_of_metadata(path: Path, metadata: Mapping[str, str]) -> str:
    said = [metadata.get(field, "").lower() for field in _METADATA]
    found = next((family for begin, family in _FAMILY_OF_METADATA.items() if any(one.startswith(begin) for one in said)), None)
    if found is None:
        raise FamilyError(f"Nothing in '{path}' tells which Stable Diffusion it was made for; give that one as --base.")
    return found


def _check_embedding(path: Path, vectors: Mapping[str, torch.Tensor], family: str) -> None:
    widths = {part: tensor.shape[1] for part, tensor in vectors.items()}
    expected = _EMBEDDING_WIDTHS.get(family, widths)
    if widths != expected:
        raise InputError(
            f"The embedding '{path}' is {' and '.join(map(str, widths.values()))} wide, a LoRA of family '{family}' needs "
            f"{' and '.join(map(str, expected.values()))}; give the one that was trained with it."
        )
