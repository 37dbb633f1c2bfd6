"""The shipped configurations in a checkout, where they lie in the folder `configs` at the top.

The installed package has those files in the place of this one.
"""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parents[2] / "configs")]
