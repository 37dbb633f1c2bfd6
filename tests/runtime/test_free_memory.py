"""Free memory, and programs that would need more."""

import jax
import jax.numpy as jnp
import pytest

from mor_jax.runtime import free_memory
from mor_jax.runtime.free_memory import CheckedFunction, host_free_bytes

GIB = 2**30


def machine(root, available, **files):
    """A stand-in for the kernel's files: kB that are available, and those of a container."""
    (root / "proc").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal: 9 kB\nMemAvailable:  {available} kB\n")
    for name, told in files.items():
        file = root / "sys/fs/cgroup" / name.replace("__", "/").replace("memory_", "memory.")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{told}\n")
    return root


def test_a_container_may_have_less_than_its_machine(tmp_path):
    free = 8 * 2**20
    assert host_free_bytes(machine(tmp_path / "a", free)) == 8 * GIB
    limited = {"memory_max": 3 * GIB, "memory_current": GIB}
    assert host_free_bytes(machine(tmp_path / "b", free, **limited)) == 2 * GIB
    assert host_free_bytes(machine(tmp_path / "c", free, **limited | {"memory_max": "max"})) == (
        8 * GIB
    )
    older = {"memory__memory_limit_in_bytes": GIB, "memory__memory_usage_in_bytes": 2 * GIB}
    assert host_free_bytes(machine(tmp_path / "d", free, **older)) == 0


def test_what_does_not_fit_is_refused_before_it_runs(monkeypatch):
    ran = []

    def total(weights, rows, power):
        jax.debug.callback(lambda: ran.append(power))
        return (rows @ weights) ** power

    program, rows = CheckedFunction(total, "eval.batch_size", 4096), jnp.ones((4096, 8))
    monkeypatch.setattr(free_memory, "free_bytes", lambda: 40_000)
    with pytest.raises(
        ValueError, match=r"eval\.batch_size=4096: batches of 4,096 sequences need"
    ) as e:
        program(jnp.ones((8, 64)), rows, power=2)
    jax.effects_barrier()
    assert not ran and "0.0 MB are free. Try 128" in str(e.value)
    monkeypatch.setattr(free_memory, "free_bytes", lambda: 4)
    with pytest.raises(ValueError, match="Shorten the sequences"):
        program(jnp.ones((8, 64)), rows, power=2)
    monkeypatch.undo()
    for power in (1, 2):
        assert (program(jnp.ones((8, 64)), rows, power=power) == 8**power).all()
    jax.effects_barrier()
    assert ran == [1, 2]
