"""The judge: its answers, its file, and how well the one that ships with the project knows the characters."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from spectral_diffusion.concepts.photos import read_photos
from spectral_diffusion.errors import InputError
from spectral_diffusion.toyworld.characters import CHARACTERS, SAMPLE_CONCEPTS
from spectral_diffusion.toyworld.judge import GRID, Judge, JudgeNetwork, load_judge, save_judge
from spectral_diffusion.toyworld.recipe.judge import judge_loss

CONCEPTS = Path(__file__).resolve().parents[2] / "concepts"
NAMES = ("puppy", "kitten", "vase")


@pytest.fixture
def judge() -> Judge:
    torch.manual_seed(0)
    return Judge(JudgeNetwork(len(NAMES)), NAMES)


def noise(seed: int, size: tuple[int, int] = (64, 64)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


class FixedNetwork(JudgeNetwork):
    """Sees NAMES[0] strongly at cell (4, 4), NAMES[1] right beside it and NAMES[2] far away, whatever it is shown."""

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        logits = torch.full((len(pictures), 1 + len(NAMES), GRID, GRID), -9.0)
        for row, column, centre, name in ((4, 4, 3.0, 0), (4, 6, 2.0, 1), (12, 12, 1.0, 2)):
            logits[:, 0, row, column] = centre
            logits[:, 1 + name, row, column] = 9.0
        return logits


def test_one_place_gives_one_character_and_the_most_confident_comes_first() -> None:
    judge = Judge(FixedNetwork(len(NAMES)), NAMES)
    sightings = judge.look([noise(1)], limit=2)[0]
    assert [sighting.character for sighting in sightings] == ["puppy", "vase"]
    assert sightings[0].confidence == pytest.approx(torch.tensor(3.0).sigmoid().item(), abs=1e-4)
    assert (sightings[0].x, sightings[0].y) == (4.5 / GRID, 4.5 / GRID)
    assert judge.names_present(noise(1), 2) == ("puppy", "vase")
    assert judge.first(noise(1)) == sightings[0]


def test_sightings_are_apart_sorted_and_never_none(judge: Judge) -> None:
    for sightings in judge.look([noise(seed) for seed in range(3)], apart=0.3):
        assert 1 <= len(sightings) <= 5
        assert [s.confidence for s in sightings] == sorted((s.confidence for s in sightings), reverse=True)
        for index, one in enumerate(sightings):
            assert all(np.hypot(one.x - other.x, one.y - other.y) >= 0.3 for other in sightings[:index])


def test_pictures_of_any_size_and_mode_are_judged_and_none_is_fine(judge: Judge) -> None:
    assert judge.look([]) == []
    assert len(judge.look([noise(1, (200, 90)), noise(2).convert("L"), noise(3).convert("RGBA")])) == 3


def test_a_saved_judge_answers_the_same_and_carries_its_names(judge: Judge, tmp_path: Path) -> None:
    path = tmp_path / "judge.safetensors"
    save_judge(judge.network, judge.characters, path)
    loaded = load_judge(path)
    assert loaded.characters == NAMES
    before, after = judge.first(noise(5)), loaded.first(noise(5))
    assert after.confidence == pytest.approx(before.confidence, abs=2e-3)  # half precision keeps three digits


def test_a_missing_or_foreign_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"There is no judge at '.*nothing\.safetensors'"):
        load_judge(tmp_path / "nothing.safetensors")
    foreign = tmp_path / "foreign.safetensors"
    save_file({"weight": torch.zeros(2)}, foreign)
    with pytest.raises(InputError, match=r"foreign\.safetensors' is not a judge"):
        load_judge(foreign)
    foreign.write_bytes(b"not safetensors at all")
    with pytest.raises(InputError, match="is not a judge"):
        load_judge(foreign)


def test_the_loss_is_least_for_the_right_name_at_the_right_place() -> None:
    centres = torch.full((1, 3, 2), float("nan"))
    centres[0, 0] = torch.tensor([4.5 / GRID, 4.5 / GRID])
    names = torch.zeros(1, 3, dtype=torch.long)
    right = torch.full((1, 1 + len(NAMES), GRID, GRID), -6.0)
    right[0, 0, 4, 4], right[0, 1] = 6.0, 6.0
    wrong_place = right.clone()
    wrong_place[0, 0, 4, 4], wrong_place[0, 0, 12, 12] = -6.0, 6.0
    wrong_name = right.roll(1, dims=1)
    wrong_name[:, 0] = right[:, 0]
    losses = [judge_loss(logits, centres, names).item() for logits in (right, wrong_place, wrong_name)]
    assert losses[0] < 0.5 * min(losses[1:])


@pytest.fixture(scope="module")
def shipped() -> Judge:
    return load_judge()


def test_the_shipped_judge_knows_every_character(shipped: Judge) -> None:
    assert shipped.characters == tuple(character.name for character in CHARACTERS)


@pytest.mark.parametrize("name", SAMPLE_CONCEPTS)
def test_the_shipped_judge_recognises_the_sample_concepts(shipped: Judge, name: str) -> None:
    report = read_photos(CONCEPTS / name)
    seen = shipped.look([photo.image for photo in report.photos])
    right = [sightings[0].character == name for sightings in seen]
    assert np.mean(right) >= 0.8, [sightings[0] for sightings in seen]
