"""`python -m mor_jax.convert.parity --cases DIR`."""

import sys

from mor_jax.convert.parity.run import main
from mor_jax.runtime.preemption import Signals

if __name__ == "__main__":
    with Signals("parity writes nothing"):
        sys.exit(main())
