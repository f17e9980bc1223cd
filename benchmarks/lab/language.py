"""The adapters are plain linear-layer adapters: a small model of bytes, taught Python's own sources, adapted to its prose.

Both texts ship with Python: the standard library's modules, and the topics of `help()`. Every method gets the same budget of
trained numbers and a sweep of learning rates on a part of the prose that is not in the result.
"""

from __future__ import annotations

import math
import sysconfig
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn

from benchmarks.lab.charts import lines, markdown
from benchmarks.lab.record import Case, Record, digest
from benchmarks.lab.toy import adapted, descend
from benchmarks.lab.workshop import Workshop
from spectral_diffusion.files import write_atomically
from spectral_diffusion.parametrisations.budget import parameter_count, rank_for
from spectral_diffusion.spectra.bands import Band
from spectral_diffusion.training import TrainingSettings


class Block(nn.Module):
    """One layer of a transformer that reads from left to right."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """`(n, length, width)` to the same."""
        read = self.norm1(states)
        q, k, v = (p(read).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2)
        states = states + self.out_proj(attended)
        return states + self.fc2(F.gelu(self.fc1(self.norm2(states))))


class ByteModel(nn.Module):
    """Bytes `(n, length)` to logits of the next ones `(n, length, 256)`."""

    def __init__(self, width: int, depth: int, heads: int, length: int):
        super().__init__()
        self.embedding, self.places = nn.Embedding(256, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Read `ids`."""
        states = self.embedding(ids) + self.places.weight[: ids.shape[1]]
        for block in self.blocks:
            states = block(states)
        return self.head(self.norm(states))

    def loss(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the mean cross entropy of the next bytes of `ids (n, length + 1)`, in nats."""
        return F.cross_entropy(self(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


@cache
def sources() -> torch.Tensor:
    """Return the standard library's modules as bytes, their places mixed."""
    folder = Path(sysconfig.get_path("stdlib"))
    text = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


@cache
def prose() -> torch.Tensor:
    """Return the topics of `help()` as bytes."""
    return torch.frombuffer(bytearray("\n".join(topics[name] for name in sorted(topics)).encode()), dtype=torch.uint8)


def batch(text: torch.Tensor, case: Case, seed: int) -> torch.Tensor:
    """Return random pieces `(batch, length + 1)` of `text`."""
    starts = torch.randint(len(text) - case["length"] - 1, (case["batch"],), generator=torch.Generator().manual_seed(seed))
    return torch.stack([text[start : start + case["length"] + 1] for start in starts]).long()


def pretrained(case: Case, folder: Path) -> ByteModel:
    """Return the model that was taught the sources, from disk where it was before."""
    model_case = {
        key: case[key] for key in ("width", "depth", "heads", "length", "batch", "pretraining_steps", "pretraining_rate")
    }
    path = folder / f"language-{digest(model_case)}.pt"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ByteModel(case["width"], case["depth"], case["heads"], case["length"])
    if not path.exists():
        optimizer = torch.optim.AdamW(model.parameters(), lr=case["pretraining_rate"], weight_decay=0.01)
        steps = case["pretraining_steps"]
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, case["pretraining_rate"], total_steps=steps)
        for step in range(steps):
            optimizer.zero_grad()
            model.loss(batch(sources(), case, step)).backward()
            optimizer.step()
            schedule.step()
        write_atomically(path, lambda temporary: torch.save(model.state_dict(), temporary))
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.requires_grad_(False)


def cases(config: dict[str, Any]) -> Iterator[Case]:
    """Yield every method."""
    for method, rates in config["methods"].items():
        yield {"name": method, "method": method, "rates": rates} | config["model"] | config["training"]


def measure(case: Case, workshop: Workshop) -> dict[str, Any]:
    """Sweep the rate on the first third of the prose, train with the best on the second, measure on the last."""
    text = prose()
    third = len(text) // 3
    first, second, last = text[:third], text[third : 2 * third], text[2 * third :]
    known, check = first[: 4 * third // 5], first[4 * third // 5 :]
    swept = {rate: _adapt(case, workshop, known, check, rate, case["sweep_steps"])[0][-1][1] for rate in case["rates"]}
    rate = min(swept, key=swept.get)
    curve, parameters = _adapt(case, workshop, second, last, rate, case["steps"])
    return {"curve": curve, "rate": rate, "swept": {str(key): value for key, value in swept.items()}, "parameters": parameters}


def _adapt(
    case: Case, workshop: Workshop, text: torch.Tensor, unseen: torch.Tensor, rate: float, steps: int
) -> tuple[list[tuple[int, float]], int]:
    """Return the loss in bits per byte on `unseen` as training on `text` goes on, and how many numbers were trained."""
    model = pretrained(case, workshop.adapters)
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] != "head"
    }
    check = torch.cat([batch(unseen, case, 10_000 + number) for number in range(case["checks"])])
    curve: list[tuple[int, float]] = []

    def look(step: int) -> None:
        if step % max(1, steps // 10) == 0:
            with torch.no_grad():
                curve.append((step, float(model.loss(check)) / math.log(2)))

    look(0)
    loss = lambda step: model.loss(batch(text, case, step))  # noqa: E731
    if case["method"] == "full":
        weights = [layer.weight.requires_grad_() for layer in layers.values()]
        _full(weights, loss, rate, steps, look)
        return curve, sum(weight.numel() for weight in weights)
    shapes = [tuple(layer.weight.shape) for layer in layers.values()]
    rank = rank_for(case["method"], shapes, case["budget"])
    settings = TrainingSettings(parametrisation=case["method"], rank=rank, steps=steps, isolation=0)
    descend(adapted(layers, Band(start=0, rank=rank), settings), loss, rate, steps, look)
    return curve, parameter_count(case["method"], shapes, rank)


def _full(weights: list[torch.Tensor], loss: Any, rate: float, steps: int, look: Any) -> None:
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.01)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - step / steps)
        optimizer.zero_grad()
        loss(step).backward()
        optimizer.step()
        look(step + 1)


def show(records: Sequence[Record]) -> tuple[dict[str, Figure], str]:
    """Return the loss curves and the table, the lowest loss first."""
    ordered = sorted(records, key=lambda record: record["result"]["curve"][-1][1])
    curves = {record["case"]["method"]: record["result"]["curve"] for record in ordered}
    rows = [
        [
            record["case"]["method"],
            f"{record['result']['parameters']:,}",
            f"{record['result']['rate']:g}",
            f"{record['result']['curve'][0][1]:.3f}",
            f"{record['result']['curve'][-1][1]:.3f}",
        ]
        for record in ordered
    ]
    figure = lines("Prose after code: loss on unseen text", "step", "bits per byte", curves)
    return {"loss": figure}, markdown(["method", "trained numbers", "rate", "before", "after"], rows)
