"""Where the shipped configurations and the training script lie: in a checkout, or installed."""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]

CHECKOUT = PACKAGE.parent if (PACKAGE.parent / "launch" / "train.py").is_file() else None
"""The repository that this package is a part of; None where it was installed."""

CONFIGS = PACKAGE / "configs" if CHECKOUT is None else CHECKOUT / "configs"
"""The directory of the shipped configurations."""

TRAIN = PACKAGE / "cli" / "train.py" if CHECKOUT is None else CHECKOUT / "launch" / "train.py"
"""A script that trains, for commands that start other processes."""


def shipped() -> list[str]:
    """Names of the shipped configurations, such as `mor`."""
    files = (path.stem for path in sorted(CONFIGS.glob("*.py")))
    return [name for name in files if name not in ("__init__", "common")]


def config_path(given: str) -> str:
    """`mor:size=360m` as the path of a shipped configuration; anything else stays as it is."""
    name, colon, choices = given.partition(":")
    if name in shipped() and not Path(name).is_file():
        return f"{CONFIGS / name}.py{colon}{choices}"
    return given
