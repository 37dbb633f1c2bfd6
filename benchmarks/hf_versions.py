"""Do exports work with every release of transformers that they are promised to work with?

    python benchmarks/hf_versions.py --save

Makes an environment of its own for each release (under runs/hf_versions/, once; they share one copy
of torch), exports small models of every family with drawn weights, and loads them there with
`AutoModelForCausalLM`, as users do. A row of the table is one model under one release:

- causal, top-k: logits of whole rows padded on the left, beside those of JAX; decoded: those of 32
  tokens that `generate` wrote with the cache. Largest difference over largest magnitude.
- greedy: these tokens with the cache; uncached: without it; alone: each row by itself, unpadded;
  continued: from the cache that `generate` returned after half of them. All beside JAX's.
- beams, assisted: three beams with and without the cache; another model's guesses taken back.
- loss, step, trainer: the training loss (top-k routing, routers included), what a step of gradient
  descent gained, and one of `Trainer`, beside JAX; relative.

Ends with 1 if anything differs. Needs requirements-convert.txt. --save appends to
benchmarks/results/hf_versions.jsonl, one line a row.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import timing
from hf_checking import environments, models

from mor_jax.convert.modeling_file import modeling_version
from mor_jax.runtime import exit_codes

VERSIONS = ("4.56.0", "5.0.0", "5.23.0", "5.24.0")
WORKER = Path(__file__).resolve().parent / "hf_checking" / "worker.py"
CLOSE = {"causal": 1e-5, "topk": 1e-5, "decoded": 1e-5, "loss": 1e-5, "step": 1e-3, "trainer": 1e-3}
SAME = ("greedy", "uncached", "alone", "continued", "beams", "assisted")
COLUMNS = ("causal", "topk", "decoded", *SAME, "loss", "step", "trainer")


def main() -> int:
    """Prints one row a model and release."""
    options = parse_args()
    home, versions = options.environments, options.versions.split(",")
    wrong = [name for name in options.models.split(",") if name not in models.MODELS]
    if wrong:
        names = ", ".join(models.MODELS)
        print(f"error: --models={options.models}: must be some of {names}", file=sys.stderr)
        return exit_codes.ERROR
    if not all(re.fullmatch(r"\d+(\.\d+)+", version) for version in versions):
        rule = f"must be releases such as {VERSIONS[0]},{VERSIONS[-1]}"
        print(f"error: --versions={options.versions}: {rule}", file=sys.stderr)
        return exit_codes.ERROR
    rows = []
    try:
        pythons = {version: environments.interpreter(home, version) for version in versions}
        with tempfile.TemporaryDirectory() as folder:
            places = [models.write(name, Path(folder)) for name in options.models.split(",")]
            print(head())
            for version, python in pythons.items():
                found = examine(python, places, Path(folder) / f"modules-{version}")
                for name, result in found["models"].items():
                    rows.append({"transformers": found["transformers"], "model": name, **result})
                    print(line(rows[-1]), flush=True)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_codes.ERROR
    bad = [row for row in rows if not good(row)]
    print(f"{len(rows) - len(bad)} of {len(rows)} as they should be ({environments.TORCH})")
    if options.save:
        save(rows)
    return exit_codes.ERROR if bad else exit_codes.OK


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--versions", default=",".join(VERSIONS), help="releases, by commas")
    parser.add_argument("--models", default=",".join(models.MODELS), help="models, by commas")
    parser.add_argument(
        "--environments",
        type=Path,
        default=Path("runs/hf_versions"),
        help="where environments are kept",
    )
    parser.add_argument("--save", action="store_true", help="append to benchmarks/results/")
    return parser.parse_args()


def examine(
    python: Path, folders: list[Path], modules: Path, extra: tuple[str, ...] = ("--trainer",)
) -> dict:
    """What the worker finds in these exports under one interpreter; the first one also guesses."""
    done = subprocess.run(
        [str(python), str(WORKER), *map(str, [folders[0], *folders]), *extra],
        env=environments.settings(modules),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise ValueError(f"{python}: the worker ended with {done.returncode}: {last}")
    return json.loads(done.stdout.splitlines()[-1])


def good(row: dict) -> bool:
    """Whether all of it is as it should be."""
    if "error" in row:
        return False
    near = all(row[name] is None or row[name] < CLOSE[name] for name in CLOSE)
    return near and all(row[name] for name in SAME)


def head() -> str:
    """The first two lines of the table."""
    names = ("transformers", "model", *COLUMNS)
    return f"| {' | '.join(names)} |\n|{'---|' * len(names)}"


def line(row: dict) -> str:
    """A row of the table; what is wrong stands in capitals."""
    cells = [row["transformers"], row["model"]]
    if "error" in row:
        return f"| {' | '.join(cells)} | ERROR: {row['error']} |"
    for name in COLUMNS:
        if name in SAME:
            cells.append("same" if row[name] else "DIFFERENT")
        elif row[name] is None:
            cells.append("")
        else:
            cells.append(f"{row[name]:.1e}" + ("" if row[name] < CLOSE[name] else " TOO FAR"))
    return f"| {' | '.join(cells)} |"


def save(rows: list[dict]) -> None:
    """Appends the records."""
    shared = {"benchmark": "hf_versions", **timing.machine(), "torch": environments.TORCH}
    shared["modeling_file"] = modeling_version()
    with open(timing.RESULTS / "hf_versions.jsonl", "a") as file:
        for row in rows:
            file.write(json.dumps(shared | row) + "\n")


if __name__ == "__main__":
    sys.exit(main())
