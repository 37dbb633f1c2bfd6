"""FLOPs, parameters and bytes: against XLA's own count, the paper's numbers and each other."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from support.tiny import TINY

from mor_jax.config import ModelConfig, RouterConfig
from mor_jax.models import params as state
from mor_jax.models.flops import (
    activation_bytes,
    computed_shares,
    effective_parameters,
    flops,
    kv_bytes,
    memory,
    routed_shares,
    unique_parameters,
)
from mor_jax.runtime.hardware import CHIPS, mfu, peak_flops
from mor_jax.types import Batch

# Wide against its heads and its row, so that products outweigh the softmax and the norms that XLA
# counts as well. Every stack holds one layer: XLA counts the body of a scan once, however long.
WIDE = ModelConfig(
    vocab_size=512,
    hidden_size=256,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    intermediate_size=768,
    max_seq_len=128,
    dtype="float32",
    attention="xla",
)
LENGTH = 128
EXPERT = RouterConfig(kind="expert")
TOKEN = RouterConfig(kind="token", activation="softmax", alpha=1.0)


def _wide(sharing: str = "middle_cycle", recursions: int = 3, **changes) -> ModelConfig:
    layers = recursions + 2 * sharing.startswith("middle")
    cfg = dataclasses.replace(
        WIDE, sharing=sharing, num_recursions=recursions, num_layers=layers, **changes
    )
    cfg.validate()
    return cfg


def _expert(**changes) -> RouterConfig:
    return dataclasses.replace(EXPERT, **changes)


def _token(**changes) -> RouterConfig:
    return dataclasses.replace(TOKEN, **changes)


VARIANTS = {
    "plain": WIDE,
    "untied": dataclasses.replace(WIDE, tie_embeddings=False),
    "cycle": _wide("cycle"),
    "sequence": _wide("sequence"),
    "middle_cycle": _wide(),
    "middle_sequence": _wide("middle_sequence"),
    "norms": _wide(share_norms=False),
    "kv": _wide(kv_mode="shared"),
    "expert": _wide(router=EXPERT),
    "expert_cycle": _wide("cycle", 2, router=EXPERT),
    "expert_capacities": _wide(router=_expert(capacity=(0.9, 0.5, 0.1))),
    "expert_mlp": _wide(router=_expert(arch="mlp")),
    "expert_aux_router": _wide(router=_expert(arch="mlp", causal_routing="aux_router")),
    "expert_kv": _wide(router=EXPERT, kv_mode="shared"),
    "expert_kv_update": _wide(router=EXPERT, kv_mode="shared_update"),
    "expert_kv_capacities": _wide(router=_expert(capacity=(0.5, 0.5, 0.2)), kv_mode="shared"),
    "token": _wide(router=TOKEN),
    "token_mlp": _wide(router=_token(arch="mlp", load_balancing="loss_free")),
    "token_capacity": _wide(router=_token(capacity_factor=1.0)),
    "token_kv": _wide(router=_token(capacity_factor=1.25), kv_mode="shared"),
}


def _outputs(cfg: ModelConfig, params, tokens):
    """Logits and the routers' sums: whatever is not returned, JAX would not lower."""
    output = state.forward(cfg, params, Batch(tokens=tokens, targets=tokens))
    return state.unembed(cfg, params, output.hidden), output.routing


def _loss(params, cfg: ModelConfig, tokens):
    return jnp.sum(_outputs(cfg, params, tokens)[0] ** 2)


def _xla_flops(cfg: ModelConfig, fn, length: int = LENGTH) -> float:
    """XLA's count for one row of `fn(cfg, params, tokens)`, per token; nothing is allocated."""
    params = state.abstract_params(cfg)
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    lowered = jax.jit(lambda p, t: fn(cfg, p, t)).lower(params, tokens)
    return lowered.cost_analysis()["flops"] / length


@pytest.mark.parametrize("name", VARIANTS)
def test_forward_flops_agree_with_xla(name):
    cfg = VARIANTS[name]
    stages = flops(cfg, LENGTH).computed
    counted = sum(stage.forward(causal=False) for stage in stages) + 2 * 256 * 512
    assert counted == pytest.approx(_xla_flops(cfg, _outputs), rel=0.03)
    if cfg.router.kind != "token":
        assert flops(cfg, LENGTH).forward(causal=False) == pytest.approx(counted)


def _gradient(cfg: ModelConfig, params, tokens):
    return jax.grad(_loss)(params, cfg, tokens)


@pytest.mark.parametrize(
    ("name", "attention", "remat"),
    [
        ("plain", "xla", "none"),
        ("expert", "xla", "none"),
        ("expert", "blockwise", "block"),
        ("plain", "blockwise", "full"),
        ("middle_sequence", "xla", "full"),
        ("token_kv", "blockwise", "none"),
    ],
)
def test_training_flops_agree_with_xla(name, attention, remat):
    cfg = dataclasses.replace(VARIANTS[name], attention=attention, remat=remat)
    assert flops(cfg, LENGTH).hardware() == pytest.approx(_xla_flops(cfg, _gradient), rel=0.03)


def test_blockwise_attention_skips_what_no_block_can_see():
    cfg = dataclasses.replace(VARIANTS["expert_kv"], attention="blockwise", max_seq_len=512)
    dense = dataclasses.replace(cfg, attention="xla")
    counted = sum(stage.forward(causal=False) for stage in flops(cfg, 512).computed)
    assert counted < 0.97 * flops(dense, 512).forward(causal=False, head=False)
    assert counted + flops(cfg, 512).head == pytest.approx(_xla_flops(cfg, _outputs, 512), rel=0.03)


def test_rematerialisation_runs_products_again():
    layer = flops(WIDE, LENGTH).computed[0]
    down = layer.mlp / 3
    none, block, full = (
        flops(dataclasses.replace(WIDE, num_layers=2, remat=remat), LENGTH).recomputed
        for remat in ("none", "block", "full")
    )
    # Without any, dense attention is made again from its inputs.
    assert none == pytest.approx(2 * layer.attention)
    assert block == pytest.approx(none + 2 * 2 * down)
    assert full == pytest.approx(2 * (layer.forward(causal=False) - down))


@pytest.mark.parametrize("name", TINY)
def test_unique_parameters_equal_the_tree(name):
    cfg = TINY[name]
    params = state.abstract_params(cfg)
    stored = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert unique_parameters(cfg) == stored
    tables = sum(
        leaf.size for key in ("embed", "head") for leaf in jax.tree.leaves(params.get(key))
    )
    assert unique_parameters(cfg, embedding=False) == stored - tables


def _paper(**changes) -> ModelConfig:
    """The paper's 360M model (SmolLM sizes)."""
    sizes = dict(
        hidden_size=960,
        num_layers=32,
        num_heads=15,
        num_kv_heads=5,
        head_dim=64,
        intermediate_size=2560,
    )
    cfg = ModelConfig(vocab_size=49152, **{**sizes, **changes})
    cfg.validate()
    return cfg


def _mor(recursions: int, router: RouterConfig = EXPERT, **changes) -> ModelConfig:
    return _paper(sharing="middle_cycle", num_recursions=recursions, router=router, **changes)


@pytest.mark.parametrize(
    ("cfg", "millions", "digits"),
    [(_paper(), 314.6, 1), (_mor(2), 167, 0), (_mor(3), 118, 0)],
    ids=["plain", "2", "3"],
)
def test_parameters_of_the_paper(cfg, millions, digits):
    assert round(unique_parameters(cfg, embedding=False) / 1e6, digits) == millions
    assert round(effective_parameters(cfg, embedding=False) / 1e6, 1) == 314.6


# The paper's tables hold steps of 1024 x 2048 tokens for 16.5e18 FLOPs. They follow from forward
# FLOPs without the head, causal attention halved, and keys and values as wide as the queries.
@pytest.mark.parametrize(
    ("cfg", "steps"),
    [
        (_paper(), 9438),
        (_mor(2), 12619),
        (_mor(3), 14161),
        (_mor(4, num_layers=34), 14216),
        (_mor(3, TOKEN), 14161),
        (_mor(3, kv_mode="shared"), 14672),
    ],
    ids=["plain", "2", "3", "4", "token", "kv"],
)
def test_steps_of_the_paper_follow_from_its_budget(cfg, steps):
    wide = dataclasses.replace(cfg, num_kv_heads=cfg.num_heads)
    per_token = flops(wide, 2048).forward(head=False)
    assert 16.5e18 / per_token / (1024 * 2048) == pytest.approx(steps, rel=3e-4)


def test_flops_are_proportional_to_layers():
    deep = _mor(3)
    shallow = dataclasses.replace(deep, num_layers=5)
    pairs = list(zip(flops(deep, 512).routed[1:4], flops(shallow, 512).routed[1:4], strict=True))
    assert len(pairs) == 3
    for many, one in pairs:
        assert many.layers == 10
        assert one.layers == 1
        assert many.forward() - many.router == pytest.approx(10 * (one.forward() - one.router))


def test_stages_add_up_and_causal_halves_attention():
    report = flops(_mor(3), 2048)
    assert [s.name for s in report.routed] == [
        "first",
        *(f"recursion {r}" for r in range(3)),
        "last",
    ]
    assert [round(s.share * 2048) for s in report.routed] == [2048, 2048, 1365, 682, 2048]
    attention = sum(stage.attention for stage in report.routed)
    assert report.forward(causal=False) - report.forward() == pytest.approx(attention / 2)
    assert report.training() == pytest.approx(3 * report.forward())
    assert report.head == 2 * 960 * 49152


def test_realised_shares_replace_the_expected_ones():
    cfg = _mor(3, TOKEN)
    assert flops(cfg, 512, (1.0, 2 / 3, 1 / 3)) == flops(cfg, 512)
    shallow, deep = flops(cfg, 512, (1.0, 0.0, 0.0)), flops(cfg, 512, (1.0, 1.0, 1.0))
    assert shallow.routed[2].forward() == 0
    plain = flops(dataclasses.replace(cfg, router=RouterConfig()), 512)
    router = deep.routed[1].router
    assert deep.forward() == pytest.approx(plain.forward() + router)
    # What the static shapes execute does not depend on what was routed.
    assert shallow.hardware() == deep.hardware()


@pytest.mark.parametrize("shares", [(1.0, 0.5), (1.0, 0.5, 1.5)])
def test_shares_that_do_not_fit_are_refused(shares):
    with pytest.raises(ValueError, match=r"shares=.*per recursion \(3\)"):
        flops(_mor(3), 512, shares)


def test_token_choice_without_capacity_computes_every_token():
    cfg = _mor(3, TOKEN)
    assert routed_shares(cfg, 300) == pytest.approx((1, 2 / 3, 1 / 3))
    assert computed_shares(cfg, 300) == (1, 1, 1)
    tight = dataclasses.replace(cfg, router=_token(capacity_factor=1.2))
    assert computed_shares(tight, 300) == pytest.approx((1, 240 / 300, 120 / 300))
    assert flops(tight, 300).hardware() < flops(cfg, 300).hardware()
    assert flops(tight, 300).training() == flops(cfg, 300).training()


def test_kv_bytes():
    pair = 2 * 5 * 64 * 2
    assert kv_bytes(_paper(), 2048) == 32 * pair
    thirds = 1 + 1365 / 2048 + 682 / 2048
    assert kv_bytes(_mor(3), 2048) == pytest.approx((2 + 10 * thirds) * pair)
    assert kv_bytes(_mor(3), 2048, (1.0, 1.0, 1.0)) == 32 * pair
    assert kv_bytes(_mor(3, kv_mode="shared"), 2048) == 12 * pair
    update = kv_bytes(_mor(3, kv_mode="shared_update"), 2048)
    assert update == pytest.approx(kv_bytes(_mor(3), 2048))
    assert kv_bytes(_paper(dtype="float32"), 2048) == 64 * pair


def test_activation_bytes():
    cfg = _paper(attention="blockwise")
    # Ten arrays a layer, two bytes an entry, and a float32 normaliser a head; dense attention makes
    # its result and the normaliser again.
    dense = 2 * (2 * 960 + 2 * 2560 + 960 + 2 * 320)
    layer = dense + 2 * 960 + 4 * 15
    assert activation_bytes(cfg, 2048) == 32 * layer
    assert activation_bytes(dataclasses.replace(cfg, attention="xla"), 2048) == 32 * dense
    wide = 2 * 2 * 2560
    block = activation_bytes(dataclasses.replace(cfg, remat="block"), 2048)
    assert block == 32 * (layer - wide) + wide
    full = activation_bytes(dataclasses.replace(cfg, remat="full"), 2048)
    assert full == 32 * 2 * 960 + layer
    assert activation_bytes(dataclasses.replace(cfg, remat="offload"), 2048) == layer + 2 * 960
    routed = [
        activation_bytes(_mor(n, remat=kind), 2048) for kind in ("none", "full") for n in (2, 3)
    ]
    assert routed[0] > routed[1] > routed[2] > routed[3]


@pytest.mark.parametrize("remat", ["none", "block", "full"])
def test_activation_bytes_are_what_the_compiled_step_holds(remat):
    def held(layers: int) -> tuple[float, float]:
        cfg = dataclasses.replace(WIDE, num_layers=layers, attention="blockwise", remat=remat)
        tokens = jax.ShapeDtypeStruct((8, LENGTH), jnp.int32)
        params = state.abstract_params(cfg)
        compiled = jax.jit(lambda p, t: _gradient(cfg, p, t)).lower(params, tokens).compile()
        temporary = compiled.memory_analysis().temp_size_in_bytes / (8 * LENGTH)
        return temporary, activation_bytes(cfg, LENGTH)

    # What does not grow with depth (logits, one layer's temporaries) falls out of the difference.
    (few, formula_few), (many, formula_many) = held(2), held(6)
    assert many - few == pytest.approx(formula_many - formula_few, rel=0.01)


def test_memory_collects_every_byte_count():
    cfg = _mor(2)
    report = memory(cfg, 2048)
    assert report.parameters == 4 * unique_parameters(cfg)
    assert report.train_state == 12 * unique_parameters(cfg)
    assert (report.kv, report.logits) == (kv_bytes(cfg, 2048), 4 * 49152)
    assert report.activations == activation_bytes(cfg, 2048)


def test_peaks_are_dense_and_never_guessed():
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("TPU v5 lite") == peak_flops("TPU v5e") == 197e12
    assert peak_flops(jax.devices("cpu")[0].device_kind) is None
    assert peak_flops("NVIDIA H100 80GB HBM4") is None
    for chip in CHIPS.values():
        assert 1e14 < chip.peak < 3e15
        assert 16 * 2**30 <= chip.memory <= 192 * 2**30
        # A product of two 4096-wide bfloat16 matrices is bound by arithmetic on each of them.
        assert 50 < chip.peak / chip.bandwidth < 700


def test_mfu():
    assert mfu(2e9, 100_000.0, "NVIDIA H100 80GB HBM3") == pytest.approx(2e14 / 989e12)
    assert mfu(2e9, 100_000.0, "NVIDIA H100 80GB HBM3", devices=4) == pytest.approx(5e13 / 989e12)
    assert mfu(2e9, 100_000.0, "cpu") is None


@pytest.mark.parametrize(
    ("argument", "told"),
    [
        (
            "--config.model.router.capacity_multiple=0",
            "error: --config.model.router.capacity_multiple=0: ",
        ),
        ("--length=-5", "length"),
        (f"--length={10**30}", f"error: --length={10**30}: must be at most 2147483647, 32 bits"),
        ("--length=1000000", "error: --length=1000000: must be between 2 and model.max_seq_len"),
    ],
)
def test_the_command_says_what_is_wrong_without_a_traceback(argument, told):
    root = Path(__file__).parents[2]
    command = [sys.executable, str(root / "launch" / "accounting.py")]
    config = f"--config={root / 'configs' / 'mor.py'}"
    done = subprocess.run([*command, config, argument], capture_output=True, text=True)
    assert done.returncode == 2 and told in done.stderr and "Traceback" not in done.stderr
