"""Vanilla transformer: a Llama-style decoder, the baseline.

    mor train --config=vanilla --workdir=runs/vanilla
    mor train --config=vanilla:size=360m --workdir=runs/vanilla-360m

Defaults: 200 steps on the source text of the standard library, 35 seconds on two CPU cores, final
validation loss 2.138 nats per byte. The other sizes are meant for accelerators.
Keys after the colon: size.
"""

from ml_collections import ConfigDict

from mor_jax.configs import common


def get_config(arg: str = "") -> ConfigDict:
    """Returns the locked configuration for `arg`."""
    choice = common.parse_arg(arg, size="debug")
    return common.train(common.vanilla_model(choice.size), choice.size)
