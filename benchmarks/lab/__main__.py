"""Run experiments: `python -m benchmarks.lab [NAME ...] [--full] [--out FOLDER]`.

Every run leaves a JSON below `OUT/results/NAME/`; from those alone come the pictures and tables there. What is done already is
not done again, so a stopped bench goes on where it was. Trained adapters lie in `OUT/adapters` and serve all experiments.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch

from benchmarks.lab.bench import BY_NAME, EXPERIMENTS, MOST_WORKERS, TIMED, be_quiet, run, show


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
    be_quiet()
    size = "full" if options.full else "quick"
    names = options.names or [name for name in EXPERIMENTS if options.full or name not in BY_NAME]
    if options.show:
        for name in names:
            show(name, size, options.out)
        return 0
    timed = [name for name in names if name in TIMED]
    others = [name for name in names if name not in TIMED]
    workers = 1 if torch.cuda.is_available() else min(os.cpu_count() or 1, MOST_WORKERS)
    return int(run(timed, size, options.out) + run(others, size, options.out, workers) > 0)


if __name__ == "__main__":
    sys.exit(main())
