"""How fast and how large at real size? `python -m benchmarks.real_size --json PATH`

A random Stable Diffusion 1.5 (with `--sdxl` SDXL too) of full size is written as one fp16 file in the original layout, and eight
rank-8 adapters of it. Then, each in processes of its own so that its peak of memory counts alone, and the median of `--runs`:

- `read`: reading the file as a base whose weights are looked at only, as export, import and info do;
- `load`: loading it to compute with, in float32;
- `attach`: putting an adapter of eight concepts, joined by the plain sum, on it, the bands at hand;
- `prompt`, `regions`: drawing three of them in two steps of 256 pixels (SDXL: 512) by the prompt alone, and each confined to a
  column of its own; this, `attach` and `load` are left out where memory does not suffice;
- `fuse`, `fuse_aligned`: joining eight concepts down to the factors of every layer, by the plain and by the aligned sum;
- `export_kohya`: writing the fused adapter as a LoRA;
- `export_checkpoint`: writing the base with the fused adapter merged in as one file.

`seconds` are of the clock and `cpu_seconds` of the processor, which tell more where others compute too. `memory` is the peak
over what the program itself takes, divided by the checkpoint's size; what is mapped from the file counts although it can be given
back at any time (only Linux says this figure). The weights are random, so bands are random orthonormal directions instead of the
spectrum, whose computing takes long and is kept anyway.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from spectral_diffusion.adapters.adapter import Adapter, ConceptPart, LayerPart, input_group
from spectral_diffusion.adapters.adapter_file import load_adapter, save_adapter
from spectral_diffusion.adapters.attach import attached
from spectral_diffusion.adapters.fusion import fuse
from spectral_diffusion.bases.base import layer_key, load_base, read_base
from spectral_diffusion.bases.checkpoint import to_original_layout
from spectral_diffusion.bases.checkpoint.single_file import CONFIGURATIONS
from spectral_diffusion.bases.layer_names import ATTENTION_LAYERS
from spectral_diffusion.export import export_checkpoint, export_kohya
from spectral_diffusion.generation.drawing import Drawing
from spectral_diffusion.generation.generate import generate
from spectral_diffusion.generation.regions import suggest_regions
from spectral_diffusion.spectra.bands import Band
from spectral_diffusion.spectra.spectrum import Spectrum
from spectral_diffusion.training.activations import COLUMNS

CONCEPTS = 8
RANK = 8
LOADED = 3.2
"""Checkpoint sizes that loading takes at most: the fp16 file, mapped, and the weights in float32."""


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
        activations=random_activations(layers, generator),
    )
    return Adapter(family=family, fingerprint="", concepts=(concept,), weights=(1.0,))


def random_activations(layers: dict[str, LayerPart], generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Return factors of random Gram matrices for the inputs of `layers`, as large as measured ones."""
    widths = {input_group(key): part.shape[1] for key, part in layers.items()}
    return {group: torch.randn(width, COLUMNS, generator=generator) for group, width in widths.items()}


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
    before = _memory("VmRSS")
    result = work(*arguments)
    return result | {"peak_bytes": _memory("VmHWM") - before}


def _memory(field: str) -> float:
    """Return the bytes of this process's memory: `VmRSS` now, `VmHWM` at most since it was started."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return 1024.0 * int(line.split()[1])


@contextmanager
def timed(name: str, figures: dict[str, float]) -> Iterator[None]:
    """Put the seconds that the block takes into `figures`, by the clock and by the processor."""
    clock, processor = time.perf_counter(), time.process_time()
    yield
    figures[f"{name}_seconds"] = time.perf_counter() - clock
    figures[f"{name}_cpu_seconds"] = time.process_time() - processor


def read(checkpoint: Path) -> dict[str, float]:
    """Measure reading the checkpoint."""
    figures: dict[str, float] = {}
    with timed("read", figures):
        read_base(checkpoint)
    return figures


def load_and_attach(checkpoint: Path, adapter: Path) -> dict[str, float]:
    """Measure loading the checkpoint and putting the adapter on it."""
    figures: dict[str, float] = {}
    with timed("load", figures):
        base = load_base(checkpoint, device="cpu")
    loaded = replace(load_adapter(adapter), method="sum")
    with ExitStack() as stack:
        with timed("attach", figures):
            stack.enter_context(attached(base, loaded))
    return figures


def draw(checkpoint: Path, adapter: Path, side: int) -> dict[str, float]:
    """Measure drawing three concepts by the prompt alone and in regions, pictures `side` pixels wide."""
    figures: dict[str, float] = {}
    base = load_base(checkpoint, device="cpu")
    loaded = replace(load_adapter(adapter), method="sum")
    plain = Drawing(prompt="<V0>, <V1> and <V2> near a lake", steps=2, size=(side, side))
    regions = suggest_regions(plain.prompt, loaded.class_words)
    for name, drawing in {"warm": plain, "prompt": plain, "regions": replace(plain, regions=regions)}.items():
        with timed(name, figures):
            generate(base, drawing, loaded)
    return {name: value for name, value in figures.items() if not name.startswith("warm")}


def fuse_and_export(files: list[Path], folder: Path) -> dict[str, float]:
    """Measure fusing the adapters in `files` and writing the result as a kohya LoRA into `folder`."""
    figures: dict[str, float] = {}
    adapters = [load_adapter(file) for file in files]
    for name, method in (("fuse", "sum"), ("fuse_aligned", "aligned")):
        with timed(name, figures):
            fused = fuse(adapters, method=method)
            fused.deltas()
    with timed("export_kohya", figures):
        export = export_kohya(fuse(adapters, method="sum"), folder / "lora.safetensors", overwrite=True)
    save_adapter(fused, folder / "fused.safetensors")
    return figures | {"lora_bytes": export.path.stat().st_size}


def merge(checkpoint: Path, adapter: Path, folder: Path) -> dict[str, float]:
    """Measure writing the checkpoint with the adapter merged in."""
    figures: dict[str, float] = {}
    loaded = replace(load_adapter(adapter), method="sum")
    with timed("export_checkpoint", figures):
        export_checkpoint(loaded, read_base(checkpoint), folder / "merged.safetensors", overwrite=True)
    (folder / "merged.safetensors").unlink()
    return figures


def measure(family: str, folder: Path, runs: int) -> dict[str, float]:
    """Return all figures of `family`, medians over `runs`."""
    checkpoint = folder / "checkpoint.safetensors"
    multiprocessing.get_context("spawn").Pool(1).apply(write_checkpoint, (family, checkpoint))
    files = [folder / f"{number}.safetensors" for number in range(CONCEPTS)]
    for number, file in enumerate(files):
        save_adapter(random_concept(family, number), file)
    sizes = {"checkpoint_bytes": checkpoint.stat().st_size, "adapter_bytes": files[0].stat().st_size}
    works = {
        "fuse_and_export": (fuse_and_export, files, folder),
        "read": (read, checkpoint),
        "load_and_attach": (load_and_attach, checkpoint, folder / "fused.safetensors"),
        "draw": (draw, checkpoint, folder / "fused.safetensors", 512 if family == "sdxl" else 256),
        "merge": (merge, checkpoint, folder / "fused.safetensors", folder),
    }
    if psutil.virtual_memory().available < LOADED * sizes["checkpoint_bytes"]:
        del works["load_and_attach"], works["draw"]
    seen: dict[str, list[float]] = {}
    for _ in range(runs):
        for name, work in works.items():
            figures = measured(*work)
            figures[f"memory_{name}"] = figures.pop("peak_bytes") / sizes["checkpoint_bytes"]
            for figure, value in figures.items():
                seen.setdefault(figure, []).append(value)
    return sizes | {figure: round(median(values), 2) for figure, values in seen.items()}


def main() -> None:
    """Measure and write the JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.real_size", description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="file for the result")
    parser.add_argument("--runs", type=int, default=3, help="each figure is the median of so many (default: %(default)s)")
    parser.add_argument("--sdxl", action="store_true", help="measure SDXL too (7 GB on the disk)")
    options = parser.parse_args()
    result: dict[str, Any] = {"cores": os.cpu_count(), "threads": torch.get_num_threads()}
    for family in ("sd1", "sdxl") if options.sdxl else ("sd1",):
        with tempfile.TemporaryDirectory(dir=options.json.parent) as folder:
            result[family] = measure(family, Path(folder), options.runs)
    options.json.write_text(json.dumps(result, indent=2), encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
