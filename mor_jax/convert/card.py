"""The model card of an export: architecture, training data and evaluation."""

from pathlib import Path

from mor_jax.config import ModelConfig
from mor_jax.convert.run_source import RunSource
from mor_jax.models.flops import FlopReport, flops
from mor_jax.models.param_count import effective, effective_parameters, unique_parameters
from mor_jax.observability.number_format import quantity

_KIND = {
    "none": "recursive decoder: one block of layers is applied to every token several times",
    "expert": "Mixture-of-Recursions, expert-choice: each recursion selects its top tokens",
    "token": "Mixture-of-Recursions, token-choice: each token selects its depth once",
}
_PAPER = "[Mixture-of-Recursions](https://arxiv.org/abs/2507.10524) (Bae et al., NeurIPS 2025)"


def model_card(run: RunSource, title: str, use: str) -> str:
    """The card as Markdown with front matter. use: how to load the model, as Markdown."""
    cfg = run.cfg
    parts = [
        _front_matter(cfg.model),
        f"# {title}\n",
        f"{_description(cfg.model)} {_origin(run)}\n",
        f"## Use\n\n{use}\n",
        f"## Model\n\n{_table(_model_rows(cfg.model, cfg.seq_len))}\n",
        f"## Training\n\n{_table(_training_rows(run))}\n",
        f"## Evaluation\n\n{_evaluation(run)}\n",
    ]
    return "\n".join(parts)


def _front_matter(cfg: ModelConfig) -> str:
    tags = ["mor_jax"]
    if cfg.sharing != "none":
        tags += ["recursive-transformer"]
    if cfg.router.kind != "none":
        tags += ["mixture-of-recursions"]
    lines = "".join(f"- {tag}\n" for tag in tags)
    return f"---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n{lines}---\n"


def _description(cfg: ModelConfig) -> str:
    if cfg.sharing == "none":
        return "A Llama-style decoder."
    kind = _KIND[cfg.router.kind]
    return f"A {kind} ({cfg.sharing}, {cfg.num_recursions} recursions), after {_PAPER}."


def _origin(run: RunSource) -> str:
    if run.step:
        return "Trained with mor_jax in JAX, converted to PyTorch."
    source = (run.source or {}).get("from", "another model")
    return f"Converted with mor_jax from {source}, not trained further."


def _model_rows(cfg: ModelConfig, seq_len: int) -> list[tuple[str, str]]:
    model_flops, unshared_flops = flops(cfg, seq_len), flops(effective(cfg), seq_len)
    stored, full = unique_parameters(cfg), effective_parameters(cfg)
    rows = [
        ("parameters stored", f"{stored:,}"),
        ("... without embeddings", f"{unique_parameters(cfg, embedding=False):,}"),
        (
            "hidden size, heads, key/value heads",
            f"{cfg.hidden_size}, {cfg.num_heads}, {cfg.num_kv_heads}",
        ),
        ("MLP size, vocabulary", f"{cfg.intermediate_size}, {cfg.vocab_size}"),
        ("maximum sequence length", f"{cfg.max_seq_len} tokens"),
        ("forward FLOPs per token", quantity(model_flops.forward())),
    ]
    if cfg.sharing == "none":
        return [("layers", str(cfg.num_layers)), *rows]
    shared = [
        ("layers executed, stored", f"{cfg.num_layers}, {cfg.unique_layers}"),
        ("sharing, recursions", f"{cfg.sharing}, {cfg.num_recursions}"),
        ("keys and values", cfg.kv_mode),
        ("unshared model of this depth", f"{full:,} parameters ({stored / full:.2f} stored)"),
        (
            "... forward FLOPs per token",
            _flop_ratio(model_flops, unshared_flops),
        ),
    ]
    if cfg.router.kind != "none":
        shared += [("router", f"{cfg.router.arch}, {cfg.router.activation}, {cfg.router.gating}")]
    if cfg.router.kind == "expert":
        capacity = ", ".join(f"{share:.3g}" for share in cfg.router.capacities(cfg.num_recursions))
        multiple = cfg.router.capacity_multiple or 1
        capacity += f", rounded up to multiples of {multiple} tokens" if multiple > 1 else ""
        shared += [("capacity per recursion", capacity)]
    return [*rows, *shared]


def _flop_ratio(model: FlopReport, unshared: FlopReport) -> str:
    ratio = model.forward() / unshared.forward()
    return f"{quantity(unshared.forward())} ({ratio:.2f} of them executed)"


def _training_rows(run: RunSource) -> list[tuple[str, str]]:
    cfg = run.cfg
    rows = [] if run.source is None else [("initialised from", str(run.source.get("from")))]
    if run.step == 0:
        return [*rows, ("steps", "0, as imported")]
    per_step = cfg.batch_size * cfg.seq_len
    return [
        *rows,
        ("steps", f"{run.step:,} of {cfg.steps:,}"),
        (
            "tokens",
            f"{quantity(run.step * per_step)} (steps of {cfg.batch_size} x {cfg.seq_len})",
        ),
        ("data", ", ".join(cfg.data.sources)),
        ("tokenizer", Path(cfg.data.tokenizer).name),
        ("learning rate", f"{cfg.optim.lr:g}, {cfg.optim.schedule}"),
        ("seed", str(cfg.seed)),
    ]


def _evaluation(run: RunSource) -> str:
    evaluation = run.evaluated
    if not evaluation:
        return "Not evaluated during training."
    rows = [("causal routing", f"{evaluation['loss_causal']:.4f}", "as in generation")]
    if run.cfg.model.router.kind == "none":
        rows = [("this model", f"{evaluation['loss_causal']:.4f}", "")]
    if "loss_topk" in evaluation and run.cfg.model.router.kind == "expert":
        rows.append(
            ("top-k routing", f"{evaluation['loss_topk']:.4f}", "as in training, non-causal")
        )
    lines = ["| validation loss, nats per token | | |", "|---|---|---|"]
    lines += [f"| {name} | {value} | {note} |" for name, value, note in rows]
    text = "\n".join(lines)
    if "depth_causal" in evaluation:
        depth = evaluation["depth_causal"]
        text += (
            f"\n\nMean depth under causal routing: {depth:.2f} of {run.cfg.model.num_recursions}."
        )
    return f"At step {evaluation['step']}.\n\n{text}"


def _table(rows: list[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])
