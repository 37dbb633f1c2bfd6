"""Mixture-of-Recursions: routers decide how often each token passes the shared block.

    python launch/train.py --config=configs/mor.py --workdir=runs/mor
    python launch/train.py --config=configs/mor.py:size=360m,recursions=2 --workdir=runs/mor-360m
    python launch/train.py --config=configs/mor.py:routing=token,kv=shared --workdir=runs/token

Without choices: 200 steps on the standard library's text, 36 seconds on two CPU cores, ending at
2.074 nats per held-out byte. The other sizes are meant for accelerators.
Choices after the colon: size, routing (expert or token), recursions, kv (recursion, shared or
shared_update), sharing (middle_cycle or cycle).
The paper compares models at equal FLOPs: at 360m and 16.5e18 FLOPs, 9,438 steps of vanilla stand
against 12,619, 14,161 and 14,216 steps of expert-choice with 2, 3 and 4 recursions and 14,161 of
token-choice with 3. `--config.steps` sets them; set `optim.warmup_steps` and `optim.decay_steps`
with it.
"""

from ml_collections import ConfigDict

from mor_jax.configs import common


def get_config(arg: str = "") -> ConfigDict:
    """Returns the locked configuration that the choices in `arg` name."""
    choice = common.parse_arg(
        arg,
        size="debug",
        routing="expert",
        kv="recursion",
        recursions=3,
        sharing="middle_cycle",
    )
    return common.train(common.shared_model(**vars(choice)), choice.size)
