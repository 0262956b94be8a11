"""Forms that only XLA:GPU, and a v7x's sparse cores, write a program in; what they cost is worked out by hand."""

import json

import pytest

from deepseek_jax.ops.experts import Tiles
from deepseek_jax.plan.cost_analysis import cost_analysis
from deepseek_jax.plan.hlo import parse
from deepseek_jax.plan.hlo_flops import is_unknown

MESH = {"data": 2, "expert": 4}
HEAD = "HloModule m, is_scheduled=true, num_partitions=8\n\n"


def program(parameters: str, *lines: str, before: str = "") -> str:
    body = "\n".join(f"  {line}" for line in lines)
    return f"{HEAD}{before}ENTRY %main ({parameters}) -> f32[] {{\n{body}\n}}\n"


def gemm(left: list[int], batch: list[int], beta: int) -> str:
    dims = {
        "lhs_contracting_dimensions": [str(n) for n in left],
        "rhs_contracting_dimensions": ["0"],
        "lhs_batch_dimensions": [str(n) for n in batch],
    }
    config = {"gemm_backend_config": {"alpha_real": 1, "beta": beta, "dot_dimension_numbers": dims}}
    return "backend_config=" + json.dumps(config, separators=(",", ":"))


@pytest.mark.parametrize("target", ["__cublas$gemm", "__cublas$lt$matmul", "__cublas$lt$matmul$f8"])
def test_a_product_of_cublas_costs_its_product_and_not_its_scratch(target):
    text = program(
        "a: f32[64,32], b: f32[32,16]",
        "%a = f32[64,32]{1,0} parameter(0)",
        "%b = f32[32,16]{1,0} parameter(1)",
        f'ROOT %p = (f32[64,16]{{1,0}}, s8[33554432]{{0}}) custom-call(%a, %b), custom_call_target="{target}", '
        + gemm([1], [], 0),
    )
    found = cost_analysis(text, MESH)
    assert found.flops == 2 * 64 * 32 * 16 and found.unknown_kernels == ()
    assert found.bytes_accessed == 4 * (64 * 32 + 32 * 16 + 64 * 16)


def test_batches_of_products_that_are_added_to_an_array_read_it_too():
    text = program(
        "a: bf16[8,64,32], b: bf16[8,32,16], c: f32[8,64,16]",
        "%a = bf16[8,64,32]{2,1,0} parameter(0)",
        "%b = bf16[8,32,16]{2,1,0} parameter(1)",
        "%c = f32[8,64,16]{2,1,0} parameter(2)",
        "ROOT %p = (f32[8,64,16]{2,1,0}, s8[4096]{0}) custom-call(%a, %b, %c), "
        'custom_call_target="__cublas$lt$matmul", output_to_operand_aliasing={{0}: (2, {})}, ' + gemm([2], [0], 1),
    )
    found = cost_analysis(text, MESH)
    assert found.flops == 2 * 8 * 64 * 32 * 16
    assert found.bytes_accessed == 2 * 8 * (64 * 32 + 32 * 16) + 2 * 4 * 8 * 64 * 16


IMAGE, KERNEL, OUT = "f32[2,10,10,8]{3,2,1,0}", "f32[4,8,3,3]{3,2,1,0}", "f32[2,8,8,4]{3,2,1,0}"
WINDOW = "window={size=3x3}, dim_labels=b01f_oi01->b01f"


@pytest.mark.parametrize(
    "target, operands, result",
    [
        ("__cudnn$convForward", (IMAGE, KERNEL), OUT),
        ("__cudnn$convBiasActivationForward", (IMAGE, KERNEL), OUT),
        ("__cudnn$convBackwardInput", (OUT, KERNEL), IMAGE),
        ("__cudnn$convBackwardFilter", (IMAGE, OUT), KERNEL),
    ],
)
def test_a_convolution_of_cudnn_and_both_its_gradients_cost_the_same(target, operands, result):
    text = program(
        "a: f32[1], b: f32[1]",
        f"%a = {operands[0]} parameter(0)",
        f"%b = {operands[1]} parameter(1)",
        f'ROOT %p = ({result}, u8[512]{{0}}) custom-call(%a, %b), {WINDOW}, custom_call_target="{target}"',
    )
    assert cost_analysis(text, MESH).flops == 2 * (2 * 8 * 8 * 4) * (8 * 3 * 3)


def test_a_kernel_that_declares_nothing_is_listed():
    call = 'ROOT %p = f32[8]{0} custom-call(%a), custom_call_target="mosaic_gpu_v2", metadata={op_name="jit(f)/mine"}'
    found = cost_analysis(program("a: f32[8]", "%a = f32[8]{0} parameter(0)", call), MESH)
    assert (found.flops, found.unknown_kernels) == (0, ("jit(f)/mine",))
    declared = call + ', backend_config={"custom_call_config":{"cost_estimate":{"flops":"7","bytes_accessed":"64"}}}'
    found = cost_analysis(program("a: f32[8]", "%a = f32[8]{0} parameter(0)", declared), MESH)
    assert (found.flops, found.unknown_kernels) == (7, ())
    sort = parse(program("a: f32[8]", "%a = f32[8]{0} parameter(0)", call.replace("mosaic_gpu_v2", "TopK")))
    assert not is_unknown(sort.entry.root)


def test_fusions_of_triton_within_one_another_count_their_products_once():
    inner = (
        "%inner (x: bf16[64,32], y: bf16[32,16]) -> f32[64,16] {\n"
        "  %x = bf16[64,32]{1,0} parameter(0)\n  %y = bf16[32,16]{1,0} parameter(1)\n"
        "  ROOT %d = f32[64,16]{1,0} dot(%x, %y), lhs_contracting_dims={1}, rhs_contracting_dims={0}\n}\n\n"
    )
    outer = (
        "%outer (x.1: bf16[64,32], y.1: bf16[32,16]) -> f32[64,16] {\n"
        "  %x.1 = bf16[64,32]{1,0} parameter(0)\n  %y.1 = bf16[32,16]{1,0} parameter(1)\n"
        "  ROOT %f = f32[64,16]{1,0} fusion(%x.1, %y.1), kind=kCustom, calls=%inner\n}\n\n"
    )
    text = program(
        "a: bf16[64,32], b: bf16[32,16]",
        "%a = bf16[64,32]{1,0} parameter(0)",
        "%b = bf16[32,16]{1,0} parameter(1)",
        "ROOT %p = f32[64,16]{1,0} fusion(%a, %b), kind=kCustom, calls=%outer, "
        'backend_config={"fusion_backend_config":{"kind":"__triton_nested_gemm_fusion"}}',
        before=inner + outer,
    )
    found = cost_analysis(text, MESH)
    assert found.flops == 2 * 64 * 32 * 16
    assert found.bytes_accessed == 2 * (64 * 32 + 32 * 16) + 4 * 64 * 16


GROUPS = "replica_groups={{0,1,2,3},{4,5,6,7}}"
SIZE = 16 * 256 * 4


@pytest.mark.parametrize(
    "op, result, sent",
    [
        ("all-gather", "f32[64,256]", 3 * SIZE),
        ("all-reduce", "f32[16,256]", 2 * SIZE * 3 // 4),
        ("reduce-scatter", "f32[4,256]", SIZE * 3 // 4),
        ("all-to-all", "f32[16,256]", SIZE * 3 // 4),
    ],
)
def test_collectives_begun_and_ended_count_once(op, result, sent):
    """What goes is read where they begin, what came is written where they end."""
    text = program(
        "a: f32[16,256]",
        "%a = f32[16,256]{1,0} parameter(0)",
        f"%s = (f32[16,256]{{1,0}}, {result}{{1,0}}) {op}-start(%a), channel_id=1, {GROUPS}, dimensions={{0}}",
        f"ROOT %d = {result}{{1,0}} {op}-done(%s)",
    )
    found = cost_analysis(text, MESH)
    assert [(c.op, c.axis, c.bytes, c.count) for c in found.collectives] == [(op, "expert", sent, 1)]
    arrived = parse(text).entry.root.bytes
    assert found.bytes_accessed == SIZE + arrived


def test_a_ragged_exchange_reads_its_rows_and_not_the_buffer_that_they_fill():
    offsets = [f"%o{i} = s64[4]{{0}} parameter({i + 2})" for i in range(4)]
    names = ", ".join(f"%o{i}" for i in range(4))
    text = program(
        "a: f32[16,256]",
        "%a = f32[16,256]{1,0} parameter(0)",
        "%b = f32[20,256]{1,0} parameter(1)",
        *offsets,
        f"%s = ((f32[16,256]{{1,0}}), f32[20,256]{{1,0}}) ragged-all-to-all-start(%a, %b, {names}), {GROUPS}",
        "ROOT %d = f32[20,256]{1,0} ragged-all-to-all-done(%s)",
    )
    found = cost_analysis(text, MESH)
    assert [(c.op, c.axis, c.bytes) for c in found.collectives] == [("ragged-all-to-all", "expert", SIZE * 3 // 4)]
    assert found.bytes_accessed == SIZE + 4 * 4 * 8 + 20 * 256 * 4


def test_what_sparse_cores_do_meanwhile_counts_where_it_begins():
    called = (
        "%called (x: f32[16,256]) -> f32[64,256] {\n  %x = f32[16,256]{1,0} parameter(0)\n"
        f"  ROOT %g = f32[64,256]{{1,0}} all-gather(%x), {GROUPS}, dimensions={{0}}\n}}\n\n"
    )
    text = program(
        "a: f32[16,256]",
        "%a = f32[16,256]{1,0} parameter(0)",
        '%i = s32[]{:S(2)} custom-call(), custom_call_target="PrepareAsyncCallStart"',
        "%s = ((f32[16,256]{1,0}), f32[64,256]{1,0}, u32[]{:S(8)}) call-start(%a), "
        'async_execution_thread="sparsecore", to_apply=%called',
        "ROOT %d = f32[64,256]{1,0} call-done(%s)",
        before=called,
    )
    found = cost_analysis(text, MESH)
    assert [(c.op, c.axis, c.bytes, c.count) for c in found.collectives] == [("all-gather", "expert", 3 * SIZE, 1)]
    assert found.bytes_accessed == SIZE + 4 * SIZE


def test_a_slice_of_an_array_in_another_tiling_reads_the_slice():
    relaid = (
        "%relaid (x: bf16[8,64,32]) -> bf16[8,64,32] {\n  %x = bf16[8,64,32]{2,1,0:T(16,128)(2,1)} parameter(0)\n"
        "  ROOT %c = bf16[8,64,32]{2,1,0:T(8,128)(2,1)} copy(%x)\n}\n\n"
    )
    sliced = (
        "%sliced (y: bf16[8,64,32], i: s32[]) -> bf16[1,64,32] {\n"
        "  %y = bf16[8,64,32]{2,1,0:T(16,128)(2,1)} parameter(0)\n  %i = s32[] parameter(1)\n"
        "  %f = bf16[8,64,32]{2,1,0:T(8,128)(2,1)} fusion(%y), kind=kLoop, calls=%relaid\n  %z = s32[] constant(0)\n"
        "  ROOT %s = bf16[1,64,32]{2,1,0} dynamic-slice(%f, %i, %z, %z), dynamic_slice_sizes={1,64,32}\n}\n\n"
    )
    text = program(
        "a: bf16[8,64,32], n: s32[]",
        "%a = bf16[8,64,32]{2,1,0:T(16,128)(2,1)} parameter(0)",
        "%n = s32[] parameter(1)",
        "ROOT %r = bf16[1,64,32]{2,1,0} fusion(%a, %n), kind=kLoop, calls=%sliced",
        before=relaid + sliced,
    )
    assert cost_analysis(text, MESH).bytes_accessed == 2 * 2 * 64 * 32 + 4


def test_a_slice_that_converts_reads_the_width_of_what_it_slices():
    halved = (
        "%halved (x: f32[4,64,32]) -> (bf16[1,64,32], bf16[1,64,32]) {\n  %x = f32[4,64,32]{2,1,0} parameter(0)\n"
        "  %s = bf16[1,64,32]{2,1,0} slice(%x), slice={[3:4], [0:64], [0:32]}\n"
        "  %t = bf16[1,64,32]{2,1,0} slice(%x), slice={[0:1], [0:64], [0:32]}\n"
        "  ROOT %r = (bf16[1,64,32]{2,1,0}, bf16[1,64,32]{2,1,0}) tuple(%s, %t)\n}\n\n"
    )
    text = program(
        "a: f32[4,64,32]",
        "%a = f32[4,64,32]{2,1,0} parameter(0)",
        "ROOT %f = (bf16[1,64,32]{2,1,0:S(1)}, bf16[1,64,32]{2,1,0:S(1)}) fusion(%a), kind=kLoop, calls=%halved",
        before=halved,
    )
    assert cost_analysis(text, MESH).bytes_accessed == 2 * 4 * 64 * 32


@pytest.mark.parametrize(
    "rows, groups, least, most, block, even",
    [
        (72, 16, 16, 512, 16, 16),  # decoding on a GPU: no group fills a tile, and each needs one
        (8, 16, 16, 512, 16, 8),  # fewer rows than groups
        (36045, 16, 16, 512, 512, 80),  # five tiles for each group's 2253 rows
        (4096, 16, 1, 128, 64, 64),
        (100, 256, 1, 128, 1, 100),
        (0, 4, 1, 128, 1, 0),
    ],
)
def test_an_even_load_makes_so_many_tiles(rows, groups, least, most, block, even):
    assert Tiles.of(rows, groups, least, most) == (block, even)


def test_a_loop_over_tiles_turns_as_often_as_an_even_load_has_it():
    body = (
        "%body (s: (s32[], f32[64,64])) -> (s32[], f32[64,64]) {\n  %s = (s32[], f32[64,64]{1,0}) parameter(0)\n"
        "  %n = s32[] get-tuple-element(%s), index=0\n  %x = f32[64,64]{1,0} get-tuple-element(%s), index=1\n"
        "  %y = f32[64,64]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}\n"
        "  ROOT %t = (s32[], f32[64,64]{1,0}) tuple(%n, %y)\n}\n\n"
    )
    until = (
        "%until (u: (s32[], f32[64,64])) -> pred[] {\n  %u = (s32[], f32[64,64]{1,0}) parameter(0)\n"
        "  %m = s32[] get-tuple-element(%u), index=0\n  ROOT %l = pred[] compare(%m, %m), direction=LT\n}\n\n"
    )
    loop = lambda name: program(
        "a: s32[], b: f32[64,64]",
        "%a = s32[] parameter(0)",
        "%b = f32[64,64]{1,0} parameter(1)",
        "%t0 = (s32[], f32[64,64]{1,0}) tuple(%a, %b)",
        "ROOT %w = (s32[], f32[64,64]{1,0}) while(%t0), condition=%until, body=%body, "
        f'metadata={{op_name="jit(f)/{name}while"}}',
        before=body + until,
    )
    tiled, other = cost_analysis(loop("cond/branch_0_fun/tiles_12/"), MESH), cost_analysis(loop(""), MESH)
    assert (tiled.flops, tiled.unknown_loops) == (12 * 2 * 64**3, ())
    assert (other.flops, other.unknown_loops) == (2 * 64**3, ("jit(f)/while",))
    for scope in ("overflow_rounds", "attention/earlier_blocks"):
        rare = cost_analysis(loop(f"{scope}/"), MESH)
        assert (rare.flops, rare.skipped_loops) == (0, (f"jit(f)/{scope}/while",))


def of_kernel(result: str, operands: str, name: str, sides: str) -> str:
    """A call of jax's splash attention as the TPU compiler prints it, what it says of itself on lines of its own."""
    declared = ", ".join(f'\\"{of}\\": {size}' for of, size in (side.split("=") for side in sides.split()))
    lines = [f"%p{at} = {of} parameter({at})" for at, of in enumerate(operands.split(" "))]
    called = ", ".join(f"%p{at}" for at in range(len(lines)))
    return program(
        ", ".join(f"p{at}: f32[]" for at in range(len(lines))),
        *lines,
        f'ROOT %c = ({result}) custom-call({called}), custom_call_target="tpu_custom_call", '
        f'frontend_attributes={{kernel_metadata={{\n"xprof_metadata":"{{{declared}}}"\n}}}}, '
        f'metadata={{op_name="jit(f)/splash_mha_{name}_no_residuals/pallas_call"}}',
    )


@pytest.mark.parametrize("rows, share", [(4096, 1), (1024, 4)])
def test_the_kernel_of_whole_sequences_costs_the_tiles_that_the_mask_leaves(rows, share):
    """36 of 64 tiles of 512: of as many, keys and values come again; a quarter of each where four share a sequence."""
    tables, keys = "s8[1,8,8]{2,1,0} s8[1,8,8]{2,1,0}", "bf16[2,4096,192]{2,1,0} bf16[2,4096,128]{2,1,0}"
    inputs = f"{tables} bf16[4,{rows},192]{{2,1,0}} {keys}"
    out = f"bf16[4,{rows},128]{{2,1,0}}"
    found = cost_analysis(of_kernel(out, inputs, "fwd", "block_q=512 block_kv=512 block_q_dkv=256"), MESH)
    tiles = 36 / share
    assert found.unknown_kernels == ()
    assert found.flops == 2 * 4 * tiles * 512**2 * (192 + 128)
    assert found.bytes_accessed == 2 * 64 + 2 * 4 * rows * (192 + 128) + 2 * 4 * tiles * 512 * (192 + 128)


@pytest.mark.parametrize("fused", [True, False])
def test_the_kernel_of_the_gradients_reads_queries_for_every_tile(fused):
    """What the fused one leaves of the queries' gradient, a part for each block of keys, is written whole."""
    inputs = (
        "s8[1,8,4]{2,1,0} s8[1,8,4]{2,1,0} bf16[2,4096,192]{2,1,0} bf16[2,4096,192]{2,1,0} bf16[2,4096,128]{2,1,0} "
        "f32[2,8,4096]{2,1,0} bf16[2,4096,128]{2,1,0} f32[2,8,4096]{2,1,0} s32[8,4096]{1,0}"
    )
    scratch = "f32[1024,192]{1,0:S(1)}, f32[1024,128]{1,0:S(1)}, "
    parts = "bf16[4,2,4096,192]{3,2,1,0}, " if fused else ""
    result = scratch + parts + "bf16[2,4096,192]{2,1,0}, bf16[2,4096,128]{2,1,0}"
    found = cost_analysis(of_kernel(result, inputs, "dkv", "block_q=128 block_q_dkv=512 block_kv_dkv=1024"), MESH)
    tiles = 20
    assert found.flops == 2 * 2 * tiles * 512 * 1024 * ((3 if fused else 2) * 192 + 2 * 128)
    again = tiles * 512 * 2 * (2 * (192 + 128) + 2 * 8 * 4)
    once = 2 * 32 + 2 * (2 * 2 * 4096 * (192 + 128)) + 8 * 4096 * 4
    assert found.bytes_accessed == again + once + fused * 4 * 2 * 4096 * 192 * 2


@pytest.mark.parametrize("rows, share", [(4096, 1), (1024, 4)])
def test_a_mask_of_chosen_keys_is_read_by_every_head(rows, share):
    """A third table says which of its tiles comes next; of 4 numbers a pair, 36 of 64 tiles."""
    tables = "s8[1,8,8]{2,1,0} s8[1,8,8]{2,1,0} s8[1,8,8]{2,1,0}"
    keys, mask = "bf16[4,4096,192]{2,1,0} bf16[4,4096,128]{2,1,0}", f"s32[{64 // share},512,512]{{2,1,0}}"
    inputs = f"{tables} bf16[4,{rows},192]{{2,1,0}} {keys} {mask}"
    called = of_kernel(f"bf16[4,{rows},128]{{2,1,0}}", inputs, "fwd", "block_q=512 block_kv=512 block_q_dkv=256")
    found, tiles = cost_analysis(called, MESH), 36 / share
    assert found.flops == 2 * 4 * tiles * 512**2 * (192 + 128)
    of_mask = 4 * tiles * 512**2 * 4
    assert found.bytes_accessed == of_mask + 3 * 64 + 2 * 4 * rows * (192 + 128) + 2 * 4 * tiles * 512 * (192 + 128)


def test_a_choice_that_a_fresh_prompt_lacks_costs_what_it_does_without():
    product = "dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}"
    side = lambda name, root: (
        f"%{name} (x: f32[64,64]) -> f32[64,64] {{\n  %x = f32[64,64]{{1,0}} parameter(0)\n"
        f"  ROOT %r = f32[64,64]{{1,0}} {root}\n}}\n\n"
    )
    choice = lambda scope: program(
        "p: pred[], a: f32[64,64]",
        "%p = pred[] parameter(0)",
        "%a = f32[64,64]{1,0} parameter(1)",
        "ROOT %c = f32[64,64]{1,0} conditional(%p, %a, %a), true_computation=%more, false_computation=%none, "
        f'metadata={{op_name="jit(f)/{scope}/cond"}}',
        before=side("more", product) + side("none", "bitcast(%x)"),
    )
    assert cost_analysis(choice("attention"), MESH).flops == 2 * 64**3
    assert cost_analysis(choice("attention/earlier_blocks"), MESH).flops == 0
