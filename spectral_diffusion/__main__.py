"""`python -m spectral_diffusion` is the same as `spectral-diffusion`."""

import sys

from spectral_diffusion.cli import main

if __name__ == "__main__":
    sys.exit(main())
