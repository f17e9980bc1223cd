"""The lab: every experiment runs, leaves one JSON per run, resumes, and shows what the JSON says."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from filelock import FileLock
from PIL import Image
from shared_bases import shared_base
from short_trainings import prepare_less

from benchmarks.lab import alignment, bleeding, cost, fusion, language, theory
from benchmarks.lab import bench as lab
from benchmarks.lab.__main__ import main
from benchmarks.lab.charts import packed
from benchmarks.lab.record import Postponed, perform, source
from benchmarks.lab.workshop import Workshop
from spectral_diffusion.adapters.adapter import input_group
from spectral_diffusion.adapters.fusion import fuse
from spectral_diffusion.joining import RHO, Inputs, aligned_sum
from spectral_diffusion.parametrisations import PARAMETRISATIONS
from spectral_diffusion.training.activations import measure_activations

QUICK = {
    "theory": {
        "seeds": [0],
        "layer": {"width": 16, "rank": 2, "bands": 2, "steps": 12, "rate": 0.05},
        "neuron": {"inputs": 8, "hidden": 16, "samples": 64, "steps": 300, "rate": 0.01, "start": 0.02, "decay": 0.01},
    },
    "language": {
        "model": {
            "width": 16,
            "depth": 1,
            "heads": 2,
            "length": 8,
            "batch": 4,
            "pretraining_steps": 3,
            "pretraining_rate": 0.003,
        },
        "training": {"budget": 600, "steps": 10, "sweep_steps": 2, "checks": 1},
        "methods": {method: [0.01] for method in ("full", "additive", "rotational", "lora", "dora", "adalora", "oft")},
    },
    "cost": {
        "concepts": ["black-cat", "poodle"],
        "fusers": ["sum", "aligned"],
        "fused": {"parametrisation": "additive", "rank": 2, "steps": 2, "batch": 1},
        "training": {"rank": 2, "steps": 3, "batch": 1, "inertness": 0.0, "scenes": 0.0},
        "methods": {"lora": {}, "additive": {}},
    },
    "fusion": {
        "concepts": ["black-cat", "poodle"],
        "counts": [2],
        "seeds": [0],
        "pictures": 1,
        "training": {"rank": 2, "steps": 2, "batch": 1},
        "trainings": {
            "spectral": {"parametrisation": "additive"},
            "in one go": {"parametrisation": "additive", "together": True},
            "oft": {"parametrisation": "oft"},
        },
        "methods": {
            "aligned": {"training": "spectral", "fuser": "aligned"},
            "settled": {"training": "spectral", "fuser": "sum", "settling": 2},
            "in one go": {"training": "in one go", "fuser": "sum"},
            "OFT average": {"training": "oft", "fuser": "average"},
        },
    },
    "single": {
        "concepts": ["black-cat"],
        "seeds": [0],
        "pictures": 1,
        "training": {"rank": 2, "steps": 2, "batch": 1},
        "methods": {"additive": {"slot": 1, "weakest_first": False}, "lora": {"parametrisation": "lora"}},
    },
    "alignment": {
        "concepts": ["black-cat", "poodle"],
        "counts": [2],
        "seeds": [0],
        "pictures": 1,
        "training": {"parametrisation": "additive", "rank": 2, "steps": 2, "batch": 1},
        "variants": {"as it ships": {}, "base": {"base": 1.0}, "again": {"drawings": 2, "where": "unet"}},
    },
    "bleeding": {
        "concepts": ["black-cat", "poodle"],
        "seeds": [0],
        "training": {"rank": 2, "steps": 2, "batch": 1},
        "trainings": {"spectral": {"parametrisation": "additive"}, "lora": {"parametrisation": "lora"}},
        "parts": {"all of it": {}, "what reads the band": {"term": "reads the band"}, "attention": {"layers": ["attn1"]}},
    },
    "efficiency": {
        "concepts": ["black-cat"],
        "seeds": [0],
        "pictures": 1,
        "training": {"steps": 2, "batch": 1},
        "methods": {"additive": {"ranks": [2]}, "svdiff": {"ranks": [1], "settings": {"unet_rate": 0.01}}},
    },
}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tiny_base_folder: Path) -> Iterator[None]:
    prepare_less(monkeypatch)
    monkeypatch.setattr(lab, "configuration", lambda name, size: QUICK[name])
    monkeypatch.setattr("benchmarks.lab.workshop.PROMPTS", ("{} near a lake",))
    monkeypatch.setattr("benchmarks.lab.workshop.load_base", lambda: shared_base("tiny", tiny_base_folder))
    yield


def records(folder: Path) -> list[dict[str, object]]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


@pytest.mark.parametrize("name", QUICK)
def test_an_experiment_runs_resumes_and_shows_its_results(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert lab.run([name], "quick", tmp_path) == 0
    folder = tmp_path / "results" / name
    found = records(folder)
    assert found and {record["status"] for record in found} == {"done"}
    assert {"case", "result", "machine", "versions", "source", "seconds"} <= found[0].keys()
    written = {path: path.stat().st_mtime_ns for path in folder.glob("*.json")}
    pictures = list(folder.glob("*.png"))
    assert pictures and all(picture.stat().st_size > 1000 for picture in pictures)
    assert (folder / "table.md").read_text(encoding="utf-8").count("\n") > 2
    assert lab.run([name], "quick", tmp_path) == 0
    assert written == {path: path.stat().st_mtime_ns for path in folder.glob("*.json")}


def test_the_spread_over_seeds_is_that_of_a_sample_and_what_is_not_drawn_alone_yet_is_left_out() -> None:
    found = []
    for seed, identity in enumerate((0.5, 0.7)):
        case = {"training": "spectral", "group": [], "settings": {"seed": seed}}
        likeness = {"identity": identity, "clip_image": 0.6, "clip_text": 0.7}
        found.append({"case": case | {"kind": "alone", "concept": "poodle"}, "result": likeness})
        result = {"concepts": {"poodle": likeness | {"lost": 0.0}}, "joint": {}, "strip": packed([Image.new("RGB", (8, 8))])}
        found.append({"case": case | {"kind": "fused", "method": "sum", "concepts": ["poodle"]}, "result": result})
    assert "| 0.60 | 0.60 ± 0.14 |" in fusion.show(found)[1]
    assert "| 0.70 | 0.70 |" in fusion.show(found[1:])[1]


def test_every_experiment_has_a_quick_and_a_full_size() -> None:
    for name, module in lab.EXPERIMENTS.items():
        for size in ("quick", "full"):
            path = Path(lab.__file__).parent / "experiments" / name / f"{size}.toml"
            assert path.is_file(), path
            config = lab.tomllib.loads(path.read_text(encoding="utf-8"))
            names = [case["name"] for case in module.cases(config)]
            assert names and len(set(names)) == len(names), f"{name}, {size}"


def test_a_run_that_fails_says_why_and_is_tried_again(tmp_path: Path) -> None:
    def broken() -> dict[str, object]:
        raise ValueError("no photos")

    case = {"name": "x", "seed": 1}
    record = perform(tmp_path, case, broken)
    assert record["status"] == "failed" and record["error"] == "ValueError: no photos" and "result" not in record
    assert perform(tmp_path, case, lambda: {"value": 2})["result"] == {"value": 2}
    assert perform(tmp_path, case, broken)["status"] == "done"
    assert len(records(tmp_path)) == 1 and source().keys() == {"commit", "dirty"}


def test_the_command_makes_runs_side_by_side(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.lab", "theory", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=Path(lab.__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {record["status"] for record in records(tmp_path / "results" / "theory")} == {"done"}


def test_what_is_in_training_elsewhere_is_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.lab.workshop.PATIENCE", 0.0)
    changes = {"rank": 2, "steps": 2, "batch": 1}
    trained = Workshop(tmp_path).adapter("poodle", 0, changes)
    (file,) = tmp_path.glob("*.safetensors")
    file.unlink()
    (lock,) = tmp_path.glob("*.lock")
    with FileLock(lock), pytest.raises(Postponed, match="poodle"):
        Workshop(tmp_path).adapter("poodle", 0, changes)
    assert not file.exists()
    assert Workshop(tmp_path).adapter("poodle", 0, changes).tokens == trained.tokens


def test_what_is_lost_is_nothing_of_the_concept_itself_and_all_of_it_without(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path)
    own, other = (
        workshop.adapter(name, slot, {"rank": 2, "steps": 2, "batch": 1}) for slot, name in enumerate(("poodle", "wizard"))
    )
    (itself,), (missing,) = workshop.lost(own, [own]), workshop.lost(own.scaled(0.0), [own])
    assert itself < 1e-6 and missing == pytest.approx(1.0, rel=1e-3)
    silent = fuse([other.scaled(0.0), own], method="sum")  # the token has another number there
    assert workshop.lost(silent, [own])[0] < 1e-6


def test_a_variant_of_the_aligned_sum_is_the_one_that_it_says(tmp_path: Path) -> None:
    workshop, changes = Workshop(tmp_path), {"rank": 2, "steps": 2, "batch": 1, "unet_rate": 0.1}
    adapters = [workshop.adapter(name, slot, changes) for slot, name in enumerate(("poodle", "wizard"))]
    parts = [adapter.concepts[0] for adapter in adapters]
    key = next(key for key in parts[0].layers if key.startswith("unet") and ".attn1.to_q" in key)
    deltas = [part.delta(key) for part in parts]
    factors = [part.activations[input_group(key)].double() for part in parts]

    def joined(**variant: float | str) -> torch.Tensor:
        variants = alignment._variant(workshop, adapters, **variant)
        return fuse(variants, method="aligned", allow_overlap=True).delta(key).dense().double()

    ships = joined()
    same = dict(rtol=1e-3, atol=1e-5 * float(ships.abs().max()))
    plain = fuse(adapters, method="sum").delta(key).dense().double()
    torch.testing.assert_close(joined(where="nowhere"), plain, **same)
    other = aligned_sum(deltas, [1.0, 1.0], Inputs(factors), rho=0.5).dense().double()
    torch.testing.assert_close(joined(rho=0.5), other, **same)

    words = [f"a {part.class_word}" for part in parts]
    measured = [measure_activations(workshop.base, word, tuple(parts[0].layers), alignment._SEED) for word in words]
    bare = sum((own := one[input_group(key)].double()) @ own.T for one in measured) / len(measured)
    grams, near = [factor @ factor.T for factor in factors], RHO * torch.eye(len(bare), dtype=torch.double)
    inverse = torch.linalg.inv(sum(grams) + 0.3 * bare + near)
    expected = sum(
        own.up.double() @ (inverse @ (gram + near) @ own.down.double()).T for own, gram in zip(deltas, grams, strict=True)
    )
    alone = sum((own.dense().double() @ factor).square().sum() for own, factor in zip(deltas, factors, strict=True))
    expected *= (alone / (expected.T @ expected @ (sum(grams) + 0.3 * bare)).trace()).sqrt()
    torch.testing.assert_close(joined(base=0.3), expected, **same)
    assert min(float((joined(**other) - ships).abs().max()) for other in ({"rho": 0.5}, {"base": 0.3})) > same["atol"]


def test_the_parts_that_bleed_are_together_the_whole_change(tmp_path: Path) -> None:
    adapter = Workshop(tmp_path).adapter("poodle", 1, {"rank": 2, "steps": 3, "batch": 1, "unet_rate": 0.1})
    key = next(key for key in adapter.layer_keys() if ".attn1.to_q" in key)
    terms = [bleeding.part_of(adapter, term, ["attn1"]) for term in bleeding.TERMS]
    whole, each = adapter.delta(key).dense(), [term.delta(key).dense() for term in terms]
    torch.testing.assert_close(sum(each), whole)
    assert all(float(part.norm()) > 1e-3 * float(whole.norm()) for part in each)
    band = adapter.concepts[0].layers[key].band
    torch.testing.assert_close(each[0] @ band.V @ band.V.T, each[0])
    torch.testing.assert_close(band.U @ band.U.T @ each[1], each[1])
    assert all(".attn1." in name for name in terms[0].layer_keys())


def test_a_case_that_is_postponed_is_made_after_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order = []

    def measure(case: dict[str, object], workshop: Workshop) -> dict[str, object]:
        order.append(case["name"])
        if order == ["first"]:
            raise Postponed("busy")
        return {}

    experiment = SimpleNamespace(cases=lambda config: [{"name": "first"}, {"name": "second"}], measure=measure)
    experiment.show = lambda found: ({}, "")
    monkeypatch.setitem(lab.EXPERIMENTS, "theory", experiment)
    assert lab.run(["theory"], "quick", tmp_path) == 0
    assert order == ["first", "second", "first"]
    assert len(records(tmp_path / "results" / "theory")) == 2


def test_theory_finds_what_the_mathematics_says(tmp_path: Path) -> None:
    config = QUICK["theory"]
    results = {}
    for case in theory.cases(config):
        if case["kind"] != "neuron" and case["method"] in ("additive", "rotational", "lora", "orthogonal"):
            results[case["kind"], case["method"]] = theory.measure(case, Workshop(tmp_path))
        elif case["kind"] == "neuron":
            cosines = theory.measure(case, Workshop(tmp_path))["cosines"]
    ranks = {method: results["rank", method]["rank"] for method in ("additive", "rotational", "lora")}
    assert ranks == {"additive": 4, "rotational": 2, "lora": 2}
    turned = results["overlap", "rotational"]
    assert max(turned["read"], turned["write"]) < 1e-5
    assert results["overlap", "orthogonal"]["read"] < 1e-5 < results["overlap", "orthogonal"]["write"]
    assert min(results["overlap", "lora"].values()) > 1e-5
    assert cosines[0] > 0.9 > max(cosines[1:])


def test_the_language_model_reads_from_left_to_right_and_learns() -> None:
    torch.manual_seed(0)
    model = language.ByteModel(width=16, depth=2, heads=2, length=8)
    ids = torch.randint(256, (2, 8))
    later = ids.clone()
    later[:, 5:] = 0
    torch.testing.assert_close(model(ids)[:, :5], model(later)[:, :5])
    assert not torch.allclose(model(ids)[:, 5:], model(later)[:, 5:])
    assert len(language.sources()) > 1e6 and len(language.prose()) > 1e5


def test_a_form_whose_training_ends_early_is_named(tmp_path: Path) -> None:
    case = {"kind": "train", "concept": "poodle", "methods": {"the form": {"parametrisation": "nonsense"}}}
    with pytest.raises(RuntimeError, match="the training of the form ended early"):
        cost.measure(case, Workshop(tmp_path))


def test_a_step_is_timed_where_only_every_tenth_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, here of one step a second."""
    told: list[float] = []
    clock = iter((0, 1, 1, 10, 10, 20, 20))

    def train(*anything: object, on_progress: Callable[[object], None]) -> None:
        for step in (1, 10, 20):
            on_progress(SimpleNamespace(step=step))
        raise InterruptedError

    monkeypatch.setattr(cost, "train", train)
    monkeypatch.setattr(cost, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    turns = SimpleNamespace(send=told.append, recv=lambda: "your turn")
    with pytest.raises(InterruptedError):
        cost._train("poodle", {}, tmp_path, turns)
    assert told == [1, 1, 1]


def test_the_words_of_the_command_are_checked(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["lab", "nonsense"])
    with pytest.raises(SystemExit):
        main()
    assert "invalid choice: 'nonsense'" in capsys.readouterr().err
    assert set(PARAMETRISATIONS) >= set(theory._METHODS) - {"additive, isolated"}
