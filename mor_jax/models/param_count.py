"""Parameter counts by formula, from the configuration alone.

A shared weight counts once, as in the stored tree. Needs no JAX, so that initialisation,
checkpoints and converters can all be checked against the same numbers.
"""

import dataclasses

from mor_jax.config import ModelConfig, RouterConfig


def effective(cfg: ModelConfig) -> ModelConfig:
    """The vanilla model of the same depth and width: nothing shared, nothing routed."""
    return dataclasses.replace(
        cfg,
        sharing="none",
        num_recursions=1,
        kv_mode="recursion",
        share_norms=True,
        router=RouterConfig(),
    )


def unique_parameters(cfg: ModelConfig, *, embedding: bool = True) -> int:
    """Number of stored parameters; shared ones count once.

    embedding: include the embedding and the untied head; without them this is the
    "non-embedding" count of the paper's tables (314.6M for the vanilla 360M model).
    """
    d = cfg.hidden_size
    pairs = cfg.unique_layers
    if not cfg.share_norms:
        pairs += cfg.shared_layers * (cfg.num_recursions - 1)
    stacks = cfg.unique_layers * layer_weights(cfg) + pairs * 2 * d
    tables = (1 if cfg.tie_embeddings else 2) * cfg.vocab_size * d
    return stacks + d + _router_weights(cfg) + (tables if embedding else 0)


def effective_parameters(cfg: ModelConfig, *, embedding: bool = True) -> int:
    """`unique_parameters` of the vanilla model of the same depth."""
    return unique_parameters(effective(cfg), embedding=embedding)


def layer_weights(cfg: ModelConfig) -> int:
    """Matrix entries of one layer; also its multiply-adds per token outside attention scores."""
    return (
        query_output_weights(cfg)
        + key_value_weights(cfg)
        + 3 * cfg.hidden_size * cfg.intermediate_size
    )


def query_output_weights(cfg: ModelConfig) -> int:
    """Matrix entries of one layer's query and output projections."""
    return 2 * cfg.hidden_size * cfg.num_heads * cfg.head_dim


def key_value_weights(cfg: ModelConfig) -> int:
    """Matrix entries of one layer's key and value projections."""
    return 2 * cfg.hidden_size * cfg.num_kv_heads * cfg.head_dim


def scorer_weights(cfg: ModelConfig, outputs: int) -> int:
    """Matrix entries of one router network with `outputs` scores per token."""
    if cfg.router.arch == "linear":
        return cfg.hidden_size * outputs
    return 2 * cfg.hidden_size * (cfg.hidden_size + outputs)


def scorers(cfg: ModelConfig) -> int:
    """Number of router networks per expert-choice recursion."""
    return 2 if cfg.router.causal_routing == "aux_router" else 1


def _router_weights(cfg: ModelConfig) -> int:
    router, nr = cfg.router, cfg.num_recursions
    if router.kind == "expert":
        return nr * scorers(cfg) * scorer_weights(cfg, 1)
    if router.kind == "token":
        return scorer_weights(cfg, nr) + (nr if router.load_balancing == "loss_free" else 0)
    return 0
