"""Compares the model with recorded cases of the reference implementation.

    python -m mor_jax.convert.parity --cases DIR

Recomputes every case in DIR from the reference's own weights and prints one line per case with the
largest error of each group. Exits with 1 unless all pass. docs/parity.md explains groups
and tolerances.
"""

import argparse
import difflib
import fnmatch
import functools
import json
import re
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mor_jax.config import Attention, ModelConfig
from mor_jax.config.parsing import check, fail
from mor_jax.convert.init_strategies import select_layers
from mor_jax.convert.parity.cases import Case, batch_of, load_case
from mor_jax.convert.parity.compare import (
    Group,
    Report,
    add_tensors,
    by_magnitude,
    of_loss,
    of_selection,
)
from mor_jax.convert.parity.reference_loss import Pass, compiled, overlap_accuracy, rules, steady
from mor_jax.convert.parity.training_run import compare_trajectory
from mor_jax.convert.state_dict import from_params
from mor_jax.models.routing.outputs import Routing
from mor_jax.types import IGNORE

Seen = dict[str, tuple[Group, Any]]
STRATEGIES = "init_strategies"
EMULATED = ("compacted_rows", "none")
INPUTS = {"params_flat", "grads_flat", "input_ids", "attention_mask", "labels"}
# Arrays from inside a shared block, which are not compared; the output of each stage covers them.
INNER = re.compile(r"eval\.layer\d+\.(rec\d+\.)?block\d+\.out")


def compare_pass(case: Case, compacted_rows: bool = False) -> Report:
    """Recomputes a recorded forward and backward pass.

    compacted_rows: emulate that bug of the reference, see `parity.compacted_rows`.

    Raises:
        ValueError: the case needs an unsupported option or contains an unknown array.
    """
    report, cfg, arrays = Report(case.name, emulated=compacted_rows), case.config, case.arrays
    mask, labels = arrays.get("attention_mask"), arrays.get("labels", arrays["input_ids"])
    batch = batch_of(arrays["input_ids"], labels, mask)
    rule = "the reference routes padding like text, but mor_jax never selects it"
    ok = batch.segments is None or cfg.router.kind == "none"
    check(ok, "attention_mask", "zeros", rule, "Record routed cases without padding")
    items = case.items
    params, step = case.params("params_flat"), case.passes_before + 1

    def run(step: int) -> Any:
        fixed = rules(cfg, batch.tokens.shape[1], step, compacted_rows)
        return compiled()(params, cfg, batch, items, fixed, step)

    (_, evaluated), _ = run(steady(cfg))
    (_, trained), grads = run(step)
    report.add_routing(cfg, params, evaluated.out.routing, None)
    if step < steady(cfg):
        # The training pass selects other tokens only during a warm-up.
        report.add_routing(cfg, params, trained.out.routing, step)
    seen = _seen("eval", cfg, evaluated) | _seen("train", cfg, trained)
    valid = np.sum(np.asarray(batch.targets) != IGNORE)
    seen["eval.loss_mean"] = ("losses", evaluated.values["loss"] * items / valid)
    rows = np.ones(labels.shape, bool) if mask is None else mask.astype(bool)
    for key, recorded in arrays.items():
        if key not in INPUTS and not INNER.fullmatch(key):
            _compare(report, key, recorded, seen, rows)
    if "grads_flat" in arrays:
        ours = from_params(cfg, grads, aliases=False)
        add_tensors(report, "gradients", ours, case.tensors("grads_flat"))
    return report


def _compare(report: Report, key: str, recorded: np.ndarray, seen: Seen, rows: np.ndarray) -> None:
    """Adds one recorded array to the report; `rows` [b l] is False at padding."""
    rule = f"unknown array; known are {sorted(seen)}"
    check(key in seen, key, recorded.shape, rule, "Extend mor_jax/convert/parity/run.py")
    group, value = seen[key]
    value = np.asarray(value)
    if group == "outputs" and value.shape == recorded.shape and value.shape[:2] == rows.shape:
        # Outputs at padding are meaningless.
        value, recorded = value[rows], recorded[rows]
    measure = {"outputs": by_magnitude, "losses": of_loss, "selections": of_selection}[group]
    report.add(group, key, measure(value, recorded))


def _seen(mode: str, cfg: ModelConfig, ran: Pass) -> Seen:
    """Every array of a pass that a case may contain, by the reference's names: group and value."""
    trace, routing = ran.out.trace, ran.out.routing
    assert trace is not None
    seen: Seen = {f"{mode}.{name}": ("losses", value) for name, value in ran.values.items()}
    seen[f"{mode}.logits"] = ("outputs", ran.logits)
    seen[f"{mode}.hidden_states.0"] = ("outputs", trace.embedded)
    seen[f"{mode}.final_norm_out"] = ("outputs", ran.out.hidden)
    for i, layer in enumerate(trace.layers):
        seen[f"{mode}.layer{i}.out"] = ("outputs", layer)
    if routing is None:
        return seen
    aux = cfg.router.kind == "expert" and cfg.router.causal_routing == "aux_router"
    seen[f"{mode}.sampling_topk_acc"] = ("losses", overlap_accuracy(routing) if aux else 0.0)
    route = _chosen_by_recursion if cfg.router.kind == "expert" else _chosen_depth
    return seen | route(f"{mode}.layer", int(cfg.is_middle), routing)


def _chosen_depth(prefix: str, first: int, routing: Routing) -> Seen:
    """Arrays of token-choice: the whole stage is the top-level layer `first`."""
    depth, name = np.asarray(routing.depth), f"{prefix}{first}"
    seen: Seen = {
        f"{name}.router_logits": ("outputs", routing.recursion_traces[0].logits),
        f"{name}.top_expert_indices": ("selections", depth - 1),
    }
    for r in range(len(routing.recursion_traces)):
        pairs = np.argwhere(depth > r)
        seen[f"{name}.rec{r}.selected_pairs"] = ("selections", pairs)
        seen[f"{name}.rec{r}.selected_batch"] = ("selections", np.unique(pairs[:, 0]))
    return seen


def _chosen_by_recursion(prefix: str, first: int, routing: Routing) -> Seen:
    """Arrays of expert-choice: recursion r is the top-level layer `first` + r."""
    seen: Seen = {}
    rows, length = routing.depth.shape
    for r, trace in enumerate(routing.recursion_traces):
        name = f"{prefix}{first + r}"
        index = np.arange(length) if trace.index is None else np.asarray(trace.index)
        chosen = np.broadcast_to(index, (rows, index.shape[-1]))
        seen[f"{name}.router_logits"] = ("outputs", trace.logits[..., None])
        seen[f"{name}.mlp_router_logits"] = ("outputs", trace.trained[..., None])
        seen[f"{name}.selected_tokens"] = ("selections", chosen)
    return seen


def compare_strategies(path: Path) -> Report:
    """Compares every row of the table of layer selections."""
    report = Report(path.stem)
    for key, row in json.loads(path.read_text()).items():
        sharing, layers, recursions, strategy = key.split("|")
        selection = select_layers(sharing, int(layers[1:]), int(recursions[2:]), strategy)
        source_layers = np.asarray(selection.source_layers)
        report.add(
            "selections", f"{key}.n_layers", of_selection(len(source_layers), row["n_layers"])
        )
        if "layer_idx" in row:
            report.add(
                "selections", f"{key}.layer_idx", of_selection(source_layers, row["layer_idx"])
            )
        means = np.asarray([np.mean(sources) for sources in selection.effective])
        for name in ("src", "src_ln"):
            if name in row:
                # Recorded with four decimals.
                differs = np.shape(row[name]) != means.shape or np.any(
                    np.abs(means - row[name]) > 1e-4
                )
                report.add("selections", f"{key}.{name}", float(differs))
    return report


def run_file(path: Path, attention: Attention = "auto", emulate: str = EMULATED[0]) -> Report:
    """The report of one file. An exception becomes the reason of its failure.

    emulate: the bug of the reference to emulate if the case fails without it, or `none`.
    """
    try:
        if path.stem == STRATEGIES:
            return compare_strategies(path)
        case = load_case(path, attention)
        compare = compare_trajectory if case.is_trajectory else compare_pass
        report = compare(case)
        if report.passed or not report.affected or emulate == "none":
            return report
        emulated = compare(case, compacted_rows=True)
        return emulated if emulated.passed else report
    except Exception as error:
        return Report(path.stem, reason=_one_line(error))


def _one_line(error: Exception) -> str:
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    return kind + " ".join(str(error).split())


def run_all(
    folder: Path,
    attention: Attention = "auto",
    show: Callable[[str], None] = print,
    only: str = "*",
    emulate: str = EMULATED[0],
) -> list[Report]:
    """Compares the cases in `folder` whose names match `only`, and shows one line per case.

    Raises:
        ValueError: no case matches.
    """
    files = [] if not folder.is_dir() else sorted(folder.iterdir())
    names = sorted({path.stem for path in files if path.suffix in (".json", ".npz")})
    rule = "contains no cases (.json with .npz)"
    check(bool(names), "--cases", str(folder), rule, "Set it to the folder of the recorded cases")
    # A case may also be given by its file name.
    chosen = fnmatch.filter(names, only.removesuffix(".json").removesuffix(".npz"))
    closest = difflib.get_close_matches(only, names, n=1, cutoff=0.0)
    rule = f"none of the {len(names)} cases in {folder} matches"
    check(bool(chosen), "--only", only, rule, f"Try {closest[0]!r}, or a pattern such as 'moe_*'")
    reports = []
    for name in chosen:
        with jax.default_matmul_precision("highest"):
            reports.append(run_file(folder / f"{name}.json", attention, emulate))
        show(reports[-1].line())
    passed = sum(report.passed for report in reports)
    show(f"{passed} passed, {len(reports) - passed} failed")
    return reports


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code: 0, 1 if a case fails, 2 for invalid options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cases", type=Path, required=True, help="folder of recorded cases")
    choices = typing.get_args(Attention)
    parser.add_argument("--attention", choices=choices, default="auto", help="attention kernel")
    parser.add_argument("--only", default="*", help="a case, or a pattern such as 'moe_*'")
    parser.add_argument("--platform", default="cpu", help="JAX platform, such as cpu or cuda")
    parser.add_argument(
        "--emulate",
        choices=EMULATED,
        default=EMULATED[0],
        help="bug of the reference to emulate for cases that fail without it",
    )
    args = parser.parse_args(argv)
    jax.config.update("jax_platforms", args.platform)
    show = functools.partial(print, flush=True)
    try:
        _check_platform(args.platform)
        reports = run_all(args.cases, args.attention, show, args.only, args.emulate)
    except ValueError as error:
        parser.exit(2, f"{error}\n")
    return 0 if all(report.passed for report in reports) else 1


def _check_platform(name: str) -> None:
    try:
        jax.devices()
    except RuntimeError as error:
        rule = f"JAX cannot use it ({' '.join(str(error).split())})"
        fail("--platform", name, rule, "Try cpu")
