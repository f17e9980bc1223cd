"""What the studio can do, without a browser: photos in, adapters, pictures, scores and files out."""

from __future__ import annotations

import csv
import json
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

from app.actions.adapters import adapter_cards, export, fuse, library_tokens, map_bands
from app.actions.concepts import (
    add_photos,
    add_samples,
    concept_card,
    concept_cards,
    concept_names,
    create_concept,
    crop_previews,
    mask_of,
    remove_concept,
    remove_photo,
    set_caption,
    set_mask,
    suggest_masks,
    suggest_token,
    suggested_mask_of,
)
from app.actions.pictures import compare, drawing_from, forming, generate, likeness_of, parse_size, picture_cards
from app.actions.regions import added, moved, named, removed, suggested
from app.actions.studio import Studio, open_studio
from app.actions.tasks import TASKS
from app.actions.tour import queue_tour
from app.actions.trainings import base_facts, expectations, look_at_base, train, train_again, training_view
from app.jobs import State, WorkerProcess
from app.jobs.identity import identity
from app.jobs.worker import TaskContext, Worker
from spectral_diffusion.adapter_file import load_adapter
from spectral_diffusion.comparison import Axis
from spectral_diffusion.concept import load_concept
from spectral_diffusion.errors import InputError
from spectral_diffusion.generation import Drawing
from spectral_diffusion.picture_file import read_drawing

QUICK = {"steps": 2, "batch": 1, "rank": 2}


@pytest.fixture
def studio(tmp_path: Path) -> Studio:
    return open_studio(tmp_path / "studio")


@pytest.fixture
def tiny_studio(studio: Studio, tiny_base_folder: Path) -> Studio:
    studio.change_settings(base=str(tiny_base_folder), device="cpu")
    return studio


def work(studio: Studio) -> list[State]:
    """Do all jobs that wait, in this process, and return how all jobs ended, the oldest first."""
    worker = Worker(studio.jobs, TASKS, identity())
    while (name := studio.jobs.take()) is not None:
        worker.do(name)
    return [job.state for job in reversed(studio.jobs.jobs())]


def concept_of(studio: Studio, token: str, photos: Path) -> str:
    name = create_concept(studio, token, "dog")
    add_photos(studio, name, sorted(photos.glob("*.png")))
    return name


def test_photos_are_kept_and_each_bad_one_is_named(studio: Studio, photo_folder: Path, tmp_path: Path) -> None:
    name = create_concept(studio, "<dog>", "dog")
    turned, copy, tiny = tmp_path / "Turned Photo.JPG", tmp_path / "copy.png", tmp_path / "tiny.png"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(photo_folder / "0.png").save(turned, exif=exif)
    copy.write_bytes((photo_folder / "1.png").read_bytes())
    Image.new("RGB", (9, 9)).save(tiny)
    (tmp_path / "drawing.jpg").write_text("<svg onload='alert(1)'/>")
    (tmp_path / "film.mov").write_bytes(b"film")
    files = [turned, photo_folder / "1.png", copy, tiny, tmp_path / "drawing.jpg", tmp_path / "film.mov"]
    findings = {finding.name: finding for finding in add_photos(studio, name, files)}
    assert {found for found, finding in findings.items() if finding.used} == {"Turned Photo.JPG", "1.png"}
    assert "urned upright" in findings["Turned Photo.JPG"].text
    assert "same picture as '1.png'" in findings["copy.png"].text
    assert "too small" in findings["tiny.png"].text and "SVG" in findings["drawing.jpg"].text
    assert "It is no photo" in findings["film.mov"].text
    card = concept_card(studio, name)
    assert len(card.photos) == 2 and all(photo.thumbnail.is_file() for photo in card.photos)
    assert sorted(path.suffix for path in (studio.folder("concepts") / name).iterdir()) == [".jpg", ".png", ".toml"]


@pytest.mark.parametrize("hostile", ["../../evil.png", "..", "a/b.png", "-mask.png", "x" * 300 + ".png", "con.<script>"])
def test_names_of_files_never_become_paths(studio: Studio, photo_folder: Path, tmp_path: Path, hostile: str) -> None:
    name = create_concept(studio, "<dog>", "dog")
    before = {path for path in tmp_path.rglob("*") if studio.root not in path.parents}

    class Upload(type(photo_folder)):
        """A file with a hostile name, as some client may send it."""

        name = property(lambda self: hostile)
        stem = property(lambda self: hostile.rpartition(".")[0])
        suffix = property(lambda self: "." + hostile.rpartition(".")[2])

    add_photos(studio, name, [Upload(photo_folder / "0.png")])
    (photo,) = concept_card(studio, name).photos
    assert Path(photo.name).name == photo.name and len(photo.name) < 80 and "<" not in photo.name
    assert {path for path in tmp_path.rglob("*") if studio.root not in path.parents} == before
    with pytest.raises(InputError, match="has no photo"):
        remove_photo(studio, name, "../concept.toml")


def test_captions_and_masks_reach_the_training(studio: Studio, photo_folder: Path) -> None:
    name = concept_of(studio, "<dog>", photo_folder)
    first, second = (photo.name for photo in concept_card(studio, name).photos[:2])
    set_caption(studio, name, first, "  <TOK> on\na sofa ")
    mask = Image.new("L", (48, 40))
    mask.paste(255, (0, 0, 24, 40))
    set_mask(studio, name, second, mask)
    examples = load_concept(studio.folder("concepts") / name).examples
    assert examples[0].caption == "<TOK> on a sofa" and examples[0].mask is None
    assert examples[1].mask is not None and examples[1].mask.size == examples[1].photo.image.size
    picture, kept = mask_of(studio, name, second)
    assert kept is not None and kept.size == picture.size
    set_mask(studio, name, second, Image.new("L", (48, 40)))
    set_caption(studio, name, first, "")
    card = concept_card(studio, name)
    assert card.photos[1].mask is None and card.photos[0].caption == "a photo of <TOK>"
    assert {crop.size for crop in crop_previews(studio, name, first, 32)} == {(32, 32)}


def test_masks_are_suggested_and_never_overwritten(studio: Studio, tmp_path: Path) -> None:
    name, photo = create_concept(studio, "<ball>", "ball"), Image.new("RGB", (160, 120), (40, 80, 170))
    ImageDraw.Draw(photo).ellipse([50, 30, 110, 100], fill=(200, 40, 30))
    photo.save(tmp_path / "1.png")
    photo.transpose(Image.Transpose.FLIP_TOP_BOTTOM).rotate(8, fillcolor=(40, 80, 170)).save(tmp_path / "2.png")
    add_photos(studio, name, [tmp_path / "1.png", tmp_path / "2.png"])
    own = Image.new("L", photo.size, 255)
    set_mask(studio, name, "1.png", own)
    picture, mask = suggested_mask_of(studio, name, "2.png")
    assert mask.size == picture.size and concept_card(studio, name).photos[1].mask is None
    assert suggest_masks(studio, name).startswith("1 mask was made")
    first, second = concept_card(studio, name).photos
    assert first.mask is not None and second.mask is not None and first.mask.is_file() and second.mask.is_file()
    assert load_concept(studio.folder("concepts") / name).examples[0].mask.getextrema() == (255, 255)
    assert "already" in suggest_masks(studio, name)
    add_photos(studio, name, [_plain(tmp_path / "3.png")])
    with pytest.raises(InputError, match="Nothing stands out"):
        suggested_mask_of(studio, name, "3.png")


def _plain(path: Path) -> Path:
    Image.new("RGB", (64, 64), (9, 90, 200)).save(path)
    return path


def test_regions_are_changed_one_step_at_a_time_and_reach_the_picture(tiny_studio: Studio, photo_folder: Path) -> None:
    with pytest.raises(InputError, match="names no concept"):
        suggested(tiny_studio, None, "a dog")
    regions = named(moved(added(added((), "a lake"), ""), 1, "0, 0.5, 0.5,1"), 1, " a cat ")
    assert [(region.prompt, region.box) for region in regions] == [
        ("a lake", (0.25, 0.25, 0.75, 0.75)),
        ("a cat", (0.0, 0.5, 0.5, 1.0)),
    ]
    for change, sentence in (
        (lambda: moved(regions, 0, "0,0,2,1"), "leaves the picture"),
        (lambda: moved(regions, 0, "left"), "is not of the form"),
        (lambda: named(regions, 0, " "), "has no prompt"),
        (lambda: removed(regions, 7), "no region 8"),
    ):
        with pytest.raises(InputError, match=sentence):
            change()
    seen = []
    report = TaskContext.report

    def look(context: TaskContext, **event: object) -> None:
        report(context, **event)
        seen.append(forming(tiny_studio))

    drawing = drawing_from({"prompt": "a lake", "steps": 4, "seed": 3, "regions": removed(regions, 0)})
    generate(tiny_studio, None, drawing)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TaskContext, "report", look)
        assert work(tiny_studio) == [State.DONE], tiny_studio.jobs.jobs()[0].reason
    assert [now[1] if now else None for now in seen] == [3, 3, 3, 3] and forming(tiny_studio) is None
    (card,) = picture_cards(tiny_studio)
    assert read_drawing(card.path).regions == drawing.regions
    assert not list(tiny_studio.folder("pictures").glob("*.webp"))


def test_tokens_are_suggested_and_checked(studio: Studio) -> None:
    assert suggest_token(studio, "big dog") == "<big-dog>"
    create_concept(studio, suggest_token(studio, "dog"), "dog")
    assert suggest_token(studio, "dog") == "<dog-2>"
    with pytest.raises(InputError, match=r"has the token '<dog>'; choose another, such as '<dog-2>'"):
        create_concept(studio, "<DOG>", "dog")
    with pytest.raises(InputError, match="one word"):
        create_concept(studio, "two words", "dog")
    with pytest.raises(InputError, match="class word is empty"):
        create_concept(studio, "<x>", " ")


def test_a_first_visit_finds_samples_and_a_second_keeps_what_was_removed(studio: Studio) -> None:
    add_samples(studio)
    assert [card.token for card in concept_cards(studio)] == ["<poodle>", "<black-cat>", "<raccoon>"]
    for name in concept_names(studio):
        remove_concept(studio, name)
    add_samples(studio)
    assert concept_cards(studio) == []
    assert len(list(studio.folder("removed").iterdir())) == 3


def test_from_photos_to_a_file_that_diffusers_loads(tiny_studio: Studio, photo_folder: Path, tmp_path: Path) -> None:
    studio = tiny_studio
    look_at_base(studio)
    assert look_at_base(studio) is None
    names = [concept_of(studio, token, photo_folder) for token in ("<one>", "<two>")]
    for name in names:
        train(studio, name, changes=QUICK | {"sample_every": 2})
    with pytest.raises(InputError, match="<one> is queued already"):
        train(studio, names[0])
    assert work(studio) == [State.DONE] * 3, [job.reason for job in studio.jobs.jobs()]
    assert (base_facts(studio) or {})["resolution"] == 32 and expectations(studio)["fast"].seconds is not None
    view = training_view(studio, concept_card(studio, names[0]).job)
    assert (view.step, view.steps, len(view.losses), len(view.samples)) == (2, 2, 2, 2)
    cards = adapter_cards(studio)
    assert [card.bands for card in cards] == [("0-1",), ("2-3",)]
    adapters = [card.name for card in cards]
    assert map_bands(studio, adapters).conflicts == () and map_bands(studio, adapters).cross_talk[0][1] is not None

    fuse(studio, adapters, [1.0, 0.5], title="My pair!")
    work(studio)
    pair = next(card for card in adapter_cards(studio) if card.name.startswith("fused/"))
    assert pair.name == "fused/My_pair.safetensors" and library_tokens(studio, pair.name) == ["<one>", "<two>"]
    assert load_adapter(pair.path).weights == (1.0, 0.5)
    with pytest.raises(InputError, match="'My_pair' already"):
        fuse(studio, adapters, [1.0, 1.0], title="My pair!")

    generate(studio, pair.name, drawing_from({"prompt": "<one> and <two>", "count": 2, "steps": 1, "seed": 7}))
    axes = Axis.parse("seed", ["1", "2"]), Axis.parse("adapter", ["My_pair", "none"])
    compare(studio, [pair.name], Drawing(prompt="<one> near a lake", steps=1), *axes)
    export(studio, pair.name)
    assert set(work(studio)) == {State.DONE}, [job.reason for job in studio.jobs.jobs()]
    pictures = picture_cards(studio, "likeness")
    assert {card.seed for card in pictures} == {7, 8}
    assert all(card.clip_text is not None and set(card.clip_image) == {"<one>", "<two>"} for card in pictures)
    assert likeness_of(studio, ["<one>", "<three>"]).keys() == {"<one>"}
    exported, compared = studio.jobs.jobs()[0].result, studio.jobs.jobs()[1].result
    with open(studio.file("comparisons", compared["table"]), encoding="utf-8") as table:
        assert len(list(csv.reader(table))) == 5
    assert studio.file("comparisons", compared["sheet"]).is_file()
    with zipfile.ZipFile(studio.file("exports", exported["file"])) as archive:
        archive.extractall(tmp_path / "unpacked")
    files = sorted(path.name for path in (tmp_path / "unpacked").iterdir())
    lora = ["My_pair-lora.json", "My_pair-lora.png", "My_pair-lora.safetensors"]
    assert files == sorted([*lora, "one.safetensors", "two.safetensors", "where-to-put-it.txt"])
    assert exported["error"] < 1e-2 and exported["rank"] == 8

    export(studio, pair.name, "fp32", format="diffusers", rank=1)
    export(studio, pair.name, format="embedding")
    export(studio, pair.name, format="checkpoint")
    train_again(studio, names[0], longer=True)
    assert set(work(studio)) == {State.DONE}, [job.reason for job in studio.jobs.jobs()]
    again, checkpoint, embedding, small = (job.result for job in studio.jobs.jobs()[:4])
    assert again["steps"] == 4 and again["band"] == "0-1"
    assert "merged" not in checkpoint["names"] and checkpoint["bytes"] > 2 * embedding["bytes"]
    assert embedding["names"] == ["one.safetensors", "two.safetensors", "where-to-put-it.txt"] and embedding["rank"] is None
    assert small["rank"] == 1 and 0 < small["rank_errors"]["overall"] < 1


def test_a_stopped_training_keeps_its_band_and_ends_as_an_undisturbed_one(
    tiny_studio: Studio, photo_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    studio = tiny_studio
    first, second = (concept_of(studio, token, photo_folder) for token in ("<one>", "<two>"))
    stopped = train(studio, first, changes=QUICK)
    reported = TaskContext.report

    def report_and_cancel(context: TaskContext, **event: object) -> None:
        reported(context, **event)
        studio.jobs.cancel(stopped)

    with monkeypatch.context() as patch:
        patch.setattr(TaskContext, "report", report_and_cancel)
        assert work(studio) == [State.CANCELLED]
    assert (studio.folder("adapters") / f"{first}.safetensors.checkpoint").is_file()
    train(studio, second, changes=QUICK)
    work(studio)
    studio.jobs.resume(stopped)
    assert work(studio) == [State.DONE, State.DONE]
    assert "goes on from step 1" in studio.jobs.log(stopped)
    resumed = load_adapter(studio.folder("adapters") / f"{first}.safetensors").concepts[0]
    assert (resumed.band.start, load_adapter(studio.folder("adapters") / f"{second}.safetensors").concepts[0].band.start) == (
        0,
        2,
    )
    undisturbed = train(studio, first, changes=QUICK)
    work(studio)
    assert studio.jobs.job(undisturbed).state is State.DONE
    again = load_adapter(studio.folder("adapters") / f"{first}.safetensors").concepts[0]
    assert all(
        torch.equal(tensor, again.layers[key].tensors[name])
        for key, part in resumed.layers.items()
        for name, tensor in part.tensors.items()
    )


def test_failed_jobs_say_why_in_a_sentence(tiny_studio: Studio, photo_folder: Path) -> None:
    studio = tiny_studio
    name = concept_of(studio, "dog", photo_folder)
    train(studio, name, changes=QUICK)
    queue = [studio.jobs.submit("fuse", "x", {"adapters": ["fused/../../x"], "strengths": [], "method": "sum", "out": "x"})]
    assert work(studio) == [State.FAILED, State.FAILED]
    assert "already a word of the base" in (studio.jobs.jobs()[1].reason or "")
    assert "There is no '../../x'" in (studio.jobs.job(queue[0]).reason or "")


def test_the_tour_is_queued_once_the_samples_are_there(studio: Studio) -> None:
    with pytest.raises(InputError, match="'poodle' was removed"):
        queue_tour(studio)
    add_samples(studio)
    jobs = [studio.jobs.job(name) for name in queue_tour(studio)]
    assert [job.kind for job in jobs] == ["train", "train", "fuse", "generate", "export"]
    assert len(queue_tour(studio)) == 3


def test_settings_are_kept_and_checked(studio: Studio, tmp_path: Path, tiny_base_folder: Path) -> None:
    studio.change_settings(base=f" {tiny_base_folder} ", device="cpu")
    assert open_studio(studio.root).settings.base == str(tiny_base_folder)
    for changes, sentence in (
        ({"base": str(tmp_path / "nothing")}, "There is no base"),
        ({"base": str(tmp_path)}, "is not a diffusers folder"),
        ({"device": "abacus"}, "There is no device 'abacus'"),
        ({"clip": "nothing"}, "There is no CLIP"),
    ):
        with pytest.raises(InputError, match=sentence):
            studio.change_settings(**changes)
    assert studio.settings.base == str(tiny_base_folder)
    assert studio.change_settings(base="", device="").base is None
    assert json.loads((studio.root / "settings.json").read_text())["base"] is None


def test_what_makes_no_sense_is_refused(studio: Studio) -> None:
    assert drawing_from({"prompt": "x", "seed": -1}).seed != drawing_from({"prompt": "x", "seed": -1}).seed
    assert parse_size("512 x 768") == (512, 768) and parse_size(" ") is None
    with pytest.raises(InputError, match="is not a size"):
        parse_size("large")
    with pytest.raises(InputError, match="too many"):
        drawing_from({"prompt": "x", "count": 65})
    with pytest.raises(InputError, match="at least two"):
        fuse(studio, ["adapters/a.safetensors"], [1.0])
    with pytest.raises(InputError, match="no adapter '/etc/passwd'"):
        export(studio, "/etc/passwd")
    with pytest.raises(InputError, match="no precision"):
        export(studio, "adapters/x.safetensors", "fp8")
    with pytest.raises(InputError, match="no format"):
        export(studio, "adapters/x.safetensors", format="zip")
    with pytest.raises(InputError, match="for LoRAs only"):
        export(studio, "adapters/x.safetensors", format="checkpoint", rank=4)
    with pytest.raises(InputError, match="There is no"):
        studio.file("exports", "../settings.json")
    add_samples(studio)
    name = create_concept(studio, "<none>", "dog")
    with pytest.raises(InputError, match="has no photos"):
        train(studio, name)
    with pytest.raises(InputError, match="There is no concept"):
        train(studio, "../poodle")


def test_actions_answer_at_once_while_a_training_runs(tiny_studio: Studio, photo_folder: Path) -> None:
    studio, patience = tiny_studio, time.monotonic() + 120
    add_samples(studio)
    name = concept_of(studio, "<one>", photo_folder)
    job = train(studio, name, changes=QUICK | {"steps": 100_000})
    actions = {
        "cards": lambda: concept_cards(studio),
        "training": lambda: training_view(studio, studio.jobs.job(job)),
        "jobs": lambda: (studio.jobs.jobs(), studio.jobs.waiting()),
        "expectations": lambda: expectations(studio),
        "adapters": lambda: adapter_cards(studio),
        "pictures": lambda: (picture_cards(studio), likeness_of(studio, ["<one>"]), forming(studio)),
        "caption": lambda: set_caption(studio, name, "0.png", "<TOK> on a sofa"),
        "draw": lambda: generate(studio, None, drawing_from({"prompt": "a dog"})),
        "train": lambda: train(studio, "poodle") and studio.jobs.empty(),
    }
    with WorkerProcess(studio.folder("jobs"), "app.actions.tasks:TASKS"):
        while training_view(studio, studio.jobs.job(job)).step < 3:
            assert time.monotonic() < patience and not studio.jobs.job(job).state.ended, studio.jobs.log(job)
            time.sleep(0.1)
        seconds = {what: min(_seconds(action) for _ in range(5)) for what, action in actions.items()}
        assert studio.jobs.job(job).state is State.RUNNING
        assert max(seconds.values()) < 0.3, seconds
        studio.jobs.cancel(job)


def _seconds(action: Callable[[], object]) -> float:
    start = time.monotonic()
    action()
    return time.monotonic() - start
