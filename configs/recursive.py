"""Recursive transformer: one block of layers applied several times, every token at full depth.

    mor train --config=recursive --workdir=runs/recursive
    mor train --config=recursive:size=360m,recursions=2,kv=shared

Defaults: 200 steps on the source text of the standard library, 39 seconds on two CPU cores, final
validation loss 2.286 nats per byte. The other sizes are meant for accelerators.
Keys after the colon: size, recursions, sharing, kv (recursion or shared).
"""

from ml_collections import ConfigDict

from mor_jax.configs import common


def get_config(arg: str = "") -> ConfigDict:
    """Returns the locked configuration for `arg`."""
    choice = common.parse_arg(
        arg, size="debug", recursions=3, sharing="middle_cycle", kv="recursion"
    )
    return common.train(common.recursive_model(**vars(choice), routing="none"), choice.size)
