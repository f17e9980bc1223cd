"""What the mathematics says, measured: rank capacity, overlap of concepts, and the direction of an ideal neuron.

- `rank`: one layer is trained towards a random change of full rank; what rank has the change that comes out?
- `overlap`: two concepts are trained on one layer, each from inputs of its own; how much do their changes meet?
  `inner` is the cosine of the two, `read` is `|d1 d2^T|`, `write` is `|d1^T d2|`, both relative to `|d1| |d2|`.
- `neuron`: two-layer ReLU networks learn one planted neuron; its cosine to the singular directions of their first layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn

from benchmarks.lab.charts import bars, markdown
from benchmarks.lab.record import Case, Record
from benchmarks.lab.toy import adapted, descend
from benchmarks.lab.workshop import Workshop
from spectral_diffusion.adapters.adapter import ConceptPart
from spectral_diffusion.parametrisations import PARAMETRISATIONS
from spectral_diffusion.spectra.bands import Band
from spectral_diffusion.training import TrainingSettings
from spectral_diffusion.training.adaptation import TrainedLayers

_METHODS = (*PARAMETRISATIONS, "additive, isolated")


def cases(config: dict[str, Any]) -> Iterator[Case]:
    """Yield every question for every parametrisation and seed."""
    for seed in config["seeds"]:
        for kind in ("rank", "overlap"):
            for method in _METHODS:
                yield {"name": f"{kind} {method} {seed}", "kind": kind, "method": method, "seed": seed} | config["layer"]
        yield {"name": f"neuron {seed}", "kind": "neuron", "seed": seed} | config["neuron"]


def measure(case: Case, workshop: Workshop) -> dict[str, Any]:
    """Answer one question."""
    return {"rank": _rank, "overlap": _overlap, "neuron": _neuron}[case["kind"]](case)


def _settings(case: Case) -> TrainingSettings:
    method = case["method"].partition(",")[0]
    isolation = case["bands"] if "isolated" in case["method"] else 0
    return TrainingSettings(
        parametrisation=method, rank=case["rank"], steps=case["steps"], seed=case["seed"], isolation=isolation
    )


def _trained(case: Case, inputs: torch.Tensor, target: torch.Tensor, slot: int) -> torch.Tensor:
    """Return the change that a layer's training ends with: its outputs on `inputs (n, in)` shall move by `inputs @ target.T`."""
    settings = _settings(case)
    layer = nn.Linear(case["width"], case["width"], bias=False).requires_grad_(False)
    layer.weight.copy_(_weight(case))
    band = Band(start=slot * case["rank"], rank=case["rank"])
    adaptation = adapted({"layer": layer}, band, settings, f"<V{slot}>")
    wanted = inputs @ (_weight(case) + target).T
    loss = lambda step: (layer(inputs) - wanted).square().mean()  # noqa: E731
    descend(adaptation, loss, case["rate"], case["steps"], lambda step: None)
    return _delta(adaptation.result(0))


def _weight(case: Case) -> torch.Tensor:
    """Return a weight whose singular values fall as those of trained networks do."""
    generator = torch.Generator().manual_seed(case["seed"])
    U, V = (torch.linalg.qr(torch.randn(case["width"], case["width"], generator=generator)).Q for _ in range(2))
    return U @ torch.diag(2.0 / torch.arange(1, case["width"] + 1) ** 0.5) @ V.T


def _delta(trained: TrainedLayers) -> torch.Tensor:
    part = ConceptPart(token="<V>", class_word="", band=None, parametrisation=trained.form, embeddings={}, layers=trained.parts)
    return part.delta("layer").dense()


def _rank(case: Case) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(100 + case["seed"])
    target = torch.randn(case["width"], case["width"], generator=generator) / case["width"]
    delta = _trained(case, torch.eye(case["width"]), target, slot=0)
    values = torch.linalg.svdvals(delta.double())
    numerical = int((values > 1e-4 * values[0]).sum())
    return {"rank": numerical}


def _overlap(case: Case) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(200 + case["seed"])
    shared = torch.randn(64, case["width"], generator=generator)
    deltas = []
    for slot in range(2):
        inputs = shared + torch.randn(64, case["width"], generator=generator)
        target = torch.randn(case["width"], case["width"], generator=generator) / case["width"]
        deltas.append(_trained(case, inputs, target, slot))
    one, two = deltas
    size = one.norm() * two.norm()
    return {
        "inner": float((one * two).sum().abs() / size),
        "read": float((one @ two.T).norm() / size),
        "write": float((one.T @ two).norm() / size),
    }


def _neuron(case: Case) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(case["seed"])
    ideal = nn.functional.normalize(torch.randn(case["inputs"], generator=generator), dim=0)
    X = torch.randn(case["samples"], case["inputs"], generator=generator)
    y = torch.relu(X @ ideal)
    first = (case["start"] * torch.randn(case["hidden"], case["inputs"], generator=generator)).requires_grad_()
    second = (case["start"] * torch.randn(case["hidden"], generator=generator)).requires_grad_()
    optimizer = torch.optim.AdamW([first, second], lr=case["rate"], weight_decay=case["decay"])
    for _ in range(case["steps"]):
        optimizer.zero_grad()
        loss = (torch.relu(X @ first.T) @ second - y).square().mean()
        loss.backward()
        optimizer.step()
    V = torch.linalg.svd(first.detach()).Vh
    return {"loss": float(loss.detach()), "cosines": [abs(float(direction @ ideal)) for direction in V[:8]]}


def show(records: Sequence[Record]) -> tuple[dict[str, Figure], str]:
    """Return a picture per question and the table."""
    by_kind = {kind: [r for r in records if r["case"]["kind"] == kind] for kind in ("rank", "overlap", "neuron")}
    figures, rows = {}, []
    for method in _METHODS:
        ranks = [r["result"] for r in by_kind["rank"] if r["case"]["method"] == method]
        overlaps = [r["result"] for r in by_kind["overlap"] if r["case"]["method"] == method]
        if ranks and overlaps:
            overlap = [_mean(overlaps, key) for key in ("inner", "read", "write")]
            rows.append([method, f"{_mean(ranks, 'rank'):.0f}", *(f"{value:.3f}" for value in overlap)])
    if rows:
        names = [row[0] for row in rows]
        figures["rank"] = bars("numerical rank of a trained change", names, {"rank": [float(row[1]) for row in rows]})
        overlap = {name: [float(row[index]) for row in rows] for index, name in ((2, "inner"), (3, "read"), (4, "write"))}
        figures["overlap"] = bars("overlap of two trained concepts", names, overlap)
    table = markdown(["parametrisation", "numerical rank", "inner", "read", "write"], rows)
    if by_kind["neuron"]:
        cosines = torch.tensor([r["result"]["cosines"] for r in by_kind["neuron"]]).mean(0).tolist()
        figures["neuron"] = bars("cosine to the ideal neuron", [str(number) for number in range(1, 9)], {"direction": cosines})
        table += f"\nCosine of the ideal neuron to the first singular direction: {cosines[0]:.3f}"
        table += f", to the seven next: {max(cosines[1:]):.3f} at most.\n"
    return figures, table


def _mean(results: Sequence[dict[str, float]], key: str) -> float:
    return sum(result[key] for result in results) / len(results)
