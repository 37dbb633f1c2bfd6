"""Runs a benchmark in two checkouts by turns, so that both meet the same state of the machine.

    python benchmarks/compare_checkouts.py --rounds=3 ../before benchmarks/step_time.py --rounds=5

The other checkout comes first, then this one, and so on. Prints the last line of every call that
is JSON, then for every number in them the median of each checkout and the ratio (this / other).
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("other", type=Path, help="root of the other checkout")
    parser.add_argument("--rounds", type=int, default=3, help="calls in each checkout")
    parser.add_argument("--match", default="seconds", help="print values whose name contains this")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="script and its arguments")
    args = parser.parse_args()
    values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for number in range(args.rounds):
        for name, root in (("other", args.other.resolve()), ("this", HERE)):
            record = measured(root, args.command)
            print(json.dumps({"round": number, "checkout": name, "record": record}), flush=True)
            for path, value in numbers(record):
                values[path][name].append(value)
    print(f"\n{'value':<40}{'other':>12}{'this':>12}{'ratio':>8}")
    for path, sides in values.items():
        if args.match in path and sides["other"] and sides["this"]:
            other, this = (statistics.median(sides[name]) for name in ("other", "this"))
            ratio = f"{this / other:.3f}" if other else "-"
            print(f"{path:<40}{other:>12.4g}{this:>12.4g}{ratio:>8}")


def measured(root: Path, command: list[str]) -> Any:
    """The last line of JSON that a script prints."""
    done = subprocess.run(
        [sys.executable, *command], cwd=root, stdout=subprocess.PIPE, text=True, check=True
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        raise SystemExit(f"{' '.join(command)}: printed no line of JSON in {root}")
    return json.loads(lines[-1])


def numbers(record: Any, path: str = "") -> list[tuple[str, float]]:
    """Dotted path and value of every number in nested JSON values."""
    if isinstance(record, dict):
        return [pair for key, value in record.items() for pair in numbers(value, f"{path}.{key}")]
    if isinstance(record, list):
        return [pair for i, value in enumerate(record) for pair in numbers(value, f"{path}.{i}")]
    if isinstance(record, int | float) and not isinstance(record, bool):
        return [(path.removeprefix("."), float(record))]
    return []


if __name__ == "__main__":
    main()
