"""The model card of an export: what the model is, what it was trained on, how good it is."""

from pathlib import Path

from mor_jax.config import ModelConfig
from mor_jax.convert.run_source import RunSource
from mor_jax.models.flops import flops
from mor_jax.models.param_count import effective, effective_parameters, unique_parameters
from mor_jax.observability.progress import quantity

_KIND = {
    "none": "recursive decoder: one block of layers is applied to every token several times",
    "expert": "Mixture-of-Recursions, expert-choice: each recursion goes on with its best tokens",
    "token": "Mixture-of-Recursions, token-choice: each token picks its depth once",
}
_PAPER = "[Mixture-of-Recursions](https://arxiv.org/abs/2507.10524) (Bae et al., NeurIPS 2025)"


def model_card(run: RunSource, title: str, use: str) -> str:
    """Markdown with front matter. use: how it is loaded, as Markdown."""
    cfg = run.cfg
    parts = [
        _front(cfg.model),
        f"# {title}\n",
        f"{_what(cfg.model)} {_made(run)}\n",
        f"## Use\n\n{use}\n",
        f"## Model\n\n{_table(_model_rows(cfg.model, cfg.seq_len))}\n",
        f"## Training\n\n{_table(_training_rows(run))}\n",
        f"## Evaluation\n\n{_evaluation(run)}\n",
    ]
    return "\n".join(parts)


def _front(cfg: ModelConfig) -> str:
    tags = ["mor_jax"]
    if cfg.sharing != "none":
        tags += ["recursive-transformer"]
    if cfg.router.kind != "none":
        tags += ["mixture-of-recursions"]
    listed = "".join(f"- {tag}\n" for tag in tags)
    return f"---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n{listed}---\n"


def _what(cfg: ModelConfig) -> str:
    if cfg.sharing == "none":
        return "A Llama-style decoder."
    kind = _KIND[cfg.router.kind]
    return f"A {kind} ({cfg.sharing}, {cfg.num_recursions} recursions), after {_PAPER}."


def _made(run: RunSource) -> str:
    if run.step:
        return "Trained with mor_jax in JAX, converted to PyTorch."
    source = (run.source or {}).get("from", "another model")
    return f"Converted with mor_jax from {source}, not trained further."


def _model_rows(cfg: ModelConfig, length: int) -> list[tuple[str, str]]:
    ours, plain = flops(cfg, length), flops(effective(cfg), length)
    stored, deep = unique_parameters(cfg), effective_parameters(cfg)
    rows = [
        ("parameters stored", f"{stored:,}"),
        ("... without embeddings", f"{unique_parameters(cfg, embedding=False):,}"),
        (
            "width, heads, key/value heads",
            f"{cfg.hidden_size}, {cfg.num_heads}, {cfg.num_kv_heads}",
        ),
        ("MLP width, vocabulary", f"{cfg.intermediate_size}, {cfg.vocab_size}"),
        ("longest row", f"{cfg.max_seq_len} tokens"),
        ("forward FLOPs per token", quantity(ours.forward())),
    ]
    if cfg.sharing == "none":
        return [("layers", str(cfg.num_layers)), *rows]
    shared = [
        ("layers passed, stored", f"{cfg.num_layers}, {cfg.unique_layers}"),
        ("sharing, recursions", f"{cfg.sharing}, {cfg.num_recursions}"),
        ("keys and values", cfg.kv_mode),
        ("plain model of this depth", f"{deep:,} parameters ({stored / deep:.2f} stored)"),
        ("... forward FLOPs per token", f"{quantity(plain.forward())} ({_share(ours, plain)})"),
    ]
    if cfg.router.kind != "none":
        shared += [("router", f"{cfg.router.arch}, {cfg.router.activation}, {cfg.router.gating}")]
    if cfg.router.kind == "expert":
        shares = ", ".join(f"{share:.3g}" for share in cfg.router.capacities(cfg.num_recursions))
        multiple = cfg.router.capacity_multiple or 1
        shares += f", rounded up to multiples of {multiple} tokens" if multiple > 1 else ""
        shared += [("share of tokens kept", shares)]
    return [*rows, *shared]


def _share(ours, plain) -> str:
    return f"{ours.forward() / plain.forward():.2f} of them spent"


def _training_rows(run: RunSource) -> list[tuple[str, str]]:
    cfg = run.cfg
    rows = [] if run.source is None else [("started from", str(run.source.get("from")))]
    if run.step == 0:
        return [*rows, ("steps", "0: as imported")]
    per_step = cfg.batch_size * cfg.seq_len
    return [
        *rows,
        ("steps", f"{run.step:,} of {cfg.steps:,}"),
        ("tokens", f"{quantity(run.step * per_step)} ({cfg.batch_size} rows of {cfg.seq_len})"),
        ("data", ", ".join(cfg.data.sources)),
        ("tokenizer", Path(cfg.data.tokenizer).name),
        ("learning rate", f"{cfg.optim.lr:g}, {cfg.optim.schedule}"),
        ("seed", str(cfg.seed)),
    ]


def _evaluation(run: RunSource) -> str:
    found = run.evaluated
    if not found:
        return "Not evaluated during training."
    rows = [("causal routing", f"{found['loss_causal']:.4f}", "as generation routes")]
    if run.cfg.model.router.kind == "none":
        rows = [("this model", f"{found['loss_causal']:.4f}", "")]
    if "loss_topk" in found and run.cfg.model.router.kind == "expert":
        rows.append(("top-k routing", f"{found['loss_topk']:.4f}", "as training: looks ahead"))
    lines = ["| held-out loss, nats per token | | |", "|---|---|---|"]
    lines += [f"| {name} | {value} | {note} |" for name, value, note in rows]
    text = "\n".join(lines)
    if "depth_causal" in found:
        depth = found["depth_causal"]
        text += (
            f"\n\nMean depth under causal routing: {depth:.2f} of {run.cfg.model.num_recursions}."
        )
    return f"At step {found['step']}.\n\n{text}"


def _table(rows: list[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])
