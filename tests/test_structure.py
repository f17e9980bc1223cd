"""The shape of the code: imports go one way, files stay short, public names stand in one list."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import spectral_diffusion

PACKAGE = Path(spectral_diffusion.__file__).parent
LONGEST_FILE = 400


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(path: Path) -> set[str]:
    """Return the modules that `path` imports, inside functions too: a late import hides a circle and does not break it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"'{path}' has a relative import; write it in full"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} & MODULES.keys() or {node.module}
    return found


def test_imports_go_one_way() -> None:
    graph = {name: imports(path) & MODULES.keys() for name, path in MODULES.items()}
    assert sum(map(len, graph.values())) > len(graph)
    TopologicalSorter(graph).prepare()  # a CycleError names the circle


def room_of(name: str) -> str:
    """Return the folder that a module lies in, or the module where it lies in none; the recipe is a room beside its toy world."""
    parts = name.split(".")
    return ".".join(parts[1:3] if parts[1:3] == ["toyworld", "recipe"] else parts[1:2])


def test_rooms_are_entered_one_way() -> None:
    graph: dict[str, set[str]] = {}
    for name, path in MODULES.items():
        graph.setdefault(room_of(name), set()).update(room_of(other) for other in imports(path) & MODULES.keys())
    doors = {room: others - {room} for room, others in graph.items()}
    assert doors["adapters"] and "training" in doors["cli"]
    TopologicalSorter(doors).prepare()


def test_the_library_never_imports_the_studio() -> None:
    roots = {name.partition(".")[0] for path in MODULES.values() for name in imports(path)}
    assert "torch" in roots and not roots & {"app", "gradio", "benchmarks", "tests"}


def test_the_studio_imports_one_way_and_gradio_stays_in_its_page() -> None:
    folder = PACKAGE.parent / "app"
    before = {"jobs": ("app.actions", "app.ui"), "actions": ("app.ui",)}
    seen = set()
    for path in sorted(folder.rglob("*.py")):
        part, found = path.relative_to(folder).parts[0], imports(path)
        wrong = [
            name for name in found if name.startswith(before.get(part, ())) or (part != "ui" and name.split(".")[0] == "gradio")
        ]
        assert not wrong, f"'{path}' imports {wrong}"
        assert len(path.read_text(encoding="utf-8").splitlines()) < LONGEST_FILE
        seen |= found
    assert "gradio" in seen and "spectral_diffusion.training" in seen


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = "import sys, spectral_diffusion, spectral_diffusion.cli; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "spectral_diffusion.cli" in loaded
    assert not {"torch", "diffusers", "transformers", "open_clip"} & set(loaded)


def test_files_stay_short() -> None:
    lengths = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in MODULES.items()}
    assert not {name: lines for name, lines in lengths.items() if lines >= LONGEST_FILE}


def test_every_public_name_is_there() -> None:
    missing = [name for name in spectral_diffusion.__all__ if not callable(getattr(spectral_diffusion, name, None))]
    assert spectral_diffusion.__all__ and not missing
