"""Tell what a checkpoint file is from its tensors' names and shapes, whatever it is called."""

from __future__ import annotations

import logging
import re

from spectral_diffusion.bases.checkpoint.checkpoint_file import Checkpoint
from spectral_diffusion.errors import BaseError

logger = logging.getLogger(__name__)

PREDICTION_TYPES = ("epsilon", "v_prediction")
"""What a base may have been trained to predict: the noise, or the velocity."""

_OTHER_KINDS = (
    (r"\d+/(layers|embeddings?)/.*", "an adapter of this program; give it where adapters go, and as --base its checkpoint"),
    (r"(.*[._])?(lora_(up|down|A|B|te|te1|te2|unet)|hada_w1_a|lokr_w1)([._].*)?", "a LoRA; give the checkpoint that it is for"),
    (r"emb_params|clip_l|clip_g|string_to_param.*", "a token embedding; give the checkpoint that it is for"),
    (r"(control_model|controlnet_cond_embedding|input_hint_block)\..*", "a ControlNet; give the checkpoint that it is for"),
    (r"(model\.diffusion_model\.)?joint_blocks\..*", "a Stable Diffusion 3 checkpoint; give one of Stable Diffusion 1, 2 or XL"),
    (r"(model\.diffusion_model\.)?double_blocks\..*", "a Flux checkpoint; give one of Stable Diffusion 1, 2 or XL"),
    (r"edm_mean|edm_vpred\.sigma_max", "an SDXL checkpoint for another noise schedule (EDM); give one of the plain kind"),
    (r"embedder\.model\.visual\..*", "an unCLIP checkpoint, which draws from pictures; give a plain text-to-image one"),
)
_SINGLE_PARTS = (
    (r"(input_blocks|down_blocks|mid_block)\..*", "a UNet alone"),
    (r"(first_stage_model\.)?(encoder|decoder|quant_conv|post_quant_conv)\..*", "an autoencoder (VAE) alone"),
    (r"(cond_stage_model\.|transformer\.)?(text_model|model\.transformer|transformer\.resblocks)\..*", "a text encoder alone"),
)
_CHANNELS = {
    5: "a depth-to-image checkpoint",
    7: "an upscaler",
    8: "an instruct-pix2pix checkpoint",
    9: "an inpainting checkpoint",
}
_UNET = "model.diffusion_model."
_FIRST = f"{_UNET}input_blocks.0.0.weight"
_TELLS_VELOCITY = f"{_UNET}output_blocks.11.1.transformer_blocks.0.norm1.bias"


def family_of_checkpoint(checkpoint: Checkpoint) -> str:
    """Return `sd1`, `sd2` or `sdxl`.

    Raises:
        BaseError: the file is something else, or lacks a part; the message says what it is and what to give.
    """
    names = checkpoint.tensors.keys()
    for pattern, what in _OTHER_KINDS:
        if _any(pattern, names):
            raise BaseError(f"'{checkpoint.path}' is {what}.")
    if _FIRST not in names:
        what = next((what for pattern, what in _SINGLE_PARTS if _any(pattern, names)), "no checkpoint known here")
        raise BaseError(f"'{checkpoint.path}' is {what}; give a whole Stable Diffusion 1, 2 or XL checkpoint as --base.")
    check_channels(str(checkpoint.path), checkpoint.tensors[_FIRST].shape[1])
    if not _any(r"first_stage_model\..*", names):
        raise BaseError(f"'{checkpoint.path}' lacks its autoencoder (VAE); give the checkpoint that has it baked in.")
    if _any(r"conditioner\.embedders\.1\.model\..*", names):
        return "sdxl"
    if _any(r"conditioner\.embedders\.0\.model\..*", names):
        raise BaseError(f"'{checkpoint.path}' is the SDXL refiner; give the SDXL base.")
    if _any(r"cond_stage_model\.model\..*", names):
        return "sd2"
    if _any(r"cond_stage_model\.transformer\..*", names):
        return "sd1"
    raise BaseError(f"'{checkpoint.path}' lacks its text encoder; give the whole checkpoint.")


def check_channels(source: str, channels: int, latent: int = 4) -> None:
    """Raise `BaseError` when a UNet reads more `channels` than a picture's `latent` ones: it is no plain text-to-image one."""
    if channels != latent:
        what = _CHANNELS.get(channels, f"a checkpoint whose UNet reads {channels} channels")
        raise BaseError(f"'{source}' is {what}; give a plain text-to-image one.")


def _any(pattern: str, names: object) -> bool:
    return any(re.fullmatch(pattern, name) for name in names)


def prediction_type_of(checkpoint: Checkpoint, family: str) -> str:
    """Return which of `PREDICTION_TYPES` the checkpoint says it makes: in its metadata, or by a tensor `v_pred`.

    SD2 files often say neither; then the spread of one bias tells the released kinds apart, as ComfyUI does it.
    """
    metadata = checkpoint.metadata
    said = metadata.get("modelspec.prediction_type", "").lower()
    if "v_pred" in checkpoint.tensors or said.startswith("v") or metadata.get("ss_v_parameterization", "").lower() == "true":
        return "v_prediction"
    if said.startswith("eps"):
        return "epsilon"
    architecture = metadata.get("modelspec.architecture", "")
    if "-v2-768-v" in architecture:
        return "v_prediction"
    if family != "sd2" or "-v2-512" in architecture or _TELLS_VELOCITY not in checkpoint.tensors:
        return "epsilon"
    spread = checkpoint.tensors[_TELLS_VELOCITY].float().std(correction=0)
    told = "v_prediction" if spread > 0.09 else "epsilon"
    logger.warning(
        "'%s' does not say what it predicts and is taken for %s; give --prediction-type if it draws noise.", checkpoint.path, told
    )
    return told
