"""Scoring: cosines, prompts read from pictures, reports, and the CLIP that ships with the project."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image, PngImagePlugin

from spectral_diffusion.concepts.photos import read_photos
from spectral_diffusion.errors import BaseError, InputError, PhotoError
from spectral_diffusion.scoring import clip_scorer
from spectral_diffusion.scoring.score import DEFAULT_CLIP, ClipScorer, load_scorer, prompt_in, score_pictures
from spectral_diffusion.toyworld.judge import Judge, JudgeNetwork
from spectral_diffusion.toyworld.recipe.clip import clip_config, contrastive_loss

ROOT = Path(__file__).resolve().parents[2]


class ColourModel(torch.nn.Module):
    """A stand-in for a CLIP: a picture's vector is its mean colour, a text's is the colour it names."""

    def encode_image(self, pictures: torch.Tensor, normalize: bool) -> torch.Tensor:
        return torch.nn.functional.normalize(pictures.mean(dim=(2, 3)), dim=-1)

    def encode_text(self, ids: torch.Tensor, normalize: bool) -> torch.Tensor:
        return torch.nn.functional.one_hot(ids, 3).float()


def colour_tokenizer(texts: Sequence[str]) -> torch.Tensor:
    words = ("red", "green", "blue")
    return torch.tensor([next(index for index, word in enumerate(words) if word in text) for text in texts])


def to_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image.resize((8, 8)))).permute(2, 0, 1).float() / 255


@pytest.fixture
def scorer() -> ClipScorer:
    return ClipScorer(ColourModel(), to_tensor, colour_tokenizer, name="colours")


RED, GREEN = Image.new("RGB", (64, 64), (255, 0, 0)), Image.new("RGB", (64, 64), (0, 255, 0))


def save_picture(path: Path, image: Image.Image, prompt: str, class_words: dict[str, str] | None = None) -> Path:
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("parameters", f"{prompt}\nNegative prompt: blurry\nSteps: 20, Seed: 1")
    if class_words is not None:
        chunks.add_text("spectral_diffusion", json.dumps({"class_words": class_words}))
    image.save(path, pnginfo=chunks)
    return path


def make_concept(folder: Path, image: Image.Image) -> Path:
    folder.mkdir()
    image.save(folder / "1.png")
    return folder


def test_alignments_are_plain_cosines(scorer: ClipScorer) -> None:
    assert scorer.text_alignment([RED, RED], ["red", "green"]) == pytest.approx([1.0, 0.0])
    assert scorer.image_alignment([RED], [RED, GREEN]) == pytest.approx([0.5])
    assert scorer.text_alignment([], []) == []


def test_alignments_refuse_unequal_numbers_and_no_references(scorer: ClipScorer) -> None:
    with pytest.raises(ValueError, match="one prompt per picture, got 1 and 2"):
        scorer.text_alignment([RED], ["red", "green"])
    with pytest.raises(ValueError, match="at least one reference"):
        scorer.image_alignment([RED], [])


@pytest.mark.parametrize(
    ("parameters", "prompt"),
    [
        ("a dog\nNegative prompt: blurry\nSteps: 20", "a dog"),
        ("a dog,\nin the snow\nSteps: 20", "a dog,\nin the snow"),
        ("a dog", "a dog"),
        ("Negative prompt: x", ""),
    ],
)
def test_the_prompt_ends_before_the_negative_prompt_or_the_settings(parameters: str, prompt: str) -> None:
    assert prompt_in(parameters) == prompt


def test_a_report_scores_text_images_and_judged_characters(scorer: ClipScorer, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    save_picture(pictures / "1.png", RED, "a photo of <V1>", {"<V1>": "red"})
    GREEN.save(pictures / "2.png")
    judge = Judge(JudgeNetwork(2), ("puppy", "kitten"))
    references = {"<V1>": make_concept(tmp_path / "concept", RED)}
    report = score_pictures([pictures], references, scorer, judge)
    first, second = report.pictures
    assert (first.prompt, first.clip_text, first.clip_image["<V1>"]) == ("a photo of <V1>", pytest.approx(1), 1)
    assert (second.prompt, second.clip_text, second.clip_image["<V1>"]) == (None, None, pytest.approx(0))
    assert report.clip_text == pytest.approx(1)
    assert report.clip_image["<V1>"] == pytest.approx(0.5)
    assert first.judged is not None and first.judged[0].character in judge.characters
    assert json.loads(json.dumps(report.to_json()))["pictures"][0]["judged"][0]["character"] in judge.characters


def test_weights_are_not_words(tmp_path: Path) -> None:
    read: list[str] = []

    def tokenizer(texts: Sequence[str]) -> torch.Tensor:
        read.extend(texts)
        return colour_tokenizer(texts)

    scorer = ClipScorer(ColourModel(), to_tensor, tokenizer, name="colours")
    prompts = ("a ([V]:1.3) BREAK near a lake", "a red) car")
    files = [save_picture(tmp_path / f"{number}.png", RED, prompt, {"[V]": "red"}) for number, prompt in enumerate(prompts)]
    score_pictures(files, {}, scorer)
    assert read == ["a red near a lake", "a red) car"]


def test_class_words_come_from_the_picture_first(scorer: ClipScorer, tmp_path: Path) -> None:
    picture = save_picture(tmp_path / "1.png", RED, "<V1>", {"<V1>": "red"})
    other = save_picture(tmp_path / "2.png", RED, "<V1>")
    report = score_pictures([picture, other], {}, scorer, class_words={"<V1>": "green"})
    assert [score.clip_text for score in report.pictures] == pytest.approx([1.0, 0.0])
    assert report.pictures[0].judged is None


def test_a_token_without_class_word_is_refused(scorer: ClipScorer, tmp_path: Path) -> None:
    picture = save_picture(tmp_path / "1.png", RED, "a red <V1>")
    references = {"<V1>": make_concept(tmp_path / "concept", RED)}
    with pytest.raises(InputError, match=r"1\.png' holds <V1>, for which no class word is known"):
        score_pictures([picture], references, scorer)


def test_damaged_settings_are_named(scorer: ClipScorer, tmp_path: Path) -> None:
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("parameters", "red")
    chunks.add_text("spectral_diffusion", "{not json")
    RED.save(tmp_path / "1.png", pnginfo=chunks)
    with pytest.raises(InputError, match=r"'spectral_diffusion' text of '.*1\.png' is damaged"):
        score_pictures([tmp_path / "1.png"], {}, scorer)


def test_files_that_are_no_pictures_are_listed_once(scorer: ClipScorer, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    RED.save(tmp_path / "1.png")
    (tmp_path / "2.png").write_text("no picture")
    (tmp_path / "3.png").write_bytes(b"")
    report = score_pictures([tmp_path], {}, scorer)
    assert len(report.pictures) == 1
    assert ["2.png" in report.skipped[0], "3.png" in report.skipped[1]] == [True, True]
    assert len(caplog.records) == 1 and "2 of 3 files" in caplog.text


def test_no_picture_at_all_and_no_reference_at_all_are_errors(scorer: ClipScorer, tmp_path: Path) -> None:
    (tmp_path / "1.png").write_text("no picture")
    with pytest.raises(InputError, match=r"no picture to score(.|\n)*1\.png"):
        score_pictures([tmp_path], {}, scorer)
    (tmp_path / "empty").mkdir()
    RED.save(tmp_path / "1.png")
    with pytest.raises(PhotoError, match="holds no photos"):
        score_pictures([tmp_path / "1.png"], {"<V1>": tmp_path / "empty"}, scorer)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ViT-B-32/openai", r"'ViT-B-32:openai' are not on this computer; .*give 'ViT-B-32-quickgelu:FILE'"),
        ("ViT-B-32:laion2b_s34b_b79k", r"hf download laion/CLIP-ViT-B-32-laion2B-s34B-b79K'.*'ViT-B-32:FILE'"),
        ("ViT-B-32:nothing", r"has no weights 'nothing'; give a weights file, or one of: openai"),
        ("nothing", r"'nothing' is neither a folder with a CLIP nor an open_clip name"),
    ],
)
def test_a_clip_that_is_not_here_is_one_clear_sentence(
    name: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(BaseError, match=message):
        load_scorer(name)


def test_folders_without_a_clip_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(BaseError, match="There is no CLIP at"):
        load_scorer(tmp_path / "nothing")
    with pytest.raises(BaseError, match=r"has no 'open_clip_config\.json'; give a folder"):
        load_scorer(tmp_path)
    (tmp_path / "weights.pt").write_bytes(b"")
    with pytest.raises(BaseError, match=r"no 'open_clip_config\.json' beside it"):
        load_scorer(tmp_path / "weights.pt")
    (tmp_path / "open_clip_config.json").write_text("{}")
    with pytest.raises(BaseError, match="cannot be read"):
        load_scorer(tmp_path)


def test_a_weights_file_loads_by_architecture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    config = clip_config(vocabulary_size=49408, context_length=77)
    del config["text_cfg"]["hf_tokenizer_name"]
    (tmp_path / "Tiny.json").write_text(json.dumps(config))
    monkeypatch.setattr("open_clip.factory._MODEL_CONFIG_PATHS", [])
    monkeypatch.setattr("open_clip.factory._MODEL_CONFIGS", {})
    open_clip.add_model_config(tmp_path / "Tiny.json")
    torch.save(open_clip.CLIP(**config).state_dict(), tmp_path / "weights.pt")
    scorer = load_scorer(f"Tiny:{tmp_path / 'weights.pt'}")
    assert scorer.name == f"Tiny:{tmp_path / 'weights.pt'}"
    assert -1 <= scorer.text_alignment([RED], ["a dog"])[0] <= 1


@pytest.mark.parametrize(
    ("architecture", "mean", "said"),
    [("MobileCLIP-S1", (0.0, 0.0, 0.0), False), ("ViT-B-16-SigLIP", (0.5, 0.5, 0.5), False), ("ViT-L-14", None, True)],
)
def test_a_weights_file_gets_pictures_as_all_published_weights_of_its_kind(
    architecture: str, mean: tuple[float, ...] | None, said: bool, caplog: pytest.LogCaptureFixture
) -> None:
    assert clip_scorer._shared_preprocessing(architecture).get("image_mean") == mean
    assert ("want pictures in different ways" in caplog.text) == said


def test_the_contrastive_loss_is_least_for_matching_pairs() -> None:
    vectors, scale = torch.eye(4), torch.tensor(3.0)
    assert contrastive_loss(vectors, vectors, scale) < contrastive_loss(vectors, vectors.roll(1, 0), scale)


@pytest.fixture(scope="module")
def shipped() -> ClipScorer:
    return load_scorer()


def test_the_shipped_clip_prefers_the_right_class_word(shipped: ClipScorer) -> None:
    right = []
    for name, word, wrong in (("poodle", "dog", "vase"), ("black-cat", "cat", "man"), ("wizard", "man", "toy")):
        for photo in read_photos(ROOT / "concepts" / name).photos:
            texts = [f"a photo of a {word}", f"a photo of a {wrong}"]
            good, bad = shipped.text_alignment([photo.image] * 2, texts)
            right.append(good > bad)
    assert np.mean(right) >= 0.8


def test_the_shipped_clip_loads_with_open_clip_alone() -> None:
    model, _ = open_clip.create_model_from_pretrained(f"local-dir:{DEFAULT_CLIP}")
    ids = open_clip.get_tokenizer(f"local-dir:{DEFAULT_CLIP}")(["a dog and a cat near a lake"])
    assert model.encode_text(ids).shape == (1, 64)
