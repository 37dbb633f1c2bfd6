"""Do conversions lose a bit, and does PyTorch compute what we compute? Every recorded case.

    python benchmarks/conversion_parity.py --cases tests/goldens/parity

Each recorded model of the paper authors' code goes through the commands' own functions: imported
from a state dict in their format, exported to that format again, exported to Hugging Face and
imported from there. Two columns say whether every number came back bit for bit. The others run the
Hugging Face export in PyTorch and ours in JAX, float32, and give the largest difference of logits
relative to the largest logit: a prefill under causal and under top-k routing, and 64 tokens that
`generate` decodes with its cache, on a batch of prompts of unequal length.

Needs requirements-convert.txt. --save writes benchmarks/results/conversion_parity.{md,jsonl}.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np
import timing
import torch
import transformers
import yaml
from transformers import AutoModelForCausalLM

from mor_jax.checkpoint.lazy_arrays import LazyArrays, nested
from mor_jax.config import ModelConfig
from mor_jax.convert.exports import ExportOptions, export
from mor_jax.convert.imports import ImportOptions, import_run
from mor_jax.convert.parity.cases import BLOCKS, Case, load_case
from mor_jax.convert.run_source import RunSource, open_run
from mor_jax.models.params import forward, unembed
from mor_jax.models.routing.router import Route
from mor_jax.types import Batch

PROMPTS, NEW = (20, 13, 7), 64


def main() -> None:
    """Prints one row a case."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cases", type=Path, required=True, help="directory of recorded cases")
    parser.add_argument("--only", default="*", help="pattern of names")
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(timing.machine()["cores"])
    transformers.utils.logging.disable_progress_bar()
    results, lines = [], [HEAD, RULE]
    print(f"{HEAD}\n{RULE}")
    for path in sorted(options.cases.glob(f"{options.only}.json")):
        if not path.with_suffix(".npz").exists():
            # A table of layer numbers: no model.
            continue
        with tempfile.TemporaryDirectory() as folder:
            result = examine(load_case(path), Path(folder))
        results.append(result)
        lines.append(row(result))
        print(lines[-1], flush=True)
    worst = max(max(r["causal"], r["topk"] or 0.0, r["decoded"]) for r in results)
    exact = sum(r["reference_back"] and r["hf_back"] for r in results)
    ending = (
        f"{exact} of {len(results)} came back bit for bit both ways; worst difference {worst:.1e}"
    )
    print(ending)
    if options.save:
        save(results, lines, ending)


HEAD = (
    "| case | reference -> ours -> reference | ours -> hf -> ours | prefill, causal | "
    "prefill, top-k | 64 decoded |"
)
RULE = "|---|---|---|---|---|---|"


def row(result: dict) -> str:
    """A line of the table."""
    told = ["equal" if result[name] else "DIFFERENT" for name in ("reference_back", "hf_back")]
    topk = "" if result["topk"] is None else f"{result['topk']:.1e}"
    errors = [f"{result['causal']:.1e}", topk, f"{result['decoded']:.1e}"]
    return f"| {' | '.join([result['case'], *told, *errors])} |"


def examine(case: Case, folder: Path) -> dict:
    """One case through every conversion."""
    state = write_theirs(case, folder / "theirs")
    made = import_run(
        "reference", str(folder / "theirs"), ImportOptions(workdir=folder / "imported")
    )
    run = open_run(made.workdir)
    export(run, "reference", ExportOptions(output=folder / "back"))
    export(run, "hf", ExportOptions(output=folder / "hf"))
    again = import_run("hf", str(folder / "hf"), ImportOptions(workdir=folder / "again"))
    theirs = torch.load(folder / "back" / "pytorch_model.bin", weights_only=True)
    return {
        "case": case.name,
        "reference_back": same_state(state, theirs),
        "hf_back": same_arrays(run.params, open_run(again.workdir).params),
        **compare(run, folder / "hf"),
    }


def write_theirs(case: Case, folder: Path) -> dict[str, torch.Tensor]:
    """The checkpoint as the authors' code would leave it; returns its state dict."""
    folder.mkdir()
    arrays = case.tensors("init_flat" if case.is_trajectory else "params_flat")
    state = {name: torch.from_numpy(value.copy()) for name, value in arrays.items()}
    state |= {alias: state[name] for alias, name in case.spec["tied"].items()}
    torch.save(state, folder / "pytorch_model.bin")
    # Their rotary embedding knows no longest row; generation needs room.
    shape = dict(case.spec["hf_config"]) | {"max_position_embeddings": 256}
    (folder / "config.json").write_text(json.dumps(shape))
    blocks = {name: {"enable": False} for name in BLOCKS} | dict(case.spec.get("cfg") or {})
    resolved = case.spec.get("resolved", {})
    blocks |= {name: resolved[name] for name in BLOCKS if name in resolved}
    (folder / "run.yaml").write_text(yaml.safe_dump({"name": case.name, **blocks}))
    return state


def same_state(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    """Same names, same bits, and the same names tied to each other."""
    return (
        ours.keys() == theirs.keys()
        and all(torch.equal(ours[name], theirs[name]) for name in ours)
        and ties(ours) == ties(theirs)
    )


def ties(state: dict[str, torch.Tensor]) -> set[frozenset[str]]:
    """Groups of names that share memory."""
    groups: dict[int, set[str]] = {}
    for name, tensor in state.items():
        groups.setdefault(tensor.data_ptr(), set()).add(name)
    return {frozenset(group) for group in groups.values()}


def same_arrays(left: LazyArrays, right: LazyArrays) -> bool:
    """Same paths and bits."""
    same = (np.array_equal(left.read(name), right.read(name)) for name in left.specs)
    return left.specs.keys() == right.specs.keys() and all(same)


def compare(run: RunSource, folder: Path) -> dict:
    """Largest differences between the export in PyTorch and ours; the decoded text is PyTorch's."""
    cfg = dataclasses.replace(run.cfg.model, attention="xla")
    params = nested(run.params)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    tokens, mask = prompts(cfg.vocab_size)
    with torch.no_grad():
        out = model.generate(
            torch.from_numpy(tokens),
            attention_mask=torch.from_numpy(mask),
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        rows = out.sequences
        mask = np.concatenate([mask, np.ones((len(mask), NEW), mask.dtype)], axis=1)
        inputs = {"attention_mask": torch.from_numpy(mask), "use_cache": False}
        causal = model(rows, **inputs).logits
        routed = cfg.router.kind != "none"
        topk = model(rows, routing="topk", **inputs).logits if routed else None
    want = ours(cfg, params, rows.numpy(), mask, "causal")
    real = mask > 0
    decoded = torch.stack(out.logits, dim=1).numpy()
    found = None
    if topk is not None:
        expected = ours(cfg, params, rows.numpy(), mask, "topk")
        found = difference(topk.numpy()[real], expected[real])
    return {
        "causal": difference(causal.numpy()[real], want[real]),
        "topk": found,
        "decoded": difference(decoded, want[:, tokens.shape[1] - 1 : -1]),
    }


def prompts(vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows padded on the left, and their mask, int64 [3 20]."""
    longest = max(PROMPTS)
    tokens = np.random.default_rng(0).integers(0, vocab_size, (len(PROMPTS), longest))
    starts = longest - np.array(PROMPTS)
    return tokens, (np.arange(longest)[None] >= starts[:, None]).astype(np.int64)


def ours(cfg: ModelConfig, params: dict, tokens: np.ndarray, mask: np.ndarray, mode: str):
    """Our logits of whole rows, without any cache, float32 [b l v]."""
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    arrays = (jnp.asarray(array, jnp.int32) for array in (tokens, tokens, mask, positions))

    @jax.jit
    def run(params: dict, batch: Batch):
        return unembed(cfg, params, forward(cfg, params, batch, Route(mode=mode)).hidden)

    return np.asarray(run(params, Batch(*arrays)))


def difference(got: np.ndarray, want: np.ndarray) -> float:
    """Largest difference relative to the largest magnitude."""
    return float(np.abs(got - want).max() / np.abs(want).max())


def save(results: list[dict], lines: list[str], ending: str) -> None:
    """Writes the table and appends the records."""
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    text = "\n".join(["# Parity of conversions", "", *lines, "", f"{ending} ({versions}).", ""])
    (timing.RESULTS / "conversion_parity.md").write_text(text)
    for result in results:
        timing.report("conversion_parity", {**result, "versions": versions}, save=True)


if __name__ == "__main__":
    main()
