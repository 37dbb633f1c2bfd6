"""Compiled programs kept with a run; traces and memory on request."""

import os

import jax
import jax.numpy as jnp
import pytest
from etils import epath

from mor_jax.config import ProfileConfig
from mor_jax.observability.profiling import Profile, memory, memory_line
from mor_jax.runtime.compilation_cache import use_cache_dir


@pytest.fixture
def no_cache(monkeypatch):
    """As for a user who has not named a place for compiled programs; everything is kept."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    yield
    jax.config.update("jax_persistent_cache_min_compile_time_secs", before)


def compile_one():
    """Compiles a program that nothing else has."""
    jax.clear_caches()
    jax.jit(lambda x: jnp.sin(x) * 12345.0)(jnp.ones(3)).block_until_ready()


def entries(path):
    return {p.name: p.read_bytes() for p in path.glob("compilation_cache/*-cache")}


def test_programs_are_kept_and_those_cut_by_a_kill_are_replaced(tmp_path, no_cache):
    before = jax.config.jax_compilation_cache_dir
    with use_cache_dir(epath.Path(tmp_path), True) as cache:
        compile_one()
        cache.seal(idle=True)
    whole = entries(tmp_path)
    assert len(whole) >= 1
    assert jax.config.jax_compilation_cache_dir == before
    # A kill in the middle of an entry, and one before an entry was noted.
    cut = next(iter(whole))
    (tmp_path / "compilation_cache" / cut).write_bytes(whole[cut][:10])
    (tmp_path / "compilation_cache" / "another-cache").write_bytes(b"half of")
    with use_cache_dir(epath.Path(tmp_path), True):
        assert entries(tmp_path).keys() == whole.keys() - {cut}
        compile_one()
    # Compiled anew: an entry holds the time that it took, so its bytes differ a little.
    assert entries(tmp_path).keys() == whole.keys()
    assert len(entries(tmp_path)[cut]) > len(whole[cut]) / 2
    compile_one()
    assert entries(tmp_path).keys() == whole.keys()


def test_an_entry_counts_when_it_has_stopped_growing(tmp_path, no_cache):
    folder = tmp_path / "compilation_cache"
    folder.mkdir()
    with use_cache_dir(epath.Path(tmp_path), True) as cache:
        (folder / "a-cache").write_bytes(b"1")
        cache.seal()
        (folder / "a-cache").write_bytes(b"12")
        (folder / "b-cache").write_bytes(b"1")
        cache.seal()
        cache.seal()
        (folder / "b-cache").write_bytes(b"123")
    with use_cache_dir(epath.Path(tmp_path), True):
        assert entries(tmp_path) == {"a-cache": b"12"}


def test_a_place_named_by_the_user_or_none_is_left_alone(tmp_path, no_cache, monkeypatch):
    before = jax.config.jax_compilation_cache_dir
    with use_cache_dir(epath.Path(tmp_path), False) as cache:
        assert cache is None
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", os.fspath(tmp_path / "mine"))
    with use_cache_dir(epath.Path(tmp_path), True) as cache:
        assert cache is None
        assert jax.config.jax_compilation_cache_dir == before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("first", [1, 3], ids=["from the start", "taken up inside"])
def test_the_steps_asked_for_are_traced(tmp_path, first):
    said = []
    with Profile(epath.Path(tmp_path), ProfileConfig(steps=(2, 3))) as profile:
        for step in range(first, 6):
            profile.before(step)
            said.append(profile.after(step, jnp.sin(jnp.ones(2))))
    assert [bool(text) for text in said].index(True) == 3 - first
    assert sum(bool(text) for text in said) == 1
    assert f"steps 2 to 3 in {tmp_path / 'profile'}" in "".join(said)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_no_trace_unless_asked_for_and_an_error_ends_it(tmp_path):
    with Profile(epath.Path(tmp_path), ProfileConfig()) as profile:
        profile.before(1)
        assert profile.after(1, jnp.ones(1)) == ""
    assert list(tmp_path.iterdir()) == []
    for _ in range(2):
        # A trace left on would refuse the next one.
        with (
            pytest.raises(RuntimeError, match="in the step"),
            Profile(epath.Path(tmp_path), ProfileConfig(steps=(1, 9))) as profile,
        ):
            profile.before(1)
            raise RuntimeError("in the step")


def test_memory_is_that_of_the_compiled_program_and_of_the_host():
    program = jax.jit(lambda x: x + 1).lower(jnp.ones((256, 1024))).compile()
    report = memory(program)
    assert report["arguments"] == 2**20
    assert report["host"] > 50 * 2**20
    line = memory_line(report | {"device_peak": 3 * 2**20, "device_limit": 2**30})
    assert "state and batch 1 MiB" in line
    assert "peak device memory 3 MiB, device memory 1,024 MiB" in line
