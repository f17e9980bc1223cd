"""Any CLIP that open_clip loads, as a measure of how well pictures fit texts and other pictures."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from spectral_diffusion.errors import BaseError
from spectral_diffusion.stages import counted

DEFAULT_CLIP = Path(__file__).resolve().parents[2] / "assets" / "clip"
_CONFIG_NAME = "open_clip_config.json"
_WEIGHT_NAMES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
logger = logging.getLogger(__name__)

_BATCH = 16


class ClipScorer:
    """A CLIP with its preprocessing and tokenizer. `name` says which one, for reports.

    All scores are plain cosines. CLIPScore (Hessel et al., 2021) is `2.5 * max(cosine, 0)` with the prompt written
    after 'A photo depicts', so published text scores near 0.7 carry that factor and those near 0.3 do not.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        preprocess: Callable[[Image.Image], torch.Tensor],
        tokenizer: Callable[[Sequence[str]], torch.Tensor],
        *,
        name: str,
        device: torch.device | str = "cpu",
    ):
        self.name = name
        self.device = torch.device(device)
        self.model = model.to(self.device).eval().requires_grad_(False)
        self._preprocess, self._tokenizer = preprocess, tokenizer

    @torch.no_grad()
    def embed_images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Return one unit vector per picture, `(n, d)`."""
        parts = []
        for start in counted("CLIP", "batch", range(0, len(images), _BATCH)):
            tensors = [self._preprocess(image.convert("RGB")) for image in images[start : start + _BATCH]]
            parts.append(self.model.encode_image(torch.stack(tensors).to(self.device), normalize=True).float())
        return torch.cat(parts)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Return one unit vector per text, `(n, d)`; texts longer than the CLIP's context are cut off."""
        parts = []
        for start in range(0, len(texts), _BATCH):
            ids = self._tokenizer(list(texts[start : start + _BATCH])).to(self.device)
            parts.append(self.model.encode_text(ids, normalize=True).float())
        return torch.cat(parts)

    def text_alignment(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        """Return the cosine of each picture to its own prompt: plain, without CLIPScore's factor 2.5 and prefix.

        Args:
            images: the pictures.
            prompts: one per picture, tokens already replaced by words that CLIP knows.

        Raises:
            ValueError: there are not as many prompts as pictures.
        """
        if len(images) != len(prompts):
            raise ValueError(f"text_alignment needs one prompt per picture, got {len(images)} and {len(prompts)}.")
        if not images:
            return []
        return (self.embed_images(images) * self.embed_texts(prompts)).sum(dim=1).tolist()

    def image_alignment(self, images: Sequence[Image.Image], references: Sequence[Image.Image]) -> list[float]:
        """Return, for each picture, its mean cosine to all reference pictures (plain cosines; CLIP-I of DreamBooth).

        Raises:
            ValueError: there are no reference pictures.
        """
        if not references:
            raise ValueError("image_alignment needs at least one reference picture.")
        if not images:
            return []
        return (self.embed_images(images) @ self.embed_images(references).T).mean(dim=1).tolist()


def load_scorer(model: str | Path | None = None, *, device: torch.device | str = "cpu") -> ClipScorer:
    """Load a CLIP with open_clip, from this computer only: nothing is ever downloaded.

    Args:
        model: None for the CLIP that ships with the project (it knows the toy world only); a folder with
            `open_clip_config.json` and weights, or the weights file in it; or an open_clip name and its weights, a file
            or a tag that is in the cache: `ViT-B-32:/path/to/weights.safetensors`, `ViT-B-32:laion2b_s34b_b79k`,
            `ViT-B-32/openai`.
        device: where it runs.

    Raises:
        BaseError: it is not there or cannot be read; the message says what to download and where to put it.
    """
    folder = _local_folder(DEFAULT_CLIP if model is None else model)
    if folder is not None:
        return _load(f"local-dir:{folder}", None, {}, "embedded" if model is None else str(model), device)
    architecture, weights = _split_name(str(model))
    if Path(weights).is_file():
        file, settings = Path(weights), _shared_preprocessing(architecture)
    else:
        file, settings = _cached_weights(architecture, weights)
    return _load(architecture, file, settings, f"{architecture}:{weights}", device)


def _local_folder(model: str | Path) -> Path | None:
    """Return the folder meant by a path, None for an open_clip name."""
    path = Path(model)
    folder = path.parent if path.is_file() else path
    if (folder / _CONFIG_NAME).is_file():
        return folder
    if path.is_file():
        raise BaseError(f"'{path}' has no '{_CONFIG_NAME}' beside it; put it there, or name the architecture: 'ViT-B-32:{path}'.")
    if path.is_dir():
        raise BaseError(f"'{path}' has no '{_CONFIG_NAME}'; give a folder with a CLIP in open_clip's form.")
    if isinstance(model, Path):
        raise BaseError(f"There is no CLIP at '{path}'; restore the folder or give another CLIP.")
    return None


def _split_name(name: str) -> tuple[str, str]:
    """Split 'ViT-B-32:openai' or 'ViT-B-32/openai' and check both halves."""
    import open_clip

    architecture, _, weights = name.partition(":" if ":" in name else "/")
    if architecture not in open_clip.list_models():
        raise BaseError(
            f"'{name}' is neither a folder with a CLIP nor an open_clip name; give a folder that exists, or an "
            "architecture and its weights as in 'ViT-B-32:openai'."
        )
    known = open_clip.list_pretrained_tags_by_model(architecture)
    if weights not in known and not Path(weights).is_file():
        listed = f"or one of: {', '.join(known)}" if known else f"as in '{architecture}:FILE'"
        raise BaseError(f"CLIP '{architecture}' has no weights '{weights}'; give a weights file, {listed}.")
    return architecture, weights


def _cached_weights(architecture: str, tag: str) -> tuple[Path, dict[str, Any]]:
    """Return the cached weights file of a tag, and what its CLIP needs besides (activation, preprocessing)."""
    import open_clip

    source = open_clip.get_pretrained_cfg(architecture, tag)
    file = _cached_file(source)
    if file is None:
        repository = source.get("hf_hub", "").rstrip("/")
        remedy = f"run 'hf download {repository}' with a network" if repository else f"download {source.get('url')}"
        quick = source.get("quick_gelu", False) and not architecture.endswith("-quickgelu")
        raise BaseError(
            f"The weights of CLIP '{architecture}:{tag}' are not on this computer; {remedy}, or put the weights file "
            f"anywhere and give '{architecture}{'-quickgelu' if quick else ''}:FILE' with its path."
        )
    activation = {"force_quick_gelu": source["quick_gelu"]} if "quick_gelu" in source else {}
    return file, _preprocessing(source) | activation


def _preprocessing(source: Mapping[str, Any]) -> dict[str, Any]:
    """Return how published weights want pictures, as open_clip takes it."""
    renamed = {key: f"image_{key}" for key in ("mean", "std", "interpolation", "resize_mode")}
    return {argument: source[key] for key, argument in renamed.items() if key in source}


def _shared_preprocessing(architecture: str) -> dict[str, Any]:
    """Return how all published weights of an architecture want pictures, for a file of which nothing else is known."""
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(architecture)
    wanted = [_preprocessing(open_clip.get_pretrained_cfg(architecture, tag)) for tag in tags]
    if any(other != wanted[0] for other in wanted):
        logger.warning(
            "Weights of CLIP '%s' want pictures in different ways, OpenAI's is taken; a folder with %s says its own.",
            architecture,
            _CONFIG_NAME,
        )
        return {}
    return wanted[0] if wanted else {}


def _cached_file(source: Mapping[str, Any]) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    repository, _, file_name = source.get("hf_hub", "").rpartition("/")
    for name in (file_name,) if file_name else _WEIGHT_NAMES:
        found = try_to_load_from_cache(repository, name) if repository else None
        if isinstance(found, str):
            return Path(found)
    beside = Path.home() / ".cache" / "clip" / Path(source.get("url", "")).name
    return beside if beside.is_file() else None


def _load(
    architecture: str, weights: Path | None, settings: Mapping[str, Any], name: str, device: torch.device | str
) -> ClipScorer:
    import open_clip

    try:
        with _quiet_root_logger():
            model, preprocess = open_clip.create_model_from_pretrained(
                architecture, None if weights is None else str(weights), **settings
            )
            # Only an architecture that names a tokenizer asks the hub; open_clip's own tokenizer takes no such option.
            text_config = open_clip.get_model_config(architecture)["text_cfg"]
            options = {"local_files_only": True} if text_config.get("hf_tokenizer_name") else {}
            tokenizer = open_clip.get_tokenizer(architecture, **options)
    except Exception as error:  # open_clip, torch and the hub raise all kinds; the user needs the same remedy for all
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")[:200]
        raise BaseError(f"The CLIP '{name}' cannot be read ({reason}); restore its files.") from error
    return ClipScorer(model, preprocess, tokenizer, name=name, device=device)


@contextlib.contextmanager
def _quiet_root_logger() -> Iterator[None]:
    """Keep open_clip from setting up logging for the whole program: it logs through the root logger."""
    root, handler = logging.getLogger(), logging.NullHandler()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
