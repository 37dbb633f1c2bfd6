"""Compiles the cases that come in, one JSON line each, and answers each with a line.

Started by gpu_compile.py with the interpreter of the environment that holds the compiler.
"""

import json
import os
import resource
import sys
import traceback
from pathlib import Path

# Nothing runs here; a GPU of this machine stays free.
os.environ["JAX_PLATFORMS"] = "cpu"
ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]


def main() -> None:
    """Until the standard input ends."""
    # Compilers print on the standard output what they like; answers need a way of their own.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import jax

    from gpu_compiling import programs
    from gpu_compiling.matrix import Case

    for line in sys.stdin:
        try:
            answer = programs.compiled(Case(**json.loads(line)))
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"[:500]}
        answer["host_peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps(answer), file=answers, flush=True)
        jax.clear_caches()


if __name__ == "__main__":
    main()
