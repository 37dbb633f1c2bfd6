"""Counts in optimised HLO: hand-written texts, and programs whose traffic is known beforehand."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from mor_jax.planning.hlo.collectives import Network, tally
from mor_jax.planning.hlo.groups import replica_groups, source_target_pairs
from mor_jax.planning.hlo.loops import trip_count
from mor_jax.planning.hlo.memory import traffic
from mor_jax.planning.hlo.text import arrays, parse_module

FOUR = Network(devices=4, slice_size=4)


def module(body: str, others: str = ""):
    return parse_module(
        f"HloModule m\n\n{others}\nENTRY %main (p: f32[8]) -> f32[8] {{\n{body}\n}}"
    )


def counted(body: str, others: str = "", network: Network = FOUR) -> dict[str, tuple[int, float]]:
    """kind -> (times, bytes)"""
    found = tally(module(body, others), network)
    parts = found.grouped(lambda one: one.kind)
    return {kind: (part.count, part.bytes) for kind, part in parts.items()}


# --- Text.


def test_types_with_layouts_tiles_and_memory_spaces():
    text = "(bf16[3,60]{1,0:T(8,128)(2,1)S(1)}, /*index=1*/f32[], token[], s4[5]{0})"
    first, scalar, token, nibbles = arrays(text)
    assert (first.dtype, first.dims, first.space) == ("bf16", (3, 60), 1)
    assert first.bytes == 360
    assert first.stored_bytes == 8 * 128 * 2
    assert (scalar.bytes, token.bytes, nibbles.bytes) == (4, 0, 3)


def test_tiles_pad_the_dimensions_that_lie_innermost():
    (array,) = arrays("f32[100,3]{0,1:T(8,128)}")
    assert array.stored_bytes == 128 * 8 * 4


def test_an_unknown_type_is_an_error_that_names_it():
    (array,) = arrays("q7[3]")
    with pytest.raises(ValueError, match="dtype='q7'"):
        _ = array.bytes


def test_a_text_without_entry_is_refused():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        parse_module("%f (x: f32[]) -> f32[] {\n}")


# --- Groups.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("replica_groups={{0,1},{2,3}}, x=1", ((0, 1), (2, 3))),
        ("replica_groups={}, x=1", ((0, 1, 2, 3),)),
        ("to_apply=%add", ((0, 1, 2, 3),)),
        ("replica_groups=[2,2]<=[4]", ((0, 1), (2, 3))),
        ("replica_groups=[2,2]<=[2,2]T(1,0), x=1", ((0, 2), (1, 3))),
        ("replica_groups=[2,4]<=[2,2,2]T(1,0,2)", ((0, 1, 4, 5), (2, 3, 6, 7))),
        ("replica_groups=mesh['a'=4] {'a'}, x=1", ((0, 1, 2, 3),)),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}", ((0, 2), (1, 3))),
        ("replica_groups=mesh['a'=2,'b'=2] {'b','a'}", ((0, 2, 1, 3),)),
        ("replica_groups=mesh['a'=8] {'a':(2)2}", ((0, 2), (1, 3), (4, 6), (5, 7))),
        ("replica_groups=mesh['a'=8] {'a':(1)2,'a':(4)2}", ((0, 1, 4, 5), (2, 3, 6, 7))),
        ("replica_groups=mesh['a'=2,'b'=1] {'b','a'}", ((0, 1),)),
        ("replica_groups=@mesh<a=2,b=2>, device_ids=(3,1,0,2) {a}", ((3, 0), (1, 2))),
        ("replica_groups=mesh['a'=4], device_ids=([2,2]T(1,0)) {'a':(1)2}", ((0, 1), (2, 3))),
    ],
)
def test_groups_in_every_form(text, expected):
    assert replica_groups(text, devices=4) == expected


def test_pairs_leave_out_devices_that_send_to_themselves():
    assert source_target_pairs("source_target_pairs={{0,1},{1,1},{2,0}}, x=1") == ((0, 1), (2, 0))


# --- Loops.

COUNTED = """
%one_less (a: s32[]) -> s32[] {
  %a = s32[] parameter(0)
  %two = s32[] constant(2)
  ROOT %n = s32[] subtract(%a, %two)
}
%body (s: (s32[], s32[], f32[8])) -> (s32[], s32[], f32[8]) {
  %s = (s32[], s32[], f32[8]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %stop = s32[] get-tuple-element(%s), index=1
  %x = f32[8] get-tuple-element(%s), index=2
  %next = s32[] fusion(%i), kind=kLoop, calls=%one_less
  %r = f32[8] all-reduce(%x), replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %t = (s32[], s32[], f32[8]) tuple(%next, %stop, %r)
}
%condition (s.1: (s32[], s32[], f32[8])) -> pred[] {
  %s.1 = (s32[], s32[], f32[8]) parameter(0)
  %i.1 = s32[] get-tuple-element(%s.1), index=0
  %stop.1 = s32[] get-tuple-element(%s.1), index=1
  ROOT %c = pred[] compare(%i.1, %stop.1), direction=GT
}
"""
LOOP = """
  %p = f32[8] parameter(0)
  %start = s32[] constant(11)
  %stop = s32[] constant({stop})
  %init = (s32[], s32[], f32[8]) tuple(%start, %stop, %p)
  %w = (s32[], s32[], f32[8]) while(%init), condition=%condition, body=%body{config}
  ROOT %out = f32[8] get-tuple-element(%w), index=2"""


@pytest.mark.parametrize(("stop", "turns"), [(0, 6), (1, 5), (11, 0)])
def test_a_loops_turns_follow_from_its_counter(stop, turns):
    found = counted(LOOP.format(stop=stop, config=""), COUNTED)
    assert found == ({"all-reduce": (turns, turns * 2 * 32 * 3 / 4)} if turns else {}) or (
        turns == 0 and found["all-reduce"] == (0, 0)
    )


def test_the_compilers_own_count_comes_first():
    config = ', backend_config={"known_trip_count":{"n":"40"}}'
    assert counted(LOOP.format(stop=0, config=config), COUNTED)["all-reduce"][0] == 40


def test_a_loop_of_unknown_length_counts_once_and_is_named():
    text = LOOP.format(stop=0, config="").replace("constant(11)", "custom-call()")
    parsed = module(text, COUNTED)
    found = tally(parsed, FOUR)
    assert found.unknown_loops == ("w",) and found.count == 1
    entry = parsed.computations["main"]
    assert trip_count(parsed, entry, entry.instructions["w"]) is None


# --- Collectives.


@pytest.mark.parametrize(
    ("line", "kind", "received"),
    [
        ("f32[32] all-gather(%p), replica_groups={{0,1,2,3}}, dimensions={0}", "all-gather", 96),
        ("f32[16] all-gather(%p), replica_groups={{0,1},{2,3}}, dimensions={0}", "all-gather", 32),
        ("f32[2] reduce-scatter(%p), replica_groups={}, to_apply=%f", "reduce-scatter", 24),
        ("f32[8] all-reduce(%p), replica_groups=[1,4]<=[4], to_apply=%f", "all-reduce", 48),
        ("f32[8] all-to-all(%p), replica_groups={{0,1,2,3}}", "all-to-all", 24),
        ("f32[8] ragged-all-to-all(%p), replica_groups={}", "ragged-all-to-all", 24),
        ("f32[8] collective-permute(%p), source_target_pairs={{0,1}}", "collective-permute", 32),
        ("f32[8] collective-broadcast(%p), replica_groups={}", "collective-broadcast", 32),
    ],
)
def test_bytes_of_each_kind(line, kind, received):
    assert counted(f"  %p = f32[8] parameter(0)\n  ROOT %r = {line}") == {kind: (1, received)}


@pytest.mark.parametrize("line", ["all-reduce(%p), replica_groups={{0},{1}}", "add(%p, %p)"])
def test_what_moves_nothing_is_not_listed(line):
    assert counted(f"  %p = f32[8] parameter(0)\n  ROOT %r = f32[8] {line}") == {}


def test_started_operations_count_once():
    body = """
  %p = f32[8] parameter(0)
  %s = (f32[8], f32[32]) all-gather-start(%p), replica_groups={{0,1,2,3}}, dimensions={0}
  %d = f32[32] all-gather-done(%s)
  %q = ((f32[8]), f32[2], u32[]) async-start(%p), calls=%wrapped
  %u = ((f32[8]), f32[2], u32[]) async-update(%q), calls=%wrapped
  ROOT %e = f32[2] async-done(%u), calls=%wrapped"""
    wrapped = """
%wrapped (a: f32[8]) -> f32[2] {
  %a = f32[8] parameter(0)
  ROOT %rs = f32[2] reduce-scatter(%a), replica_groups={{0,1,2,3}}, to_apply=%add
}
"""
    assert counted(body, wrapped) == {"all-gather": (1, 96), "reduce-scatter": (1, 24)}


CHAIN = """
%began (a: f32[8]) -> (f32[8], f32[32]) {
  %a = f32[8] parameter(0)
  %g = f32[32] all-gather(%a), channel_id=7, replica_groups={}, backend_config={ASYNC}
  ROOT %c = (f32[8], f32[32]) custom-call(%g), custom_call_target="AsyncCollectiveStart"
}
%goes_on (b: f32[8], k: f32[32]) -> f32[8] {
  %b = f32[8] parameter(0)
  %k = f32[32] parameter(1)
  %g.1 = f32[32] all-gather(%b), channel_id=7, replica_groups={}, backend_config={ASYNC}
  ROOT %m = f32[8] multiply(%b, %b)
}
%ends (d: f32[8], l: f32[32]) -> f32[32] {
  %d = f32[8] parameter(0)
  %l = f32[32] parameter(1)
  %g.2 = f32[32] all-gather(%d), channel_id=7, replica_groups={}, backend_config={ASYNC}
  ROOT %c.2 = f32[32] custom-call(%d, %l, %g.2), custom_call_target="AsyncCollectiveDone"
}
""".replace("{ASYNC}", '{"async_collective_fusion_config":{}}')
CHAINED = """
  %p = f32[8] parameter(0)
  %f = (f32[8], f32[32]) fusion(%p), kind=kCustom, calls=%began
  %k = f32[32] get-tuple-element(%f), index=1
  %o = f32[8] fusion(%p, %k), kind=kOutput, calls=%goes_on
  ROOT %r = f32[32] fusion(%p, %k), kind=kCustom, calls=%ends"""


def test_an_operation_spread_over_fusions_counts_where_it_starts():
    assert counted(CHAINED, CHAIN) == {"all-gather": (1, 96)}


def test_a_fused_all_reduce_of_which_each_keeps_a_slice_is_a_reduce_scatter():
    body = "  %p = f32[8] parameter(0)\n"
    body += "  ROOT %r = f32[2] fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1"
    fused = """
%all-reduce-scatter.1 (a: f32[8]) -> f32[2] {
  %a = f32[8] parameter(0)
  %ar = f32[8] all-reduce(%a), replica_groups={{0,1,2,3}}, to_apply=%add
  %i = u32[] partition-id()
  ROOT %ds = f32[2] dynamic-slice(%ar, %i), dynamic_slice_sizes={2}
}
"""
    assert counted(body, fused) == {"reduce-scatter": (1, 24)}


def test_of_a_conditional_the_costlier_branch_counts():
    branch = """
%{name} (a.{name}: f32[8]) -> f32[8] {{
  %a.{name} = f32[8] parameter(0)
  ROOT %r.{name} = f32[8] {kind}(%a.{name}), replica_groups={{}}
}}
"""
    branches = branch.format(name="x", kind="all-to-all") + branch.format(name="y", kind="copy")
    body = """
  %p = f32[8] parameter(0)
  %i = s32[] constant(0)
  ROOT %c = f32[8] conditional(%i, %p, %p), branch_computations={%y, %x}"""
    assert counted(body, branches) == {"all-to-all": (1, 24)}


def test_networks_inside_and_between_add_up_to_the_ring():
    two = Network(devices=8, slice_size=4, slices=2)
    body = "  %p = f32[8] parameter(0)\n  ROOT %r = f32[64] all-gather(%p), replica_groups={}"
    found = tally(module(body), two)
    assert (found.inside, found.between) == (32 * 8 * 3 / 4, 32 * 8 / 8)
    assert found.bytes == 32 * 7
    body = "  %p = f32[8] parameter(0)\n  ROOT %r = f32[8] all-to-all(%p), replica_groups={}"
    found = tally(module(body), two)
    assert (found.inside, found.between) == (32 * 3 / 8, 32 * 4 / 8)


def test_permutations_are_split_by_the_pairs_that_cross():
    body = "  %p = f32[8] parameter(0)\n"
    body += "  ROOT %r = f32[8] collective-permute(%p), source_target_pairs={{0,4},{4,0}}"
    found = tally(module(body), Network(devices=8, slice_size=4, slices=2))
    assert (found.inside, found.between) == (0, 32)


@pytest.mark.parametrize(
    ("kind", "received"), [("ALL_REDUCE", 2 * 32 * 2 / 3), ("ALL_GATHER", 64), ("ONE_TO_ONE", 32)]
)
def test_sends_to_other_slices(kind, received):
    """As the compiler writes them for several slices; a send to the host alone is no exchange."""
    attributes = (
        'is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="HANDLER",'
        f'_xla_megascale_target="{{1:3}}x{{0:3}}",_xla_megascale_transfer_type="{kind}"}}'
    )
    body = f"""
  %p = f32[8] parameter(0)
  %a = token[] after-all()
  ROOT %s = (f32[8], u32[], token[]) send(%p, %a), channel_id=5, {attributes}"""
    sent = body.replace("HANDLER", "xla_megascale_runtime")
    found = tally(module(sent), Network(devices=4, slice_size=4, slices=3))
    assert (found.inside, found.between) == (0, pytest.approx(received))
    assert tally(module(body.replace("megascale", "other")), FOUR).count == 0


# --- Programs whose traffic is known.


def compiled(function, axes: dict[str, int], *shapes: tuple[int, ...]):
    mesh = Mesh(np.asarray(jax.devices()[:8]).reshape(tuple(axes.values())), tuple(axes))
    run = jax.shard_map(
        function, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False
    )
    return jax.jit(run).lower(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)).compile()


def test_a_program_with_every_kind_of_exchange_inside_a_scan():
    def step(carry, _):
        whole = jax.lax.all_gather(carry, "x", tiled=True)  # 16 -> 64
        part = jax.lax.psum_scatter(whole, "x", tiled=True)
        total = jax.lax.psum(part, "y")
        turned = jax.lax.ppermute(total, "y", [(0, 1), (1, 0)])
        return jax.lax.all_to_all(turned.reshape(4, 4), "x", 0, 0).reshape(16) + 1, None

    def function(x):
        return jax.lax.scan(step, x, None, length=5)[0]

    text = compiled(function, {"y": 2, "x": 4}, (16,)).as_text()
    found = tally(parse_module(text), Network(devices=8, slice_size=4, slices=2))
    assert not found.unknown_loops
    totals = {kind: (p.count, p.inside, p.between) for kind, p in _by_kind(found).items()}
    assert totals == {
        "all-gather": (5, 5 * 192, 0),
        "reduce-scatter": (5, 5 * 192, 0),
        "all-reduce": (5, 0, 5 * 64),
        "collective-permute": (5, 0, 5 * 64),
        "all-to-all": (5, 5 * 48, 0),
    }


def _by_kind(found):
    return found.grouped(lambda one: one.kind)


def test_nested_scans_multiply():
    def inner(x, _):
        return jax.lax.psum(x, "x") * 0.5, None

    def outer(x, _):
        return jax.lax.scan(inner, x, None, length=3)[0], None

    def function(x):
        return jax.lax.scan(outer, x, None, length=7)[0]

    text = compiled(function, {"x": 8}, (16,)).as_text()
    assert tally(parse_module(text), Network(8, 8)).count == 21


# --- Main memory.


def test_fast_memory_is_free_and_fusions_read_what_they_slice():
    fused = """
%f (a: f32[100,8], i: s32[]) -> f32[1,8] {
  %a = f32[100,8] parameter(0)
  %i = s32[] parameter(1)
  %z = s32[] constant(0)
  %d = f32[1,8] dynamic-slice(%a, %i, %z), dynamic_slice_sizes={1,8}
  ROOT %n = f32[1,8] negate(%d)
}
%u (b: f32[100,8], v: f32[1,8], j: s32[]) -> f32[100,8] {
  %b = f32[100,8] parameter(0)
  %v = f32[1,8] parameter(1)
  %j = s32[] parameter(2)
  %z.1 = s32[] constant(0)
  ROOT %w = f32[100,8] dynamic-update-slice(%b, %v, %j, %z.1)
}
"""
    body = """
  %p = f32[100,8] parameter(0)
  %k = s32[] parameter(1)
  %s = f32[1,8] fusion(%p, %k), kind=kLoop, calls=%f
  %t = f32[1,8]{1,0:S(1)} copy(%s)
  ROOT %r = f32[100,8] fusion(%p, %t, %k), kind=kLoop, calls=%u"""
    # slice: 32 read, 4 for the index, 32 written; copy: 32 read; update: 4 read, 32 written.
    assert traffic(module(body, fused)).bytes == 68 + 32 + 36


def test_a_chain_of_fusions_moves_its_result_once():
    # start: reads 32 and writes 128; what follows reads and writes only what it computes.
    assert traffic(module(CHAINED, CHAIN)).bytes == 32 + 128 + 32 + 32


def test_traffic_agrees_with_the_compiler_where_there_is_no_loop():
    @jax.jit
    def function(x, y):
        return jnp.tanh(x @ y) @ y

    done = function.lower(*[jax.ShapeDtypeStruct((96, 96), jnp.float32)] * 2).compile()
    counted_bytes = traffic(parse_module(done.as_text())).bytes
    assert counted_bytes == pytest.approx(done.cost_analysis()["bytes accessed"], rel=0.05)


def test_traffic_of_a_scan_grows_with_its_length():
    @partial(jax.jit, static_argnums=1)
    def function(x, length):
        return jax.lax.scan(lambda c, _: (jnp.tanh(c @ c), None), x, None, length=length)[0]

    shape = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    short, long = (
        traffic(parse_module(function.lower(shape, n).compile().as_text())).bytes for n in (10, 20)
    )
    assert long / short == pytest.approx(2, rel=0.1)
