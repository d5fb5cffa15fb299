"""What is counted in a compiled program is what was written into it: programs by hand, whose work is known."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec

from ddt_jax.scaling import hlo, program

P = PartitionSpec


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def shape(*dims, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(dims, dtype)


def read(function, *args, devices=1):
    return program.read(jax.jit(function).lower(*args).compile().as_text(), devices)


def found(work, mesh):
    """{(kind, axes, bytes): times}"""
    return {(c.kind, c.axes(mesh), c.bytes): n for c, n in work.collectives.items()}


def test_every_collective_is_found_with_its_bytes_axis_and_times(mesh):
    """By shard_map, which writes them down as they are meant: two nested loops, and one of each kind behind them."""

    def local(w, x):  # a device's part: w [6, 16, 64], x [8, 64]
        def layer(x, w):
            whole = jax.lax.all_gather(w, "fsdp", tiled=True)
            inner = lambda x, _: (jnp.tanh(jax.lax.psum(x @ whole, "data")), None)  # noqa: E731
            return jax.lax.scan(inner, x, None, length=3)[0], None

        x, _ = jax.lax.scan(layer, x, w)
        part = jax.lax.psum_scatter(x, "fsdp", scatter_dimension=1, tiled=True)
        turned = jax.lax.ppermute(x, "data", [(0, 1), (1, 0)])
        swapped = jax.lax.all_to_all(x, "fsdp", 1, 0, tiled=True)
        return jax.lax.psum(part.sum() + turned.sum() + swapped.sum(), ("data", "fsdp"))

    specs = (P(None, "fsdp"), P("data"))
    run = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)
    work = read(run, shape(6, 64, 64), shape(16, 64), devices=8)
    rows = 8 * 64 * 4
    assert found(work, mesh) == {
        ("all-gather", ("fsdp",), 64 * 64 * 4): 6,
        ("all-reduce", ("data",), rows): 18,
        ("reduce-scatter", ("fsdp",), rows): 1,
        ("collective-permute", ("data",), rows): 1,
        ("all-to-all", ("fsdp",), rows): 1,
        ("all-reduce", ("data", "fsdp"), 4): 1,
    }
    assert work.flops == 18 * 2 * 8 * 64 * 64
    assert not work.unknown_loops


def test_what_the_partitioner_inserts_is_found(mesh):
    """A product over a dimension that is split: each device adds up its part, and all of a group add these."""
    split = jax.NamedSharding(mesh, P("data", "fsdp")), jax.NamedSharding(mesh, P("fsdp", None))
    x, w = (
        jax.ShapeDtypeStruct(dims, jnp.float32, sharding=s) for dims, s in zip(((32, 64), (64, 48)), split, strict=True)
    )
    rows = jax.NamedSharding(mesh, P("data", None))
    compiled = jax.jit(jnp.matmul, out_shardings=rows).lower(x, w).compile()
    work = program.read(compiled.as_text(), 8)
    assert found(work, mesh) == {("all-reduce", ("fsdp",), 16 * 48 * 4): 1}
    assert work.flops == 2 * 16 * 16 * 48


@pytest.mark.parametrize(("stride", "groups"), [(1, 1), (2, 2)])
def test_convolutions_count_as_the_compiler_counts_them(stride, groups):
    """Padding is no work, and neither are the zeros between elements in gradients."""

    def run(x, w):
        dims = ("NHWC", "HWIO", "NHWC")
        how = {"dimension_numbers": dims, "feature_group_count": groups}
        return jax.lax.conv_general_dilated(x, w, (stride, stride), "SAME", **how)

    x, w = shape(2, 8, 8, 4), shape(3, 3, 4 // groups, 6)
    compiled = jax.jit(run).lower(x, w).compile()
    once = program.read(compiled.as_text(), 1).flops
    assert once == compiled.cost_analysis()["flops"]
    assert read(jax.grad(lambda x, w: jnp.sum(run(x, w) ** 2), argnums=(0, 1)), x, w).flops == 3 * once


def test_memory_traffic_is_that_of_the_slices_that_a_loop_reads():
    """Of 64 stacked matrices each turn reads one: all of them once, not 64 times."""
    w, x = shape(64, 128, 128), shape(8, 128)
    work = read(lambda w, x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0], w, x)
    stacked = 64 * 128 * 128 * 4
    assert stacked <= work.hbm_bytes <= 6 * stacked  # a CPU copies a slice before it uses it


# What a TPU's compiler writes: products as convolutions, asynchronous calls, a scattered sum inside a fusion, arrays on
# the chip (S(1)), a loop whose trips only its condition tells, and a kernel.
TPU = """HloModule jit_step, num_partitions=8

%scatter (p: f32[64,32]) -> f32[16,32] {
  %p = f32[64,32]{1,0:T(8,128)} parameter(0)
  %sum = f32[64,32]{1,0:T(8,128)} all-reduce(%p), channel_id=3, replica_groups=[2,4]<=[8], to_apply=%add
  %i = s32[] partition-id()
  %zero = s32[] constant(0)
  ROOT %part = f32[16,32]{1,0:T(8,128)} dynamic-slice(%sum, %i, %zero), dynamic_slice_sizes={16,32}
}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}

%gather (q: bf16[16,32]) -> bf16[32,32] {
  %q = bf16[16,32]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %whole = bf16[32,32]{1,0:T(8,128)(2,1)} all-gather(%q), replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}
}

%body (state: (s32[], bf16[8,32])) -> (s32[], bf16[8,32]) {
  %state = (s32[], bf16[8,32]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %n = s32[] get-tuple-element(%state), index=0
  %x = bf16[8,32]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%state), index=1
  %w = bf16[32,32]{1,0:T(8,128)(2,1)S(1)} constant({...})
  %y = bf16[8,32]{1,0:T(8,128)(2,1)S(1)} convolution(%x, %w), dim_labels=bf_io->bf
  %one = s32[] constant(1)
  %more = s32[] add(%n, %one)
  ROOT %next = (s32[], bf16[8,32]{1,0:T(8,128)(2,1)S(1)}) tuple(%more, %y)
}

%until (state: (s32[], bf16[8,32])) -> pred[] {
  %state = (s32[], bf16[8,32]{1,0}) parameter(0)
  %n = s32[] get-tuple-element(%state), index=0
  %limit = s32[] constant(7)
  ROOT %less = pred[] compare(%n, %limit), direction=LT
}

ENTRY %main (g: f32[64,32], q: bf16[16,32], s: (s32[], bf16[8,32]), k: bf16[2,4,256,64]) -> f32[16,32] {
  %g = f32[64,32]{1,0:T(8,128)} parameter(0)
  %q = bf16[16,32]{1,0:T(8,128)(2,1)} parameter(1)
  %s = (s32[], /*index=1*/bf16[8,32]{1,0:T(8,128)(2,1)S(1)}) parameter(2)
  %k = bf16[2,4,256,64]{3,2,1,0:T(8,128)(2,1)} parameter(3)
  %n = s32[1,2,2] constant({...})
  %start = ((bf16[16,32]{1,0}), bf16[32,32]{1,0}, u32[]) async-start(%q), calls=%gather
  %done = bf16[32,32]{1,0} async-done(%start), calls=%gather
  %loop = (s32[], bf16[8,32]{1,0:T(8,128)(2,1)S(1)}) while(%s), condition=%until, body=%body
  %splash_mha_fwd_residuals.3 = bf16[2,4,256,64] custom-call(%n, %k, %k), custom_call_target="tpu_custom_call"
  ROOT %out = f32[16,32]{1,0:T(8,128)} fusion(%g), kind=kCustom, calls=%scatter
}
"""


def test_programs_of_a_tpu_are_read(mesh):
    work = program.read(TPU, 8, attention_share=0.5)
    assert found(work, mesh) == {
        ("reduce-scatter", ("fsdp",), 64 * 32 * 4): 1,
        ("all-gather", ("data",), 2 * 16 * 32 * 2): 1,
    }
    attention = 0.5 * 2 * 2 * (2 * 4 * 256) * 256 * 64
    assert work.flops == 7 * 2 * 8 * 32 * 32 + attention
    assert not work.unknown_loops and not work.unknown_kernels
    loop_only = program.read(TPU.replace("splash_mha_fwd_residuals.3", "another"), 8)
    assert loop_only.unknown_kernels == {"another"} and loop_only.flops == 7 * 2 * 8 * 32 * 32
    assert program.read(TPU.replace("constant(7)", "get-tuple-element(%state), index=1"), 8).unknown_loops == {"loop"}


@pytest.mark.parametrize(
    ("groups", "first"),
    [
        ("{{0,4},{1,5},{2,6},{3,7}}", (0, 4)),
        ("[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("{}", tuple(range(8))),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_0'}", (0, 4)),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", (0, 1, 2, 3)),
        ("mesh['axis_0'=8] {'axis_0':(2)4}", (0, 1, 2, 3)),
        ("mesh['axis_0'=8] {'axis_0':(1)2}", (0, 4)),
        ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", (0, 4)),
        ("mesh['a'=2,'b'=2], device_ids=(0,2,1,3) {'b'}", (0, 2)),
    ],
)
def test_groups_of_devices_are_read_in_every_spelling(groups, first):
    line = f"  ROOT %out = f32[4] all-reduce(%x), channel_id=1, replica_groups={groups}, to_apply=%add"
    text = "ENTRY %main (x: f32[4]) -> f32[4] {\n  %x = f32[4] parameter(0)\n" + line + "\n}\n"
    assert [c.group for c in program.read(text, 8).collectives] == [first]


def test_text_that_is_no_program_is_an_error():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.parse("HloModule nothing")
