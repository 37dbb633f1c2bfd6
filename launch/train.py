"""Trains a model: python launch/train.py --config=configs/mor.py:size=debug --workdir=runs/mor."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from absl import app, flags, logging
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration, such as configs/mor.py.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run; an existing one goes on.")
flags.mark_flags_as_required(["config", "workdir"])


def main(_: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    from mor_jax.config import TrainConfig
    from mor_jax.train import Stopped, fit

    try:
        fit(TrainConfig.from_dict(_CONFIG.value.to_dict()), _WORKDIR.value)
    except (ValueError, Stopped) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    app.run(main)
