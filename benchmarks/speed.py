"""How fast is a step, and what does it keep in memory? `python -m benchmarks.speed --json PATH`

The UNet and text encoder of SD1.5 at their true size (`--width 0.5`: half the channels), random weights: time and memory do not
depend on the values. On the same layers, interleaved round by round in one process, medians:

- `additive`, `rotational`: the product's own step; `peft_lora`: LoRA through PEFT with as many numbers as the additive form;
- `dense`: the additive form as published, the weight built anew in every forward pass;
- `dreambooth_lora`: the step of diffusers' example (rank as given, text encoder frozen); `frozen`: the base alone, the floor.

`kept_bytes` is what a forward pass keeps for the backward pass, counted tensor by tensor, so without noise; on a GPU
`peak_bytes` is the allocator's peak of a whole step. Seconds are of the clock on a GPU, else of all cores together.

Also measured: several concepts in one pass over one after the other, how much of the rate of a large matrix product the additive
step reaches, a UNet pass with eight concepts folded in over the bare one, the folding itself (attaching, or switching
strengths), and the spectrum of all adapted layers.

Without a GPU: 256 pixels, batch 1, rank 8. With one: 512 pixels, bfloat16, batch 1, 4, 8, rank 4, 8, 32, each without and with
gradient checkpointing.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel

from benchmarks.step_methods import METHODS, Method, Models, spectral
from spectral_diffusion.adapters.attach import folded
from spectral_diffusion.bases.base import ATTENTION_LAYERS, layer_key
from spectral_diffusion.bases.checkpoint.single_file import CONFIGURATIONS
from spectral_diffusion.joining import LowRank
from spectral_diffusion.spectra.spectrum import spectra
from spectral_diffusion.training.memory import checkpointing

CONCEPTS = 4
"""Concepts that are trained together."""
LARGE = {"cpu": 2048, "cuda": 8192}
"""Side of the matrices by whose product a device's rate is measured."""


def random_models(width: float, device: torch.device, dtype: torch.dtype) -> Models:
    """Return random models of SD1.5, their channels times `width`."""
    text = CLIPTextConfig.from_pretrained(CONFIGURATIONS / "sd1" / "text_encoder")
    heads = round(text.num_attention_heads * width)
    text.hidden_size, text.intermediate_size, text.num_attention_heads = 64 * heads, 256 * heads, heads
    config = dict(UNet2DConditionModel.load_config(CONFIGURATIONS / "sd1" / "unet"))
    config["block_out_channels"] = [round(channels * width) for channels in config["block_out_channels"]]
    config["cross_attention_dim"] = text.hidden_size
    with init_empty_weights(include_buffers=False):
        unet, text_encoder = UNet2DConditionModel.from_config(config), CLIPTextModel(text)
    generator = torch.Generator(device).manual_seed(0)
    layers = {}
    for part, model in (("text_encoder", text_encoder), ("unet", unet)):
        state = {
            name: torch.ones(value.shape, device=device, dtype=dtype)
            if "norm" in name and name.endswith("weight")
            else 0.02 * torch.randn(value.shape, generator=generator, device=device, dtype=dtype)
            for name, value in model.named_parameters()
        }
        model.load_state_dict(state, assign=True, strict=False)
        model.to(device).eval().requires_grad_(False)
        for path, module in model.named_modules():
            if isinstance(module, nn.Linear) and any(f".{path}".endswith(f".{ending}") for ending in ATTENTION_LAYERS):
                layers[layer_key(part, path)] = module
    if device.type == "cuda":
        unet.to(memory_format=torch.channels_last)
    return Models(unet=unet, text_encoder=text_encoder, layers=layers)


def random_batch(models: Models, count: int, side: int) -> dict[str, torch.Tensor]:
    """Return `count` random noisy latents of pictures `side` pixels wide, their times, noise and token ids."""
    weight = next(models.unet.parameters())
    noise = torch.randn(count, 4, side // 8, side // 8, device=weight.device, dtype=weight.dtype)
    ids = torch.randint(49000, (count, 77), device=weight.device)
    return {"noisy": noise, "times": torch.randint(1000, (count,), device=weight.device), "noise": noise.float(), "ids": ids}


def loss_of(models: Models, method: Method, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the denoising loss of one forward pass."""
    method.before()
    with torch.set_grad_enabled(method.trains_text):
        states = models.text_encoder(batch["ids"]).last_hidden_state
    if not method.parameters:
        states = states.detach().requires_grad_(True)
    on_gpu = states.device.type == "cuda"
    with torch.autocast("cuda", torch.bfloat16) if method.as_published and on_gpu else nullcontext():
        predicted = models.unet(batch["noisy"], batch["times"], states).sample
    return nn.functional.mse_loss(predicted.float(), batch["noise"])


class Stepper:
    """Makes steps of one method, its optimiser at hand."""

    def __init__(self, models: Models, method: Method, batch: dict[str, torch.Tensor]):
        self.models, self.method, self.batch, self.number = models, method, batch, 0
        self.optimizer = (
            torch.optim.AdamW(method.parameters, lr=1e-4, fused=not method.as_published) if method.parameters else None
        )

    def __call__(self) -> None:
        """Make one step."""
        self.number += 1
        loss = loss_of(self.models, self.method, self.batch)
        loss.backward()
        if self.optimizer is not None:
            nn.utils.clip_grad_norm_(self.method.parameters, 1.0)
            self.optimizer.step()
            self.method.after(self.number)
            self.optimizer.zero_grad(set_to_none=True)
        if self.method.as_published:
            loss.item()


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(work: Callable[[], Any]) -> float:
    """Return the seconds that `work` takes: of the clock with a GPU, else of the processor, where others compute too."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    started = clock()
    work()
    synchronize()
    return clock() - started


def kept_bytes(models: Models, method: Method, batch: dict[str, torch.Tensor]) -> int:
    """Return the bytes that one forward pass keeps for the backward pass, weights and what is trained aside."""
    known = {p.untyped_storage().data_ptr() for m in (models.unet, models.text_encoder) for p in (*m.parameters(), *m.buffers())}
    known |= {p.untyped_storage().data_ptr() for p in method.parameters}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss_of(models, method, batch)
    return sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in known)


def file_bytes(parameters: Sequence[torch.Tensor], folder: Path) -> int:
    """Return the size of the trained numbers as a safetensors file in fp16, without bands and token."""
    save_file({str(number): tensor.detach().half().contiguous().cpu() for number, tensor in enumerate(parameters)}, folder / "f")
    return (folder / "f").stat().st_size


def measure_steps(
    models: Models, names: Sequence[str], rank: int, count: int, side: int, again: bool, rounds: int, folder: Path
) -> dict[str, Any]:
    """Return the figures of every method in `names` at one setting, and their ratios to PEFT's LoRA."""
    batch = random_batch(models, count, side)
    rows: dict[str, dict[str, Any]] = {name: {"seconds": []} for name in names}
    with checkpointing(models.unet, again):
        for number in range(rounds + 1):  # the first round warms up
            for name in names:
                torch.manual_seed(0)
                with METHODS[name](models, rank) as method:
                    step, row = Stepper(models, method, batch), rows[name]
                    if number == 0:
                        row["parameters"] = sum(p.numel() for p in method.parameters)
                        row["file_bytes"] = file_bytes(method.parameters, folder)
                        row["kept_bytes"] = kept_bytes(models, method, batch)
                    if batch["noisy"].is_cuda:
                        step()
                        torch.cuda.reset_peak_memory_stats()
                    row["seconds"].append(seconds_of(step))
                    if batch["noisy"].is_cuda:
                        row["peak_bytes"] = torch.cuda.max_memory_allocated()
    for row in rows.values():
        row["seconds"] = median(row["seconds"][1:])
    for row in rows.values():
        row["over_peft"] = {
            name: round(row[name] / rows["peft_lora"][name], 3) for name in ("seconds", "kept_bytes", "peak_bytes") if name in row
        }
    return {"rank": rank, "batch": count, "pixels": side, "checkpointing": again, "methods": rows}


def measure_together(models: Models, rank: int, count: int, side: int, rounds: int) -> dict[str, Any]:
    """Return a step of several concepts in one pass over as many steps of one concept, `count` samples of each."""
    seconds: dict[int, list[float]] = {1: [], CONCEPTS: []}
    for _ in range(rounds + 1):
        for concepts, found in seconds.items():
            with spectral("additive", concepts)(models, rank) as method:
                step = Stepper(models, method, random_batch(models, count * concepts, side))
                step()
                found.append(seconds_of(step))
    alone, together = (median(found[1:]) for found in seconds.values())
    return {"concepts": CONCEPTS, "batch_each": count, "together_over_alone": round(together / (CONCEPTS * alone), 3)}


def measure_utilisation(models: Models, rank: int, count: int, side: int, rounds: int) -> dict[str, Any]:
    """Return the operations per second of the additive step, and of the product of two large square matrices."""
    with spectral("additive")(models, rank) as method:
        step = Stepper(models, method, random_batch(models, count, side))
        step()
        with FlopCounterMode(display=False) as counter:
            step()
        seconds = median(seconds_of(step) for _ in range(rounds))
    weight = next(models.unet.parameters())
    matrix = torch.randn(*[LARGE[weight.device.type]] * 2, dtype=weight.dtype, device=weight.device)
    product = median([seconds_of(lambda: matrix @ matrix) for _ in range(rounds + 1)][1:])
    rate, most = counter.get_total_flops() / seconds, 2 * len(matrix) ** 3 / product
    return {"batch": count, "operations_per_second": rate, "of_a_matrix_product": most, "utilisation": round(rate / most, 3)}


@torch.no_grad()
def measure_drawing(models: Models, rank: int, side: int, rounds: int) -> dict[str, Any]:
    """Return a UNet pass of a guidance pair with eight folded concepts over a bare one, and the seconds of folding."""
    batch, columns = random_batch(models, 2, side), 8 * 2 * rank
    states = models.text_encoder(batch["ids"]).last_hidden_state
    deltas = {}
    for key, layer in models.layers.items():
        up, down = (0.01 * torch.randn(size, columns, device=layer.weight.device) for size in layer.weight.shape)
        deltas[key] = LowRank(up=up, down=down)

    def drawing() -> None:
        models.unet(batch["noisy"], batch["times"], states)

    seconds: dict[str, list[float]] = {"bare": [], "folded": [], "attach": []}
    for _ in range(rounds + 1):
        seconds["bare"].append(seconds_of(drawing))
        with ExitStack() as stack:
            seconds["attach"].append(seconds_of(lambda stack=stack: stack.enter_context(folded(models.layers, deltas))))
            seconds["folded"].append(seconds_of(drawing))
    figures = {name: median(found[1:]) for name, found in seconds.items()}
    return {"folded_over_bare": round(figures["folded"] / figures["bare"], 3), "attach_seconds": round(figures["attach"], 3)}


def measure_spectrum(models: Models) -> dict[str, Any]:
    """Return the seconds of the spectrum of all adapted layers, also over whole decompositions, and how far values are off."""
    weights = [layer.weight.detach() for layer in models.layers.values()]
    found: dict[str, list[torch.Tensor]] = {}

    def whole() -> None:
        found["whole"] = [torch.linalg.svd(weight.float(), full_matrices=False).S for weight in weights]

    def ours() -> None:
        found["ours"] = [spectrum.s for spectrum in spectra(weights)]

    seconds = {"ours": seconds_of(ours), "whole": seconds_of(whole)}
    pairs = zip(found["ours"], found["whole"], strict=True)
    error = max(float(((s - true[: len(s)]) / true[: len(s)]).abs().max()) for s, true in pairs)
    return {
        "layers": len(weights),
        "seconds": round(seconds["ours"], 1),
        "over_whole": round(seconds["ours"] / seconds["whole"], 3),
        "error": float(f"{error:.1e}"),
    }


def lines(result: dict[str, Any]) -> list[str]:
    """Return the result as a table."""
    written = []
    for case in result["steps"]:
        again = "with" if case["checkpointing"] else "without"
        written.append(f"rank {case['rank']}, batch {case['batch']}, {case['pixels']} pixels, {again} checkpointing")
        written.append(f"{'':<18}{'seconds':>9}{'/ PEFT':>8}{'kept MB':>9}{'/ PEFT':>8}{'numbers':>11}")
        for name, row in case["methods"].items():
            over = row["over_peft"]
            time_columns = f"{row['seconds']:>9.3f}{over['seconds']:>8.2f}"
            kept_columns = f"{row['kept_bytes'] / 1e6:>9.1f}{over['kept_bytes']:>8.3f}"
            written.append(f"{name:<18}{time_columns}{kept_columns}{row['parameters']:>11,}")
    return written + [f"{name}: {result[name]}" for name in ("together", "utilisation", "drawing", "spectrum") if name in result]


def main() -> None:
    """Measure and write the JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="file for the result")
    parser.add_argument("--width", type=float, default=1.0, help="channels times this (default: %(default)s)")
    parser.add_argument("--pixels", type=int, help="side of the pictures (default: 256, on a GPU 512)")
    parser.add_argument("--rounds", type=int, help="timed steps of each method (default: 3, on a GPU 10)")
    parser.add_argument("--only-steps", action="store_true", help="leave out concepts together, drawing and the spectrum")
    options = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    device, dtype = (torch.device("cuda"), torch.bfloat16) if on_gpu else (torch.device("cpu"), torch.float32)
    side, rounds = options.pixels or (512 if on_gpu else 256), options.rounds or (10 if on_gpu else 3)
    cases = product((8, 4, 32), (1, 4, 8), (False, True)) if on_gpu else [(8, 1, False)]
    models = random_models(options.width, device, dtype)
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if on_gpu else f"CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "width": options.width,
        "torch": torch.__version__,
    }
    with tempfile.TemporaryDirectory() as folder:
        result["steps"] = [
            measure_steps(models, tuple(METHODS), rank, count, side, again, rounds, Path(folder)) for rank, count, again in cases
        ]
    if not options.only_steps:
        result["together"] = measure_together(models, 8, 4 if on_gpu else 1, side, rounds)
        result["utilisation"] = measure_utilisation(models, 8, 8 if on_gpu else 1, side, rounds)
        result["drawing"] = measure_drawing(models, 8, side, rounds)
        result["spectrum"] = measure_spectrum(models)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=2), encoding="utf-8")
    print("\n".join(lines(result)))


if __name__ == "__main__":
    main()
