"""The model family a second time, to compare with: NumPy in float64, masks instead of gathers.

Every token goes through every layer of every recursion, whether chosen or not; what is not chosen
is thrown away. Slow and plain on purpose: it shares no code with mor_jax but the configuration.
"""

import dataclasses
import math

import numpy as np

from mor_jax.config import ModelConfig
from mor_jax.models.routing.router import capacity_tokens


@dataclasses.dataclass
class Result:
    """What `run` returns. sums: for each recursion (expert) or in all (token), by name."""

    hidden: np.ndarray
    depth: np.ndarray | None
    sums: dict[str, np.ndarray] | None


@dataclasses.dataclass
class Row:
    """What does not change on the way through the layers."""

    cfg: ModelConfig
    segments: np.ndarray
    positions: np.ndarray
    causal: bool
    counts: tuple[int, ...]


def run(cfg, params, batch, mode="topk", counts=None) -> Result:
    params = _float64(params)
    tokens = np.asarray(batch.tokens)
    b, length = tokens.shape
    segments, positions = np.ones((b, length), int), np.tile(np.arange(length), (b, 1))
    if batch.segments is not None:
        segments = np.asarray(batch.segments)
    if batch.positions is not None:
        positions = np.asarray(batch.positions)
    row = Row(cfg, segments, positions, mode == "causal", counts or capacity_tokens(cfg, length))
    x = params["embed"]["weight"][tokens]
    everyone = np.ones((b, length), bool)
    for name in ("layers", "first"):
        if name in params:
            x, _ = _block(row, params[name], x, everyone)
    depth = sums = None
    if "shared" in params:
        stage = {"none": _plain, "expert": _expert, "token": _token}[cfg.router.kind]
        x, depth, sums = stage(row, params, x)
    if "last" in params:
        x, _ = _block(row, params["last"], x, everyone)
    return Result(_norm(x, params["norm"]["scale"], cfg.norm_eps), depth, sums)


def block(cfg, params, x):
    """The shared block on all tokens of rows that hold one document each; also its keys."""
    b, length = x.shape[:2]
    segments, positions = np.ones((b, length), int), np.tile(np.arange(length), (b, 1))
    row = Row(cfg, segments, positions, True, ())
    return _block(row, _float64(params)["shared"], x, segments > 0)


def _float64(tree):
    if isinstance(tree, dict):
        return {name: _float64(value) for name, value in tree.items()}
    return np.asarray(tree, np.float64)


def _plain(row, params, x):
    cfg, everyone = row.cfg, np.ones(x.shape[:2], bool)
    if not cfg.is_sequence:
        kv = None
        for r in range(cfg.num_recursions):
            x, used = _block(row, params["shared"], x, everyone, r, kv)
            kv = used if cfg.kv_mode != "recursion" else None
        return x, None, None
    for slot in range(cfg.shared_layers):
        kv = None
        for r in range(cfg.num_recursions):
            x, used = _layer(row, _slice(params["shared"], slot), x, everyone, r, kv)
            kv = used if cfg.kv_mode != "recursion" else None
    return x, None, None


def _expert(row, params, x):
    cfg, router = row.cfg, row.cfg.router
    active = row.segments > 0
    depth, kv = active * 0, None
    sums = {name: [] for name in ("bce", "z", "candidates", "chosen")}
    for r, share in enumerate(router.capacities(cfg.num_recursions)):
        z = _logits(router, params["router"]["main"], x / router.temperature, r)
        trained = (
            z
            if router.causal_routing != "aux_router"
            else _logits(router, params["router"]["aux"], x, r)
        )
        p = {"sigmoid": router.alpha * _sigmoid(z), "tanh": router.alpha * np.tanh(z), "none": z}
        if row.causal:
            chosen = active if share == 1 else active & (trained >= 0)
        else:
            chosen = _best(p[router.activation], active, row.counts[r])
        bce = np.log1p(np.exp(trained)) - chosen * trained
        for name, value in (("bce", bce), ("z", z * z), ("candidates", 1), ("chosen", chosen)):
            sums[name].append(np.sum(value * active))
        y, kv = _visit(row, params, x, chosen, r, kv)
        gate = p[router.activation][..., None] if router.gating == "weighted" else 1.0
        x = np.where(chosen[..., None], x + gate * y, x)
        active, depth = chosen, depth + chosen
    return x, depth, {name: np.array(values) for name, values in sums.items()}


def _token(row, params, x):
    cfg, router = row.cfg, row.cfg.router
    present = row.segments > 0
    z = _logits(router, params["router"]["main"], x / router.temperature, None)
    e = np.exp(z)
    w = router.alpha * (
        e / e.sum(-1, keepdims=True) if router.activation == "softmax" else _sigmoid(z)
    )
    choice = np.argmax(w + params["router"].get("bias", 0.0), axis=-1)
    gate = np.take_along_axis(w, choice[..., None], -1)
    active, depth, kv, state, overflow = present, present * 0, None, x, []
    for r in range(cfg.num_recursions):
        wanted = active & (choice >= r)
        active = wanted if row.causal else _best(gate[..., 0], wanted, row.counts[r])
        overflow.append(np.sum(wanted & ~active))
        y, kv = _visit(row, params, state, active, r, kv)
        state = np.where(active[..., None], y, state)
        depth = depth + active
    out = x + (gate if router.gating == "weighted" else 1.0) * state
    sums = {
        "weight": np.einsum("blr,bl->r", w, present),
        "choice": np.einsum("blr,bl->r", np.eye(cfg.num_recursions)[choice], present),
        "z": np.sum(np.log(e.sum(-1)) ** 2 * present),
        "tokens": np.sum(present),
        "overflow": np.array(overflow),
    }
    return np.where((depth > 0)[..., None], out, x), depth, sums


def _visit(row, params, x, chosen, r, kv):
    """The shared block on the chosen tokens; what it does to the others means nothing."""
    if row.cfg.kv_mode == "recursion":
        return _block(row, params["shared"], x, chosen, r)[0], None
    if r == 0:
        return _block(row, params["shared"], x, np.ones(chosen.shape, bool))
    return _block(row, params["shared"], x, chosen, r, kv)[0], kv


def _best(score, active, count):
    """The `count` active tokens of each row with the highest score."""
    chosen = np.zeros(active.shape, bool)
    for b in range(len(score)):
        ranked = sorted(np.flatnonzero(active[b]), key=lambda i: -score[b, i])
        chosen[b, ranked[:count]] = True
    return chosen


def _block(row, stack, x, chosen, r=0, kv=None):
    used = []
    for s in range(len(stack["attention"]["q"])):
        x, mine = _layer(row, _slice(stack, s), x, chosen, r, None if kv is None else kv[s])
        used.append(mine)
    return x, used


def _slice(stack, s):
    return {name: {k: v[s] for k, v in group.items()} for name, group in stack.items()}


def _layer(row, w, x, chosen, r, kv):
    """One layer. kv: keys and values of the whole row; without, chosen tokens see each other."""
    cfg, a = row.cfg, w["attention"]
    normed = _norm(x, _scale(w["norm1"], r), cfg.norm_eps)
    q = _rope(np.einsum("bld,dhk->blhk", normed, a["q"]), row)
    k = _rope(np.einsum("bld,dgk->blgk", normed, a["k"]), row)
    v = np.einsum("bld,dgk->blgk", normed, a["v"])
    visible = chosen
    if kv is not None:
        fresh = chosen[..., None, None] & (cfg.kv_mode == "shared_update")
        k, v = np.where(fresh, k, kv[0]), np.where(fresh, v, kv[1])
        visible = np.ones(chosen.shape, bool)
    x = x + np.einsum("blhk,hkd->bld", _attend(row, q, k, v, visible), a["o"])
    h = _norm(x, _scale(w["norm2"], r), cfg.norm_eps)
    gate, up = h @ w["mlp"]["gate"], h @ w["mlp"]["up"]
    return x + (gate * _sigmoid(gate) * up) @ w["mlp"]["down"], (k, v)


def _scale(norm, r):
    return norm["scale"] if norm["scale"].ndim == 1 else norm["scale"][r]


def _attend(row, q, k, v, visible):
    b, length, heads, width = q.shape
    out = np.zeros_like(q)
    for i in range(b):
        for h in range(heads):
            g = h * k.shape[2] // heads
            for t in range(length):
                seen = (np.arange(length) <= t) & (row.segments[i] == row.segments[i, t])
                seen &= visible[i]
                if seen.any():
                    s = k[i, seen, g] @ q[i, t, h] / math.sqrt(width)
                    e = np.exp(s - s.max())
                    out[i, t, h] = (e / e.sum()) @ v[i, seen, g]
    return out


def _rope(x, row):
    half = x.shape[-1] // 2
    frequency = row.cfg.rope_theta ** (-np.arange(half) / half)
    angle = row.positions[..., None, None] * frequency
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)
    return np.concatenate([turned.real, turned.imag], -1)


def _norm(x, scale, eps):
    return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + eps) * scale


def _sigmoid(z):
    return 1 / (1 + np.exp(-z))


def _logits(router, w, x, r):
    """Of recursion r's own router, or (None) of the joint one for all depths."""
    pick = (lambda a: a) if r is None else (lambda a: a[r])
    if router.arch == "linear":
        return x @ pick(w["weight"]).T
    h = x @ pick(w["hidden"])
    h = h * 0.5 * (1 + np.vectorize(math.erf)(h / math.sqrt(2)))
    return h @ pick(w["out"])
