"""`mor evaluate` from a checkout; the code is in mor_jax/cli/evaluate.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mor_jax.cli.main import run

if __name__ == "__main__":
    run("evaluate")
