"""What do the models need on pods, and where do recursion and routing save? Plans of shipped sizes.

    python benchmarks/pod_plans.py --save
    python benchmarks/pod_plans.py --only=network

Every plan is one run of launch/plan.py in a process of its own. Prints a table and two answers: the
memory of MoR beside plain without rematerialisation (four chips, a copy of the model on each), and
the network bytes of a recursive model whose shared block is gathered once beside plain. With --save
each plan is appended to benchmarks/results/pod_plans.jsonl, and benchmarks/results/pod_plans.md is
made anew from the newest of each.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
# Nothing runs here; an accelerator of this machine stays free.
os.environ["JAX_PLATFORMS"] = "cpu"

import timing

from mor_jax.planning.tables import format_bytes

ROOT = Path(__file__).resolve().parent.parent
PLAIN, RECURSIVE, MOR = "vanilla:", "recursive:recursions=3,", "mor:recursions=3,"
MOR_2 = "mor:recursions=2,"
ONCE = {"sharding.all_gather_shared": "once"}
EACH = {"sharding.all_gather_shared": "per_recursion"}

SMALL = {
    "batch_size": 64,
    "grad_accum_steps": 1,
    "mesh.fsdp": 16,
    "mesh.data": 1,
    "model.remat": "full",
}
FREE = SMALL | {"model.remat": "none"}
COPIES = FREE | {"batch_size": 16, "mesh.fsdp": 1, "mesh.data": 4}
POD = {"mesh.fsdp": 256, "mesh.data": 1, "grad_accum_steps": 1}
TWO = POD | {"mesh.slice": 2, "batch_size": 2048}
LONG = {"seq_len": 32768, "model.max_seq_len": 32768, "mesh.data": 1, "grad_accum_steps": 1}
CUBE = {"mesh.fsdp": 512, "mesh.data": 1, "grad_accum_steps": 1}

# Question -> (model, size, topology, settings) of its plans. The first of each is the yardstick.
QUESTIONS: dict[str, list[tuple[str, str, str, dict]]] = {
    "360m": [(model, "360m", "v5e:4x4", SMALL) for model in (PLAIN, RECURSIVE, MOR)],
    "memory": [(model, "360m", "v5e:2x2", COPIES) for model in (PLAIN, MOR_2)],
    "memory, cut": [
        (PLAIN, "360m", "v5e:4x4", FREE),
        (MOR_2, "360m", "v5e:4x4", FREE | ONCE),
        (MOR_2, "360m", "v5e:4x4", FREE | EACH),
    ],
    "network": [
        (PLAIN, "1.7b", "v5e:16x16", POD),
        (RECURSIVE, "1.7b", "v5e:16x16", POD | ONCE),
        (RECURSIVE, "1.7b", "v5e:16x16", POD | EACH),
        (MOR, "1.7b", "v5e:16x16", POD | ONCE),
    ],
    "two slices": [(m, "1.7b", "2xv5e:16x16", TWO) for m in (PLAIN, RECURSIVE, MOR)],
    # A row on one chip, then on as many chips as `tensor` says: one row each.
    "length": [
        (PLAIN, "1.7b", "v5e:4x4", LONG | {"batch_size": b, "mesh.fsdp": b, "mesh.tensor": t})
        for b, t in ((16, 1), (4, 4), (2, 8))
    ],
    "v6e": [(m, "1.7b", "v6e:16x16", POD) for m in (PLAIN, MOR)],
    "7b": [(m, "7b", "v5p:8x8x8", CUBE) for m in (PLAIN, RECURSIVE, MOR)],
}


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=tuple(QUESTIONS), help="one question instead of all")
    parser.add_argument("--save", action="store_true", help="write to benchmarks/results/")
    return parser.parse_args()


def command(model: str, size: str, topology: str, settings: dict) -> list[str]:
    """The command line of one plan."""
    name, _, choices = model.partition(":")
    config = f"--config=configs/{name}.py:{choices}size={size}"
    changes = [f"--config.{key}={value}" for key, value in settings.items()]
    return ["python", "launch/plan.py", config, f"--topology={topology}", *changes]


def plan(line: list[str]) -> dict:
    """The answer of one command. Raises `RuntimeError` with its last words if there is none."""
    run = [sys.executable, *line[1:], "--json", "--try_seconds=0"]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(line)}: {done.stderr[-500:]}")
    return json.loads(done.stdout)


def row(question: str, answer: dict, first: dict) -> list[str]:
    """One line of the table; first: the answer that ratios are to."""
    settings = answer["settings"]
    recursions = f"-{settings['recursions']}" if settings["recursions"] > 1 else ""
    name = f"{answer['variant']}{recursions}"
    name += f", {settings['gather_shared']}" if settings["gather_shared"] else ""
    axes = " ".join(f"{axis}={parts}" for axis, parts in answer["mesh"].items() if parts > 1)
    cells = [question, name, f"{answer['topology']}, {axes}", settings["remat"]]
    took = f"{answer['command_seconds']:.0f} s, {format_bytes(answer['host_peak'])}"
    if not answer["fits"] or "memory" not in answer:
        return [*cells, f"needs {format_bytes(answer['needed'])}", *("",) * 6, took]
    same = answer is first or "memory" not in first

    def beside(key: str) -> str:
        ratio = "" if same or not first[key] else f" ({answer[key] / first[key]:.2f})"
        return format_bytes(answer[key]) + ratio

    return [
        *cells,
        format_bytes(answer["memory"]["temporaries"]),
        beside("memory_total"),
        beside("network_inside"),
        beside("network_between"),
        answer["binds"],
        f"{answer['mfu']:.0%}",
        f"{answer['tokens_per_second'] / 1e6:.2f}M",
        took,
    ]


HEAD = (
    *("question", "model", "topology and mesh", "remat", "temporaries", "memory"),
    *("inside a slice", "between slices", "binds", "MFU", "tokens/s", "command"),
)


def table(rows: list[list[str]]) -> str:
    """Markdown."""
    lines = [HEAD, ["---"] * len(HEAD), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def verdicts(answers: dict[str, list[dict]]) -> dict[str, float]:
    """The two ratios, where their plans were made."""
    found = {}
    if "memory" in answers:
        plain, routed = answers["memory"]
        found["memory of MoR-2 over plain, no remat"] = (
            routed["memory_total"] / plain["memory_total"]
        )
    if "network" in answers:
        plain, once = (a["network_inside"] + a["network_between"] for a in answers["network"][:2])
        found["network of recursive-3 gathered once over plain"] = once / plain
    return found


def document(records: list[dict]) -> str:
    """The table and the answers that follow from plans; of equal commands the last one counts."""
    newest = {(r["question"], r["command"]): r for r in records}
    answers: dict[str, list[dict]] = {question: [] for question in QUESTIONS}
    for question, plans in QUESTIONS.items():
        lines = [" ".join(command(*one)) for one in plans]
        answers[question] = [newest[question, line] for line in lines if (question, line) in newest]
    rows = [row(question, one, found[0]) for question, found in answers.items() for one in found]
    complete = {q: found for q, found in answers.items() if len(found) == len(QUESTIONS[q])}
    return table(rows) + "".join(f"\n{n}: {r:.3f}\n" for n, r in verdicts(complete).items())


def main() -> None:
    """Plans, prints, saves."""
    args = parse_args()
    made: list[dict] = []
    for question in [args.only] if args.only else QUESTIONS:
        for one in QUESTIONS[question]:
            line = " ".join(command(*one))
            print(line, file=sys.stderr, flush=True)
            made.append({"question": question, "command": line, **plan(line.split())})
            timing.report("pod_plans", made[-1], args.save)
    print(document(made))
    if args.save:
        lines = (timing.RESULTS / "pod_plans.jsonl").read_text().splitlines()
        text = document([json.loads(line) for line in lines])
        head = "# Plans on pods\n\n`python benchmarks/pod_plans.py --save`\n\n"
        (timing.RESULTS / "pod_plans.md").write_text(head + text)


if __name__ == "__main__":
    main()
