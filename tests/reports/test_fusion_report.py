"""The fusion report: what is drawn, what the verdict rests on, and the page."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import Commands
from PIL import Image
from random_adapters import random_adapter

from spectral_diffusion.adapters.fusion import fuse
from spectral_diffusion.bases.base import Base
from spectral_diffusion.errors import InputError
from spectral_diffusion.generation.drawing import Drawing
from spectral_diffusion.generation.generate import generate
from spectral_diffusion.reports.fusion_report import PROMPTS, FusionReport, report_fusion, save_report


class Colours:
    """Stands for a CLIP: a picture's vector are its mean colours."""

    name = "colours"

    def embed_images(self, images: list[Image.Image]) -> torch.Tensor:
        means = torch.tensor([image.convert("RGB").resize((1, 1)).getpixel((0, 0)) for image in images]).float() - 127
        return torch.nn.functional.normalize(means, dim=1)

    def image_alignment(self, images: list[Image.Image], references: list[Image.Image]) -> list[float]:
        return (self.embed_images(images) @ self.embed_images(references).T).mean(dim=1).tolist()

    def text_alignment(self, images: list[Image.Image], prompts: list[str]) -> list[float]:
        assert all("<" not in prompt and "dog" in prompt for prompt in prompts)
        return [0.25] * len(images)


@pytest.fixture(scope="module")
def report(base: Base) -> FusionReport:
    """Two concepts, the second with photos that are its own pictures alone."""
    one = random_adapter(base, token="<V1>", measured=True, size=0.3)
    two = random_adapter(base, token="<V2>", start=2, seed=4, measured=True, size=0.3)
    fused, counted = fuse([one, two]), []
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr("spectral_diffusion.reports.fusion_report.PROMPTS", PROMPTS[:2])
    photos = [generate(base, Drawing(prompt=PROMPTS[0].format("<V2>")), two)[0].image]
    report = report_fusion(base, fused, Colours(), {"<V2>": photos}, on_picture=lambda *now: counted.append(now))
    monkeypatch.undo()
    assert counted[-1] == (12, 12) and len(counted) == 12
    return report


def test_alone_fused_and_plain_are_drawn_on_the_same_seeds(report: FusionReport, base: Base) -> None:
    first = report.concepts[0]
    assert {name: len(images) for name, images in first.rows.items()} == {"alone": 2, "fused": 2, "plain": 2}
    alone = random_adapter(base, token="<V1>", measured=True, size=0.3)
    for prompt, seed, index in ((PROMPTS[0], 0, 0), (PROMPTS[1], 1, 1)):
        (again,) = generate(base, Drawing(prompt=prompt.format("<V1>"), seed=seed), alone)
        assert again.image.tobytes() == first.rows["alone"][index].tobytes()
        (plain,) = generate(base, Drawing(prompt=prompt.format("a dog"), seed=seed))
        assert plain.image.tobytes() == first.rows["plain"][index].tobytes()
    assert any(a.tobytes() != f.tobytes() for a, f in zip(first.rows["alone"], first.rows["fused"], strict=True))


def test_photos_of_a_concept_that_is_not_there_are_refused(base: Base) -> None:
    with pytest.raises(InputError, match="references name '<V9>', which the adapter does not have; its tokens are <V1>"):
        report_fusion(base, random_adapter(base), Colours(), {"<V9>": []})


def test_what_is_kept_is_measured_against_the_class_word(report: FusionReport) -> None:
    for concept in report.concepts:
        spread = concept.alone - concept.plain
        if spread > 0.02:
            assert concept.kept == pytest.approx((concept.fused - concept.plain) / spread)
            assert concept.verdict.startswith(concept.token) and "of its likeness alone is left" in concept.verdict
        else:
            assert concept.kept is None and "was hardly learnt" in concept.verdict


def test_a_concept_less_like_itself_than_a_plain_thing_has_nothing_left(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    likeness = iter((0.8, 0.5, 0.6))  # alone, fused and plain
    monkeypatch.setattr("spectral_diffusion.reports.fusion_report._likeness", lambda *arguments: next(likeness))
    monkeypatch.setattr("spectral_diffusion.reports.fusion_report.PROMPTS", PROMPTS[:1])
    (concept,) = report_fusion(base, random_adapter(base, token="<V1>"), Colours()).concepts
    assert concept.kept == pytest.approx(-0.5)
    assert concept.verdict == "<V1> is lost: 0% of its likeness alone is left."


def test_the_page_holds_every_picture_and_its_data_none(report: FusionReport, tmp_path: Path) -> None:
    hostile = replace(report, concepts=(replace(report.concepts[0], token="<script>"), report.concepts[1]))
    data = save_report(hostile, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/webp;base64,") == 12 and "<script>" not in page and "&lt;script&gt;" in page
    figures = json.loads(data.read_text(encoding="utf-8"))
    assert [concept["token"] for concept in figures["concepts"]] == ["<script>", "<V2>"]
    assert figures["cross_talk"][0][0] == pytest.approx(1) and figures["method"] == "aligned"


def test_the_command_writes_the_report(run: Commands, adapters: tuple[Path, Path], tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    words = ("--method", "gradient", "--report", page, "--base", run.base, "--device", "cpu")
    run("fuse", *adapters, "--out", tmp_path / "pair.safetensors", *words)
    assert "<V1>" in run.out and f"report      {page}" in run.out
    assert page.exists() and json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))["method"] == "gradient"
    run("fuse", *adapters, "--out", tmp_path / "two.safetensors", "--report", tmp_path / "report.txt", expect=2)
    assert "does not end in .html" in run.err
