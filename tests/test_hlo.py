"""Reading compiled programs: closed forms first, then XLA's own counts, then what a TPU writes."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from rslora_jax.paths import AdapterError
from rslora_jax.plan.collectives import collectives, table
from rslora_jax.plan.counting import count
from rslora_jax.plan.groups import first_group
from rslora_jax.plan.hlo import parse
from rslora_jax.plan.shapes import read_shapes

N, LAYERS = 64, 5
PRODUCT = 2 * N**3
SQUARE = 4 * N * N  # bytes of a float32 [N, N]


def struct(*shape, dtype="float32"):
    return jax.ShapeDtypeStruct(shape, dtype)


def compiled(function, *args):
    return jax.jit(function).lower(*args).compile()


def text_of(function, *args):
    return compiled(function, *args).as_text()


def scanned(ws, x):
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0]


def nested(ws, x):
    def outer(x, w):
        return lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=3)[0], None

    return lax.scan(outer, x, ws)[0]


def twice(x, w):
    return jnp.tanh(jnp.tanh(x @ w) @ w), None


def stacked(body):
    return jax.grad(lambda ws, x: lax.scan(body, x, ws)[0].sum(), (0, 1))


STACK = (struct(LAYERS, N, N), struct(N, N))
CLOSED = {
    "a product": (jnp.dot, (struct(8, 32), struct(32, 16)), 2 * 8 * 32 * 16),
    "a batch of products": (jnp.matmul, (struct(3, 8, 32), struct(3, 32, 16)), 6 * 8 * 32 * 16),
    "a scan": (scanned, STACK, LAYERS * PRODUCT),
    "a scan in a scan": (nested, STACK, 3 * LAYERS * PRODUCT),
    # Each product has two in its backward pass; rematerialization runs the forward pass twice.
    "the gradient of a scan": (stacked(twice), STACK, LAYERS * (2 + 4) * PRODUCT),
    "the same with remat": (stacked(jax.checkpoint(twice)), STACK, LAYERS * (4 + 4) * PRODUCT),
}


@pytest.mark.parametrize("case", CLOSED)
def test_products_are_counted_as_often_as_they_run(case):
    function, args, flops = CLOSED[case]
    found = count(text_of(function, *args))
    assert (found.flops, found.unknown) == (flops, ())


def test_a_product_reads_its_operands_and_writes_its_result():
    assert count(text_of(jnp.dot, struct(N, N), struct(N, N))).hbm_bytes == 3 * SQUARE


def test_a_scan_reads_the_weights_of_one_layer_a_round():
    """Charged with the whole stack each round, the traffic would grow as the square."""
    few, some, many = (
        count(text_of(scanned, struct(n, N, N), struct(N, N))).hbm_bytes for n in (4, 8, 12)
    )
    assert many - some == some - few
    assert 4 * 3 * SQUARE <= some - few <= 4 * 8 * SQUARE


def convolve(strides=(1, 1), groups=1, **options):
    def apply(x, kernel):
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(
            x,
            kernel,
            strides,
            dimension_numbers=numbers,
            feature_group_count=groups,
            **options,
        )

    return apply


IMAGE, KERNEL = struct(2, 9, 11, 8), struct(3, 3, 8, 16)
STRAIGHT = {
    "a product": (jnp.dot, (struct(8, 32), struct(32, 16))),
    "a convolution": (convolve((2, 2), padding="SAME"), (IMAGE, KERNEL)),
    "a dilated one": (convolve(padding=((2, 1), (0, 3)), rhs_dilation=(2, 1)), (IMAGE, KERNEL)),
    "a transposed one": (convolve(padding=((0, 0), (1, 2)), lhs_dilation=(2, 3)), (IMAGE, KERNEL)),
    "a grouped one": (convolve(groups=4, padding="VALID"), (IMAGE, struct(3, 3, 2, 16))),
}


@pytest.mark.parametrize("case", STRAIGHT)
def test_programs_without_loops_cost_what_xla_says(case):
    """To the last FLOP; XLA's bytes leave nothing out either where there is one step."""
    function, args = STRAIGHT[case]
    program = compiled(function, *args)
    found, xla = count(program.as_text()), program.cost_analysis()
    assert found.flops == xla["flops"]
    # A fusion around a transpose is charged once more by XLA for what it keeps to itself.
    assert found.hbm_bytes == pytest.approx(xla["bytes accessed"], rel=0.01)


def test_of_a_conditional_the_branch_that_computes_most_counts():
    def chosen(k, x):
        return lax.switch(k, [lambda x: x, lambda x: x @ x @ x, lambda x: x @ x], x)

    assert count(text_of(chosen, struct(dtype="int32"), struct(N, N))).flops == 2 * PRODUCT


def test_a_loop_whose_count_depends_on_data_is_named_and_taken_as_one_round():
    def repeat(k, x):
        return lax.fori_loop(0, k, lambda _, x: jnp.tanh(x @ x), x)

    found = count(text_of(repeat, struct(dtype="int32"), struct(N, N)))
    assert found.flops == PRODUCT
    assert found.unknown == ("rounds of a loop whose count depends on data, taken as one",)


def test_what_multiplies_and_is_not_counted_is_named():
    found = count(text_of(lambda x: (jnp.linalg.cholesky(x), jnp.fft.fft(x)), struct(N, N)))
    assert any("potrf" in name for name in found.unknown)
    assert "FLOPs of fft" in found.unknown


# What devices send.


def mesh():
    return jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)


def on_devices(function, out_specs=None):
    where = mesh()
    wrapped = jax.shard_map(
        function, mesh=where, in_specs=P("fsdp"), out_specs=out_specs or P("fsdp"), check_vma=False
    )
    x = jax.ShapeDtypeStruct((32, 16), "float32", sharding=NamedSharding(where, P("fsdp")))
    return text_of(wrapped, x)


RING = [(k, (k + 1) % 4) for k in range(4)]
FSDP, TENSOR = (0, 2, 4, 6), (0, 1)
PART, WHOLE = 8 * 16 * 4, 32 * 16 * 4  # bytes of one device's rows, and of all rows
MOVES = {
    "all-gather": (lambda x: lax.all_gather(x, "fsdp", tiled=True), WHOLE, FSDP, WHOLE * 3 / 4),
    "all-reduce": (lambda x: lax.psum(x, "tensor"), PART, TENSOR, PART),
    "reduce-scatter": (
        lambda x: lax.psum_scatter(x, "fsdp", scatter_dimension=1, tiled=True),
        PART,
        FSDP,
        PART * 3 / 4,
    ),
    "all-to-all": (
        lambda x: lax.all_to_all(x, "fsdp", 1, 0, tiled=True),
        PART,
        FSDP,
        PART * 3 / 4,
    ),
    "collective-permute": (lambda x: lax.ppermute(x, "fsdp", RING), PART, FSDP, PART),
}


@pytest.mark.parametrize("kind", MOVES)
def test_each_kind_of_collective_is_found_with_its_bytes_and_its_group(kind):
    function, size, group, wire = MOVES[kind]
    (found,) = collectives(on_devices(function))
    assert (found.kind, found.bytes, found.group, found.wire_bytes) == (kind, size, group, wire)
    assert (found.times, found.exact, found.group_size) == (1, True, len(group))
    assert "shard_map" in found.op_name


def test_collectives_in_a_loop_count_at_each_round():
    def loop(x):
        return lax.scan(lambda x, _: (lax.psum(x, "fsdp") * 0.1, None), x, None, length=LAYERS)[0]

    (found,) = collectives(on_devices(loop))
    assert (found.times, found.exact) == (LAYERS, True)
    assert table([found]).records() == [
        {
            "kind": "all-reduce",
            "calls": LAYERS,
            "bytes": LAYERS * PART,
            "wire bytes": round(LAYERS * PART * 2 * 3 / 4),
        }
    ]


def test_collectives_in_a_loop_of_unknown_length_are_not_exact():
    def loop(x):
        rounds = x[0, 0].astype(int)
        return lax.fori_loop(0, rounds, lambda _, x: lax.psum(x, "tensor") * 0.1, x)

    (found,) = collectives(on_devices(loop))
    assert (found.times, found.exact) == (1, False)


def test_several_arrays_in_one_collective_are_one_call():
    def both(x):
        return lax.psum((x, x[:2] * 2), "tensor")

    found = collectives(on_devices(both, (P("fsdp"), P("fsdp"))))
    assert sum(each.bytes for each in found) == PART + 2 * 16 * 4
    assert sum(len(each.shapes) for each in found) == 2


SPELLED = {
    "along the last axis": ("{{0,1},{2,3},{4,5},{6,7}}", "[4,2]<=[8]", "{'b'}"),
    "along the first axis": ("{{0,2,4,6},{1,3,5,7}}", "[2,4]<=[4,2]T(1,0)", "{'a'}"),
    "along both": ("{{0,1,2,3,4,5,6,7}}", "[1,8]<=[8]", "{'a','b'}"),
    "along its major half": ("{{0,4},{1,5},{2,6},{3,7}}", "[4,2]<=[2,4]T(1,0)", "{'a':(1)2}"),
    "along its minor half": ("{{0,2},{1,3},{4,6},{5,7}}", "[4,2]<=[2,2,2]T(0,2,1)", "{'a':(2)2}"),
}  # fmt: skip


@pytest.mark.parametrize("case", SPELLED)
def test_the_spellings_of_a_group_agree(case):
    listed, iota, axes = SPELLED[case]
    found = {first_group(text, 8) for text in (listed, iota, f"mesh['a'=4,'b'=2] {axes}")}
    assert len(found) == 1


def test_a_mesh_may_order_its_devices():
    text = "mesh['axis_0'=1,'axis_1'=2,'axis_2'=4], device_ids=([4,2]T(1,0)) {'axis_1'}"
    assert first_group(text, 8) == (0, 1)


def test_a_group_in_an_unknown_spelling_is_refused():
    with pytest.raises(AdapterError, match="spelled in none of the known ways"):
        first_group("groups(0..3)", 8)


# What a TPU writes. The texts are cut down from libtpu 0.0.52's for v5e.

TPU = "{1,0:T(8,128)(2,1)}"
VMEM = "{1,0:T(8,128)(2,1)S(1)}"


def program(*lines, computations=""):
    body = "\n".join(f"  {line}" for line in lines)
    return f"HloModule step, num_partitions=4\n{computations}\nENTRY %main (x: f32[]) -> f32[] {{\n{body}\n}}\n"  # noqa: E501


def computation(name, *lines):
    body = "\n".join(f"  {line}" for line in lines)
    return f"%{name} (p: f32[]) -> f32[] {{\n{body}\n}}\n"


LOOP = computation(
    "body",
    f"%p = (s32[]{{:T(128)}}, bf16[8,256]{VMEM}, s32[]) parameter(0)",
    "%i = s32[]{:T(128)} get-tuple-element(%p), index=0",
    "%copy.5 = s32[]{:T(128)S(6)} copy(%i)",
    "%one = s32[] get-tuple-element(%p), index=2",
    "%next = s32[]{:T(128)} add(%copy.5, %one)",
    f"%h = bf16[8,256]{VMEM} get-tuple-element(%p), index=1",
    f"%all-gather.1 = bf16[16,256]{VMEM} all-gather(%h), replica_groups=mesh['axis_0'=2,'axis_1'=2]"
    " {'axis_0'}, dimensions={0}",
    f"ROOT %out = (s32[]{{:T(128)}}, bf16[8,256]{VMEM}, s32[]) tuple(%next, %h, %one)",
) + computation(
    "test",
    f"%q = (s32[]{{:T(128)}}, bf16[8,256]{VMEM}, s32[]) parameter(0)",
    "%j = s32[]{:T(128)} get-tuple-element(%q), index=0",
    "%n = s32[]{:T(128)} constant(8)",
    "ROOT %less = pred[]{:T(512)} compare(%j, %n), direction=LT",
)


def test_the_rounds_of_a_loop_are_read_off_its_condition():
    """Its step comes in through the tuple, and its counter through a copy to scalar memory."""
    text = program(
        "%zero = s32[]{:T(128)} constant(0)",
        "%one = s32[] constant(1)",
        f"%x = bf16[8,256]{TPU} parameter(0)",
        f"%start = (s32[]{{:T(128)}}, bf16[8,256]{VMEM}, s32[]) tuple(%zero, %x, %one)",
        f"ROOT %loop = (s32[]{{:T(128)}}, bf16[8,256]{VMEM}, s32[]) while(%start),"
        " condition=%test, body=%body",
        computations=LOOP,
    )
    (found,) = collectives(text)
    assert (found.times, found.exact, found.group) == (8, True, (0, 2))
    assert found.bytes == 16 * 256 * 2


def link(name, result, root):
    gather = 'replica_groups={{0,1,2,3}}, dimensions={0}, frontend_attributes={chain_id="0"}'
    return computation(
        name,
        f"%p = bf16[8,256]{VMEM} parameter(0)",
        f"%d = bf16[32,256]{TPU} parameter(1)",
        f"%g = bf16[32,256]{TPU} all-gather(%p), {gather}",
        f"ROOT %r = {result} {root}",
    )


PAIR = f"(bf16[8,256]{VMEM}, bf16[32,256]{TPU})"
CHAIN = program(
    f"%x = bf16[8,256]{VMEM} parameter(0)",
    f"%s = {PAIR} fusion(%x), kind=kCustom, calls=%start",
    f"%sx = bf16[8,256]{VMEM} get-tuple-element(%s), index=0",
    f"%sd = bf16[32,256]{TPU} get-tuple-element(%s), index=1",
    f"%m = {PAIR} fusion(%sx, %sd), kind=kOutput, calls=%middle",
    f"%mx = bf16[8,256]{VMEM} get-tuple-element(%m), index=0",
    f"%md = bf16[32,256]{TPU} get-tuple-element(%m), index=1",
    f"ROOT %e = bf16[32,256]{TPU} fusion(%mx, %md), kind=kCustom, calls=%done",
    computations=link("start", PAIR, 'custom-call(%g), custom_call_target="AsyncCollectiveStart"')
    + link("middle", PAIR, "tuple(%p, %g)")
    + link(
        "done",
        f"bf16[32,256]{TPU}",
        'custom-call(%p, %d, %g), custom_call_target="AsyncCollectiveDone"',
    ),
)


def test_the_links_of_an_asynchronous_chain_are_one_collective():
    size = 32 * 256 * 2
    assert [(each.kind, each.bytes) for each in collectives(CHAIN)] == [("all-gather", size)]


def test_the_links_of_an_asynchronous_chain_write_its_result_once():
    assert count(CHAIN).hbm_bytes == 32 * 256 * 2


def test_a_sum_that_is_sliced_in_its_fusion_is_a_reduce_scatter():
    inside = computation(
        "all-reduce-scatter",
        f"%p = bf16[8,256]{TPU} parameter(0)",
        f"%all-reduce.9 = bf16[8,256]{TPU} all-reduce(%p), replica_groups={{{{0,1}},{{2,3}}}}",
        "%k = u32[] constant(0)",
        f"ROOT %slice = bf16[8,128]{TPU} dynamic-slice(%all-reduce.9, %k, %k),"
        " dynamic_slice_sizes={8,128}",
    )
    text = program(
        f"%x = bf16[8,256]{TPU} parameter(0)",
        f"ROOT %f = bf16[8,128]{TPU} fusion(%x), kind=kCustom, calls=%all-reduce-scatter",
        computations=inside,
    )
    (found,) = collectives(text)
    assert (found.kind, found.bytes, found.wire_bytes) == ("reduce-scatter", 4096, 2048)


STARTED = {
    "a gather": (
        "(f32[4]{0}, f32[16]{0}) all-gather-start(%x), replica_groups=[1,4]<=[4]",
        "all-gather",
        64,
    ),
    "a sum": ("f32[4]{0} all-reduce-start(%x), replica_groups={}", "all-reduce", 16),
    "a permutation": (
        "(f32[4]{0}, f32[4]{0}, u32[], u32[]) collective-permute-start(%x),"
        " source_target_pairs={{0,1},{1,0}}",
        "collective-permute",
        16,
    ),
    "a wrapped sum": (
        "((f32[4]), f32[1], u32[]) async-start(%x), calls=%wrapped",
        "reduce-scatter",
        16,
    ),
    "a send to another slice": (
        "(f32[4], u32[], token[]) send(%x, %t), is_host_transfer=true, frontend_attributes="
        '{_xla_host_transfer_handler_name="xla_megascale_runtime",'
        '_xla_host_transfer_rendezvous="all-reduce.7_0"}',
        "send",
        16,
    ),
}


@pytest.mark.parametrize("case", STARTED)
def test_an_asynchronous_collective_counts_where_it_starts(case):
    line, kind, size = STARTED[case]
    wrapped = computation(
        "wrapped",
        "%p = f32[4]{0} parameter(0)",
        "ROOT %rs = f32[1]{0} reduce-scatter(%p), replica_groups={{0,1,2,3}}, dimensions={0}",
    )
    text = program(
        "%x = f32[4]{0} parameter(0)",
        "%t = token[] after-all()",
        f"%start = {line}",
        "ROOT %done = f32[4]{0} async-done(%start)",
        computations=wrapped,
    )
    assert [(each.kind, each.bytes) for each in collectives(text)] == [(kind, size)]


def test_a_send_to_the_host_is_no_collective():
    text = program(
        "%x = f32[4]{0} parameter(0)",
        "%t = token[] after-all()",
        "ROOT %send.1 = (f32[4], u32[], token[]) send(%x, %t), is_host_transfer=true",
    )
    assert collectives(text) == ()


def test_a_group_of_one_device_sends_nothing():
    text = program(
        "%x = f32[4]{0} parameter(0)",
        "ROOT %r = f32[4]{0} all-reduce(%x), replica_groups={{0},{1},{2},{3}}",
    )
    assert collectives(text) == ()


def test_a_batch_of_products_spelled_as_a_convolution_counts_each_product_once():
    """The batch of 16 is a spatial axis of 16 whose dilated window meets one place at a time."""
    text = program(
        "%x = bf16[16,255,64]{2,1,0} parameter(0)",
        "%w = bf16[16,64,128]{2,1,0} parameter(1)",
        "ROOT %c = bf16[16,255,128]{2,1,0} convolution(%x, %w),"
        " window={size=16 stride=15 pad=0_0 lhs_dilate=16}, dim_labels=0bf_0io->0bf",
    )
    assert count(text).flops == 16 * 2 * 255 * 64 * 128


def test_arrays_in_another_memory_are_no_traffic():
    """[8, 100] of bfloat16 takes whole tiles of 8 x 128 in HBM."""
    text = program(
        f"%x = bf16[8,100]{TPU} parameter(0)",
        f"%s = (bf16[8,100]{VMEM}, bf16[8,100]{TPU}, u32[]{{:S(2)}}) copy-start(%x)",
        f"%d = bf16[8,100]{VMEM} copy-done(%s)",
        f"ROOT %n = bf16[8,100]{VMEM} negate(%d)",
    )
    assert count(text).hbm_bytes == 8 * 128 * 2


def test_an_update_in_place_moves_what_it_updates():
    inside = computation(
        "fused",
        "%p = f32[64,128]{1,0} parameter(0)",
        "%u = f32[1,128]{1,0} parameter(1)",
        "%k = s32[] parameter(2)",
        "ROOT %d = f32[64,128]{1,0} dynamic-update-slice(%p, %u, %k, %k)",
    )
    text = program(
        "%x = f32[64,128]{1,0} parameter(0)",
        "%row = f32[1,128]{1,0} parameter(1)",
        "%k = s32[] parameter(2)",
        "ROOT %f = f32[64,128]{1,0} fusion(%x, %row, %k), kind=kLoop, calls=%fused",
        computations=inside,
    )
    assert count(text).hbm_bytes == 2 * 128 * 4 + 4


def test_padding_belongs_to_the_allocated_bytes_alone():
    (shape,) = read_shapes("bf16[16,255,16]{1,2,0:T(8,128)(2,1)}")
    assert (shape.size, shape.allocated) == (16 * 255 * 16 * 2, 16 * 256 * 16 * 2)


# What cannot be read.


def test_a_text_that_is_no_program_is_refused():
    with pytest.raises(AdapterError, match="begins with 'HloModule', found 'module @jit_f'"):
        parse("module @jit_f")


def test_a_text_that_is_cut_off_is_refused():
    whole = text_of(jnp.dot, struct(4, 4), struct(4, 4))
    with pytest.raises(AdapterError, match="no ENTRY: the text is cut off"):
        parse(whole[: whole.index("ENTRY")])


def test_a_line_that_is_no_instruction_is_refused_with_its_number():
    with pytest.raises(AdapterError, match=r"Line 4 of the HLO, in %main, is no instruction: 'x'"):
        parse(program("x"))


def test_an_array_of_an_unknown_dtype_is_refused():
    with pytest.raises(AdapterError, match="dtype 'posit8', whose size is not known"):
        count(program("ROOT %x = posit8[4]{0} negate(%x)"))


def test_a_collective_in_a_call_of_an_unknown_kind_is_refused():
    text = program(
        "%x = f32[4]{0} parameter(0)",
        "ROOT %c = f32[4]{0} superstep(%x), calls=%inner",
        computations=computation(
            "inner",
            "%p = f32[4]{0} parameter(0)",
            "ROOT %r = f32[4]{0} all-reduce(%p), replica_groups={}",
        ),
    )
    with pytest.raises(AdapterError, match="%r is run by %c, a 'superstep'"):
        collectives(text)
    assert count(text).unknown == ("%c, a superstep, is not followed",)


def test_a_matrix_of_constants_is_read_over_its_lines():
    text = program(
        "%c = f32[2,2]{1,0} constant({",
        "  { 1, 2 },",
        "  { 3, 4 }",
        "})",
        "ROOT %n = f32[2,2]{1,0} negate(%c)",
    )
    assert list(parse(text).computations["main"].instructions) == ["c", "n"]
