"""How fast and how large at real size? `python -m benchmarks.real_size --json PATH`

A random Stable Diffusion 1.5 (with `--sdxl` SDXL too) of full size is written as one fp16 file in the original layout, and then,
each in a process of its own so that its peak of memory counts alone:

- `open`: loading the file as a base;
- `attach`: putting a fused adapter of eight concepts on it, the bands at hand;
- `fuse`: joining eight rank-8 concepts read from their files, by the plain sum, down to the factors of every layer;
- `export`: writing the fused adapter as a kohya LoRA.

`memory` is the peak over what the program itself takes, divided by the checkpoint's size. The weights are random, so bands are
random orthonormal directions instead of the spectrum, whose computing takes long and is kept anyway.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from spectral_diffusion.adapter import Adapter, ConceptPart, LayerPart
from spectral_diffusion.adapter_file import load_adapter, save_adapter
from spectral_diffusion.attach import attached
from spectral_diffusion.bands import Band
from spectral_diffusion.base import ATTENTION_LAYERS, layer_key, load_base
from spectral_diffusion.checkpoint import to_original_layout
from spectral_diffusion.checkpoint.single_file import CONFIGURATIONS
from spectral_diffusion.export import export_kohya
from spectral_diffusion.fusion import fuse
from spectral_diffusion.spectrum import Spectrum

CONCEPTS = 8
RANK = 8


def empty_models(family: str) -> dict[str, nn.Module]:
    """Return the models of a real base of `family`, by part, without memory for their weights."""
    folder = CONFIGURATIONS / family
    with init_empty_weights(include_buffers=True):
        models: dict[str, nn.Module] = {
            "unet": UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet")),
            "vae": AutoencoderKL.from_config(AutoencoderKL.load_config(folder / "vae")),
            "text_encoder": CLIPTextModel(CLIPTextConfig.from_pretrained(folder / "text_encoder")),
        }
        if family == "sdxl":
            second = CLIPTextConfig.from_pretrained(folder / "text_encoder_2")
            models["text_encoder_2"] = CLIPTextModelWithProjection(second)
    return models


def write_checkpoint(family: str, path: Path) -> None:
    """Write a random base of `family` at full size, in fp16 and the original layout."""
    generator = torch.Generator().manual_seed(0)
    models = empty_models(family)
    for model in models.values():
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        state = {name: 0.02 * torch.randn(shape, generator=generator).half() for name, shape in shapes.items()}
        model.load_state_dict(state, assign=True, strict=False)
    nothing = {name: None for name in ("tokenizer", "scheduler")}
    if family == "sdxl":
        pipeline = StableDiffusionXLPipeline(**models, **nothing, tokenizer_2=None, add_watermarker=False)
    else:
        options = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipeline = StableDiffusionPipeline(**models, **nothing, **options)
    save_file(to_original_layout(pipeline), path)


def random_concept(family: str, number: int) -> Adapter:
    """Return a trained-looking rank-8 concept on all attention layers of a real base of `family`."""
    generator = torch.Generator().manual_seed(number)
    layers, widths = {}, {}
    for part, model in empty_models(family).items():
        widths[part] = getattr(model.config, "hidden_size", 0)
        for path, module in model.named_modules():
            chosen = part != "vae" and any(f".{path}".endswith(f".{ending}") for ending in ATTENTION_LAYERS)
            if chosen and isinstance(module, nn.Linear):
                layers[layer_key(part, path)] = random_layer(module.out_features, module.in_features, generator)
    concept = ConceptPart(
        token=f"<V{number}>",
        class_word="dog",
        band=Band(start=number * RANK, rank=RANK),
        parametrisation="additive",
        embeddings={part: torch.randn(1, width, generator=generator) for part, width in widths.items() if "text" in part},
        layers=layers,
    )
    return Adapter(family=family, fingerprint="", concepts=(concept,), weights=(1.0,))


def random_layer(out_side: int, in_side: int, generator: torch.Generator) -> LayerPart:
    U, V = (torch.linalg.qr(torch.randn(side, RANK, generator=generator)).Q for side in (out_side, in_side))
    A, B = (0.01 * torch.randn(side, RANK, generator=generator) for side in (out_side, in_side))
    s, c = (torch.rand(RANK, generator=generator) for _ in range(2))
    return LayerPart(band=Spectrum(U=U, s=s, V=V), tensors={"A": A, "B": B, "c": c})


def measured(work: Callable[..., Any], *arguments: Any) -> dict[str, float]:
    """Run `work` in a fresh process; return what it measured, with its peak of memory over the start in bytes."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_with_peak, (work, *arguments))


def _with_peak(work: Callable[..., dict[str, float]], *arguments: Any) -> dict[str, float]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = work(*arguments)
    return result | {"peak_bytes": 1024.0 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)}


def seconds_of(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = work()
    return round(time.perf_counter() - started, 2), result


def open_and_attach(checkpoint: Path, adapter: Path) -> dict[str, float]:
    """Measure opening the checkpoint and putting the adapter on it."""
    opening, base = seconds_of(lambda: load_base(checkpoint, device="cpu"))
    loaded = load_adapter(adapter)
    started = time.perf_counter()
    with attached(base, loaded):
        attaching = round(time.perf_counter() - started, 2)
    return {"open_seconds": opening, "attach_seconds": attaching}


def fuse_and_export(files: list[Path], folder: Path) -> dict[str, float]:
    """Measure fusing the adapters in `files` and writing the result as a kohya LoRA into `folder`."""
    adapters = [load_adapter(file) for file in files]

    def fused_factors() -> Adapter:
        fused = fuse(adapters, method="sum")
        fused.deltas()
        return fused

    fusing, fused = seconds_of(fused_factors)
    exporting, export = seconds_of(lambda: export_kohya(fused, folder / "lora.safetensors"))
    save_adapter(fused, folder / "fused.safetensors")
    return {"fuse_seconds": fusing, "export_seconds": exporting, "lora_bytes": export.path.stat().st_size}


def measure(family: str, folder: Path) -> dict[str, float]:
    """Return all figures of `family`."""
    checkpoint = folder / "checkpoint.safetensors"
    write_checkpoint(family, checkpoint)
    files = [folder / f"{number}.safetensors" for number in range(CONCEPTS)]
    for number, file in enumerate(files):
        save_adapter(random_concept(family, number), file)
    figures = {"checkpoint_bytes": checkpoint.stat().st_size, "adapter_bytes": files[0].stat().st_size}
    joined = measured(fuse_and_export, files, folder)
    figures |= {name: value for name, value in joined.items() if name != "peak_bytes"}
    figures["fuse_and_export_peak_bytes"] = joined["peak_bytes"]
    opened = measured(open_and_attach, checkpoint, folder / "fused.safetensors")
    figures |= {name: value for name, value in opened.items() if name != "peak_bytes"}
    return figures | {"memory": round(opened["peak_bytes"] / figures["checkpoint_bytes"], 2)}


def main() -> None:
    """Measure and write the JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.real_size", description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="file for the result")
    parser.add_argument("--sdxl", action="store_true", help="measure SDXL too (7 GB on the disk)")
    options = parser.parse_args()
    result: dict[str, Any] = {"cores": os.cpu_count(), "threads": torch.get_num_threads()}
    for family in ("sd1", "sdxl") if options.sdxl else ("sd1",):
        with tempfile.TemporaryDirectory(dir=options.json.parent) as folder:
            result[family] = measure(family, Path(folder))
    options.json.write_text(json.dumps(result, indent=2), encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
