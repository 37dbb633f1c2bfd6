"""The run of launch/quickstart.sh: expert-choice routing, three recursions, on two CPU cores.

    ./launch/quickstart.sh

Reads the source text of Python's standard library as bytes. No choices after the colon.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = "") -> ConfigDict:
    """Returns the locked configuration; `arg` must be empty."""
    common.parse_arg(arg)
    cfg = common.train(
        common.shared_model("debug", 3, "middle_cycle", "recursion", "expert"), "debug"
    )
    with cfg.unlocked():
        cfg.steps = 300
    return cfg
