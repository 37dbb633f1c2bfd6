"""Forward pass straight from a state dict by reference name: NumPy in float64.

Dense on purpose: every token runs through every layer and masks say who counts. It knows neither
our parameter tree nor our configuration, so it checks names, layouts and options with the model.
"""

import math

import numpy as np


def rms(x, weight, eps):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def rotate(x, theta):
    """Rotary embedding of x (b, l, heads, k) at positions 0 .. l-1, halves convention."""
    half = x.shape[-1] // 2
    inverse = theta ** (-2.0 * np.arange(half) / x.shape[-1])
    angle = (np.arange(x.shape[1])[:, None] * inverse)[None, :, None]
    cos, sin, a, b = np.cos(angle), np.sin(angle), x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def logistic(x):
    return 1.0 / (1.0 + np.exp(-x))


def softmax(x):
    e = np.exp(x - np.max(x, axis=-1, keepdims=True))
    return e / np.sum(e, axis=-1, keepdims=True)


class Oracle:
    """weights: by reference name. hf: Llama options. options: the reference's three blocks."""

    def __init__(self, hf, options, weights):
        self.w = {name: np.asarray(value, np.float64) for name, value in weights.items()}
        self.hf, self.rec, self.mor = hf, options["recursive"], options["mor"]
        self.kv = options["kv_sharing"] if options["kv_sharing"]["enable"] else None
        self.width = hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]
        self.middle = self.rec["enable"] and self.rec["sharing"].startswith("middle")
        self.nr = self.rec["num_recursion"]
        self.depth = (hf["num_hidden_layers"] - 2 * self.middle) // self.nr

    def norm(self, name, x):
        return rms(x, self.w[f"{name}.weight"], self.hf["rms_norm_eps"])

    def heads(self, name, x, number):
        y = x @ self.w[f"{name}_proj.weight"].T
        return y.reshape(*y.shape[:2], number, self.width)

    def keys(self, name, x):
        """Rotated keys and values (b, l, g, k) of layer `name` from its input x."""
        h, g = self.norm(f"{name}.input_layernorm", x), self.hf["num_key_value_heads"]
        k = rotate(self.heads(f"{name}.self_attn.k", h, g), self.hf["rope_theta"])
        return k, self.heads(f"{name}.self_attn.v", h, g)

    def layer(self, name, x, allowed, kv=None):
        """One layer on x (b, l, d); `allowed` (b, l) are the tokens whose keys may be seen."""
        n, number = x.shape[1], self.hf["num_attention_heads"]
        h = self.norm(f"{name}.input_layernorm", x)
        q = rotate(self.heads(f"{name}.self_attn.q", h, number), self.hf["rope_theta"])
        kv = self.keys(name, x) if kv is None else kv
        k, v = (np.repeat(t, number // t.shape[2], axis=2) for t in kv)
        seen = np.tril(np.ones((n, n), bool)) & allowed[:, None, :] | np.eye(n, dtype=bool)
        logits = np.einsum("bqhk,bshk->bhqs", q, k) / math.sqrt(self.width)
        weights = softmax(np.where(seen[:, None], logits, -1e30))
        mixed = np.einsum("bhqs,bshk->bqhk", weights, v).reshape(*x.shape[:2], -1)
        x = x + mixed @ self.w[f"{name}.self_attn.o_proj.weight"].T
        h = self.norm(f"{name}.post_attention_layernorm", x)
        gate = h @ self.w[f"{name}.mlp.gate_proj.weight"].T
        up = h @ self.w[f"{name}.mlp.up_proj.weight"].T
        return x + (gate * logistic(gate) * up) @ self.w[f"{name}.mlp.down_proj.weight"].T

    def router(self, name, x):
        if f"{name}.router.weight" in self.w:
            return x @ self.w[f"{name}.router.weight"].T
        h = x @ self.w[f"{name}.router.0.weight"].T
        h = 0.5 * h * (1.0 + np.vectorize(math.erf)(h / math.sqrt(2.0)))
        return h @ self.w[f"{name}.router.2.weight"].T

    def block(self, names, x, active, cache, r):
        """The shared layers on x; `cache` holds recursion 0's keys and values per slot."""
        fresh = self.kv and self.kv["update_cache"] and self.middle and self.mor["type"] == "expert"
        for s, name in enumerate(names):
            if not self.kv:
                x = self.layer(name, x, active)
                continue
            own, mine = self.keys(name, x), active[:, :, None, None]
            first = cache.setdefault(s, own)
            pairs = zip(own, first, strict=True)
            kv = [np.where(mine, new, old) if fresh and r else old for new, old in pairs]
            x = self.layer(name, x, np.ones_like(active), kv)
        return x

    def score(self, z, part):
        function, alpha = part["router_func"], part["alpha"]
        if function is None:
            return z
        return alpha * {"sigmoid": logistic, "softmax": softmax, "tanh": np.tanh}[function](z)

    def expert(self, x):
        part, first, chosen_at, cache = self.mor["expert"], int(self.middle), [], {}
        active = np.ones(x.shape[:2], bool)
        for r, share in enumerate(self.mor["capacity"].split(",")):
            top = f"model.layers.{first + r}"
            p = self.score(self.router(f"{top}.mor_router", x / self.mor["temp"])[..., 0], part)
            order = np.argsort(np.argsort(-np.where(active, p, -np.inf), axis=1), axis=1)
            active = active & (order < max(1, int(float(share) * x.shape[1])))
            names = [f"{top}.block.{j}" for j in range(self.depth)]
            y = self.block(names, x, active, cache, r)
            gate = p[..., None] if part["gating"] == "weighted" else 1.0
            x = np.where(active[..., None], x + gate * y, x)
            chosen_at.append(active)
        return x, np.sum(chosen_at, axis=0)

    def token(self, x):
        part, stage = self.mor["token"], "model.layers.1" if self.middle else "model.layers"
        w = self.score(self.router(f"{stage}.mor_router", x / self.mor["temp"]), part)
        e = np.argmax(w + self.w.get(f"{stage}.router_bias", 0.0), axis=-1)
        picked = np.take_along_axis(w, e[..., None], axis=-1)
        gate = picked if part["gating"] == "weighted" else 1.0
        h, result, cache = x, x, {}
        for r in range(self.nr):
            names = [f"{stage}.block_list.{r}.{j}" for j in range(self.depth)]
            h = self.block(names, h, e >= r, cache, r)
            result = np.where((e == r)[..., None], x + gate * h, result)
        return result, e + 1

    def plain(self, x):
        layers, cache, everyone = self.hf["num_hidden_layers"], {}, np.ones(x.shape[:2], bool)
        for i in range(layers):
            kv, inner, name = None, i - int(self.middle), f"model.layers.{i}"
            if self.kv and 0 <= inner < self.depth * self.nr:
                sequence = "sequence" in self.rec["sharing"]
                slot = inner // self.nr if sequence else inner % self.depth
                kv = cache.setdefault(slot, self.keys(name, x))
            x = self.layer(name, x, everyone, kv)
        return x

    def run(self, ids):
        """Logits (b, l, v) and the recursions that each token took, or None."""
        x, depth = self.w["model.embed_tokens.weight"][ids], None
        everyone = np.ones(ids.shape, bool)
        if not self.mor["enable"]:
            x = self.plain(x)
        else:
            expert = self.mor["type"] == "expert"
            x = self.layer("model.layers.0", x, everyone) if self.middle else x
            x, depth = self.expert(x) if expert else self.token(x)
            last = f"model.layers.{self.nr + 1 if expert else 2}"
            x = self.layer(last, x, everyone) if self.middle else x
        return self.norm("model.norm", x) @ self.w["lm_head.weight"].T, depth
