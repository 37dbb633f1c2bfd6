"""A plain Llama-style decoder, the baseline.

    python launch/train.py --config=configs/vanilla.py --workdir=runs/vanilla
    python launch/train.py --config=configs/vanilla.py:size=360m --workdir=runs/vanilla-360m

Without choices: 200 steps on the standard library's text, 35 seconds on two CPU cores, ending at
2.138 nats per held-out byte. The other sizes are meant for accelerators.
Choices after the colon: size.
"""

from ml_collections import ConfigDict

from mor_jax.configs import common


def get_config(arg: str = "") -> ConfigDict:
    """Returns the locked configuration that the choices in `arg` name."""
    choice = common.parse_arg(arg, size="debug")
    return common.train(common.plain_model(choice.size), choice.size)
