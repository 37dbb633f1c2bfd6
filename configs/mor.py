"""Mixture-of-Recursions: routers decide how often each token passes the shared block.

    mor train --config=mor --workdir=runs/mor
    mor train --config=mor:size=360m,recursions=2 --workdir=runs/mor-360m
    mor train --config=mor:routing=token,kv=shared --workdir=runs/token

Defaults: 200 steps on the source text of the standard library, 36 seconds on two CPU cores, final
validation loss 2.074 nats per byte. The other sizes are meant for accelerators.
Keys after the colon: size, routing (expert or token), recursions, kv (recursion, shared or
shared_update), sharing (middle_cycle or cycle).
The paper compares models at equal FLOPs: at 360m and 16.5e18 FLOPs, 9,438 steps of vanilla equal
12,619, 14,161 and 14,216 steps of expert-choice with 2, 3 and 4 recursions and 14,161 steps of
token-choice with 3. Set them with `--config.steps`, together with `optim.warmup_steps` and
`optim.decay_steps`.
"""

from ml_collections import ConfigDict

from mor_jax.configs import common


def get_config(arg: str = "") -> ConfigDict:
    """Returns the locked configuration for `arg`."""
    choice = common.parse_arg(
        arg,
        size="debug",
        routing="expert",
        kv="recursion",
        recursions=3,
        sharing="middle_cycle",
    )
    return common.train(common.recursive_model(**vars(choice)), choice.size)
