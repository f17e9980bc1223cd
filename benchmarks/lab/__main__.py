"""Run experiments: `python -m benchmarks.lab [NAME ...] [--full] [--out FOLDER]`.

Every run leaves a JSON below `OUT/results/NAME/`; from those alone come the pictures and tables there. What is done already is
not done again, so a stopped bench goes on where it was. Trained adapters lie in `OUT/adapters` and serve all experiments.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks.lab import cost, efficiency, fusion, language, rates, single, theory
from benchmarks.lab.record import file_name, perform, read
from benchmarks.lab.workshop import Workshop
from spectral_diffusion.files import write_atomically

EXPERIMENTS: dict[str, ModuleType] = {
    "theory": theory,
    "language": language,
    "cost": cost,
    "rates": rates,
    "single": single,
    "fusion": fusion,
    "levers": fusion,
    "many": fusion,
    "efficiency": efficiency,
}
"""Name to module; each has `cases(config)`, `measure(case, workshop)` and `show(records) -> (figures, table)`."""


def configuration(name: str, size: str) -> dict[str, Any]:
    """Return the configuration of an experiment in the size `quick` or `full`."""
    path = Path(__file__).parent / "experiments" / name / f"{size}.toml"
    return tomllib.loads(path.read_text(encoding="utf-8"))


def run(name: str, size: str, out: Path) -> int:
    """Run every case of an experiment, then show what there is; return how many cases failed."""
    experiment, folder, workshop = EXPERIMENTS[name], out / "results" / name, Workshop(out / "adapters")
    failed = 0
    for case in experiment.cases(configuration(name, size)):
        record = perform(folder, case, lambda case=case: experiment.measure(case, workshop))
        failed += record["status"] != "done"
        print(f"{name}: {case['name']}: {record['status']} in {record['seconds']} s {record.get('error', '')}", flush=True)
    show(name, size, out)
    return failed


def show(name: str, size: str, out: Path) -> None:
    """Draw the pictures and write the table of an experiment from the records of its cases that are there."""
    folder = out / "results" / name
    paths = [folder / f"{file_name(case)}.json" for case in EXPERIMENTS[name].cases(configuration(name, size))]
    records = [record for path in paths if (record := read(path)) and record["status"] == "done"]
    if not records:
        return
    figures, table = EXPERIMENTS[name].show(records)
    for label, figure in figures.items():
        write_atomically(folder / f"{label}.png", lambda path, figure=figure: figure.savefig(path, dpi=110))
    write_atomically(folder / "table.md", lambda path: path.write_text(table, encoding="utf-8"))


def main() -> int:
    """Run the experiments that were asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lab", description=__doc__)
    parser.add_argument(
        "names", nargs="*", choices=[*EXPERIMENTS, []], metavar="NAME", help=f"{', '.join(EXPERIMENTS)} (default: all)"
    )
    parser.add_argument("--full", action="store_true", help="the size for a GPU")
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="folder (default: %(default)s)")
    parser.add_argument("--show", action="store_true", help="only draw pictures and tables from the records that are there")
    options = parser.parse_args()
    logging.getLogger("spectral_diffusion").setLevel(logging.ERROR)
    failed, size = 0, "full" if options.full else "quick"
    for name in options.names or EXPERIMENTS:
        if options.show:
            show(name, size, options.out)
        else:
            failed += run(name, size, options.out)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
