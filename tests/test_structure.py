"""The shape of the code: imports go one way, files stay short, public names stand in one list."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import spectral_diffusion

PACKAGE = Path(spectral_diffusion.__file__).parent
LONGEST_FILE = 400


def modules() -> dict[str, Path]:
    """Return every module of the library by its dotted name."""
    names = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def imports_at_start(path: Path) -> set[str]:
    """Return the modules that `path` imports when it is imported itself."""
    found: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_imports_go_one_way() -> None:
    known = modules()
    graph = {
        name: {other for other in imports_at_start(path) if other in known and other != name} for name, path in known.items()
    }
    packages = {name for name, path in known.items() if path.name == "__init__.py"}
    for name in graph:
        # A package's list of its own modules' names is no dependency of theirs.
        graph[name] -= {package for package in packages if name.startswith(f"{package}.")}
    done: set[str] = set()
    while graph.keys() - done:
        free = {name for name in graph.keys() - done if graph[name] <= done}
        assert free, f"These modules import each other in a circle: {sorted(graph.keys() - done)}"
        done |= free


def test_the_library_never_imports_the_studio() -> None:
    for name, path in modules().items():
        roots = {other.split(".")[0] for other in imports_at_start(path)}
        assert not roots & {"app", "gradio"}, name


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = "import sys, spectral_diffusion, spectral_diffusion.cli; print('torch' in sys.modules, 'diffusers' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.split() == ["False", "False"]


def test_files_stay_short() -> None:
    long = {name: lines for name, path in modules().items() if (lines := len(path.read_text().splitlines())) > LONGEST_FILE}
    assert not long


def test_every_public_name_is_there() -> None:
    missing = [name for name in spectral_diffusion.__all__ if not callable(getattr(spectral_diffusion, name, None))]
    assert not missing
