"""adopt: what GPTQ and AWQ left, packed without a change, against integers; and what it costs where that cannot be."""

import json
import re
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from hikui.lowering.app.lower import lower as lower_model
from hikui.lowering.app.runners import open_runner
from hikui.lowering.artefact import verify as verify_artefact
from hikui.lowering.checkpoint.folder import Checkpoint
from hikui.lowering.checkpoint.gguf_tensor import GgufTensor
from hikui.lowering.errors import HikuiError, UsageError
from hikui.lowering.formats import Format, unpack, unpack_codes
from hikui.lowering.huggingface.gguf_file import read_gguf
from hikui.lowering.ir.program import FORMAT, GROUP, SITE, Program
from hikui.lowering.ir.sizes import measure
from hikui.lowering.pipeline.contract import PassContext
from hikui.lowering.trace import trace
from hikui.passes import Adopt
from hikui.passes.graph import aten, float_sites, hikui, is_weight, sites
from hikui.passes.quantise.rounding import dequantise, round_matrix
from tests.lowering.checkpoint.gguf_files import write_gguf
from tests.lowering.checkpoint.quantised_folders import (
    Grid,
    awq,
    awq_config,
    gptq,
    gptq_config,
    random_grid,
    write_matrices,
    write_model,
)
from tests.passes.helpers import (
    SMALL_VOCABULARY,
    assert_same,
    assert_settled,
    calibration,
    calls,
    check,
    lower,
    order_of,
    program_of,
    random,
    run,
)

Q, K, V = (f"model.layers.0.self_attn.{name}_proj" for name in "qkv")


@pytest.fixture(scope="module")
def ordered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of symmetric 4 bits with act-order."""
    folder = tmp_path_factory.mktemp("ordered")
    write_model(folder, act_order=True)
    return folder


@pytest.fixture(scope="module")
def traced(ordered: Path) -> Program:
    return lower(trace(ordered), "canonicalise")


def one_site(folder: Path, grid: Grid, method: str = "gptq") -> Program:
    """A program with one site, whose matrix comes from a checkpoint."""
    n, k = grid.fields.shape

    def body(x: Tensor, a__weight: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, a__weight)

    program = program_of(body, embedding=random(SMALL_VOCABULARY, k), a__weight=torch.zeros(n, k))
    config = gptq_config(grid.bits, sym=False, checkpoint_format="gptq_v2") if method == "gptq" else awq_config()
    config["group_size"] = k // grid.zeros.shape[1] if k % grid.zeros.shape[1] == 0 else 64
    parts = gptq(grid, stored_less=0) if method == "gptq" else awq(grid)
    program.store.alias("a.weight", Checkpoint.open(write_matrices(folder, config, {"a": parts})).tensors["a.weight"])
    return lower(program, "canonicalise")


def adopted(program: Program, **options: object) -> tuple[Program, list[str]]:
    result = Adopt(**options).run(program, PassContext())  # type: ignore[arg-type]
    assert result.modified
    return result.program, result.notes


def held(program: Program) -> tuple[Format, Tensor, Tensor]:
    """Format, codes in the order of the checkpoint's columns, and dequantised matrix of the only site."""
    (node,) = sites(program)
    fmt, order = Format.parse(str(node.args[4])), order_of(program, node)
    weight, scale = (program.store.load(program.weight_of(at)) for at in node.args[1:3] if is_weight(at))
    n, k = int(node.args[5]), int(node.args[0].meta["val"].shape[-1])  # type: ignore[arg-type, union-attr]
    codes, dense = unpack_codes(fmt, weight, n, k), unpack(fmt, weight, scale, n, k)
    if order is None:
        return fmt, codes, dense
    back = torch.argsort(order)
    return fmt, codes[:, back], dense[:, back]


def limited(grid: Grid, low: int, high: int, zero: int) -> Grid:
    """The grid with codes from `low` to `high` alone, around one zero."""
    codes = grid.fields % (high - low + 1) + low
    return replace(grid, fields=codes + zero, zeros=np.full_like(grid.zeros, zero))


# ── the program ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_text(traced: Program) -> None:
    check(
        lower(traced, "adopt{sites=self_attn},dead_code"),
        """
        // CHECK: %w_model_layers_0_self_attn_q_proj_weight_int4_g32 = weight
        // CHECK-SAME: "model.layers.0.self_attn.q_proj.weight.int4-g32" : u8[4, 8, 16, 4]
        // CHECK: %[[X:.*]] = aten.index_select(%{{.*}}, -1, %[[ORDER:w_.*order]]) : f32[1, T, 64]
        // CHECK-NEXT: hikui.linear(%[[X]], %w_model_layers_0_self_attn_q_proj_weight_int4_g32,
        // CHECK-SAME: "int4-g32", 64) : f32[1, T, 64]
        // CHECK: hikui.linear(%[[X]], %w_model_layers_0_self_attn_k_proj_weight_int4_g32,
        // CHECK: hikui.linear(%[[X]], %w_model_layers_0_self_attn_v_proj_weight_int4_g32,
        """,
    )


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_the_logits_are_those_of_the_floats(method: str, ordered: Path, tmp_path: Path) -> None:
    if method == "awq":
        write_model(tmp_path, method="awq", symmetric=False)
    program = lower(trace(ordered if method == "gptq" else tmp_path), "canonicalise")
    out = lower(program, "adopt")
    assert {node.meta[SITE] for node in float_sites(out)} == {"lm_head"}
    assert {node.meta[FORMAT] for node in sites(out) if FORMAT in node.meta} == (
        {"int4-g32"} if method == "gptq" else {"int8-g32"}
    )
    assert_same(program, out)
    assert_settled(Adopt(), out)


def test_sites_that_share_an_order_share_a_gather(traced: Program) -> None:
    out = lower(traced, "adopt,dead_code")
    groups = {node.meta[GROUP] for node in sites(out) if node.meta[SITE] != "lm_head"}
    assert len(calls(out, aten.index_select.default)) == len(groups) == 4
    sizes = {site.name: site for site in measure(out).sites}
    # The order counts at the first of the three that read it.
    packed = Format("int4", 32)
    assert sizes[Q].nbytes == packed.nbytes(64, 64) + 64 * 4
    assert sizes[K].nbytes == sizes[V].nbytes == packed.nbytes(32, 64)


def test_sites_with_orders_of_their_own_have_gathers_of_their_own(tmp_path: Path) -> None:
    other = random_grid(32, 64, act_order=True, seed=77)
    write_model(tmp_path, act_order=True, grids={K: other})
    program = lower(trace(tmp_path), "canonicalise")
    out = lower(program, "adopt")
    read = {node.meta[SITE]: node.args[0] for node in sites(out)}
    assert read[Q] is read[V]
    assert read[K] is not read[Q]
    assert_same(program, out)


def test_matrices_that_the_module_keeps_transposed_are_adopted_too(tmp_path: Path) -> None:
    write_model(tmp_path, family="gpt2")
    program = lower(trace(tmp_path), "canonicalise")
    out = lower(program, "adopt")
    assert len(calls(out, hikui.linear.default)) == 4
    assert_same(program, out)


def test_a_branch_finds_nothing_left_to_take_up(traced: Program) -> None:
    """It compares with the matrix that the site came from, in the order of its columns."""
    out = lower(traced, f"calibrate,adopt,sub_branch{{rank=2,sites={Q}}}", calibration(traced))
    branch = out.store.load(f"{Q}.branch.b") @ out.store.load(f"{Q}.branch.a")
    assert branch.shape == (64, 64)
    assert not bool(branch.any())


@pytest.mark.parametrize("backend", ["tvm", "onnxruntime"])
def test_a_folder_is_lowered_to_an_artefact_that_verifies(backend: str, ordered: Path, tmp_path: Path) -> None:
    artefact = lower_model(ordered, tmp_path / "out", recipe="adopt", backend=backend)
    assert verify_artefact.check_numbers(artefact, lambda: open_runner(artefact)).passed
    report = json.loads((artefact.directory / "report.json").read_text())
    assert len(report["sites"]) == 8
    for site in report["sites"]:
        assert (site["weight_error"] == 0) == (site["name"] != "lm_head")


# ── which format ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(
    ("bits", "low", "high", "zero", "kind"),
    [
        (4, -8, 7, 8, "int4"),
        (4, -7, 8, 7, "int4"),
        (4, -5, 10, 5, "int8"),
        (4, 0, 15, 0, "int8"),
        (4, -1, 1, 8, "ternary"),
        (3, -4, 3, 4, "int3"),
        (2, -2, 1, 2, "int2"),
        (2, -1, 1, 2, "ternary"),
        (2, -1, 2, 1, "int2"),
        (3, -3, 4, 3, "int3"),
        (4, -2, 2, 8, "int3"),
        (8, -127, 127, 128, "int8"),
        (8, -8, 7, 128, "int4"),
    ],
)
def test_the_smallest_kind_that_holds_every_code(
    tmp_path: Path, bits: int, low: int, high: int, zero: int, kind: str, act_order: bool
) -> None:
    grid = limited(random_grid(32, 96, bits=bits, act_order=act_order, seed=bits), low, high, zero)
    assert {low, high} <= set((grid.fields - zero).flatten().tolist())
    out, notes = adopted(one_site(tmp_path, grid))
    fmt, codes, dense = held(out)
    assert str(fmt) == f"{kind}-g32"
    assert torch.equal(dense, grid.matrix())
    assert codes.abs().tolist() == np.abs(grid.fields - zero).tolist()
    assert notes[0] == f"a: {kind}-g32, as gptq left it in {bits} bits"
    assert ("a: its columns stand in the order of g_idx" in notes) == act_order


@pytest.mark.parametrize(("odd", "kind"), [((-1, 1), "sign"), ((-3, -1, 1, 3), "int3"), ((-7, -1, 3, 5), "int4")])
def test_odd_codes_alone(tmp_path: Path, odd: tuple[int, ...], kind: str) -> None:
    grid = random_grid(32, 80)
    grid = replace(grid, fields=8 + np.array(odd)[grid.fields % len(odd)])
    fmt, codes, dense = held(adopted(one_site(tmp_path, grid))[0])
    assert str(fmt) == f"{kind}-g32"
    assert torch.equal(dense, grid.matrix())
    assert codes.tolist() == (grid.fields - 8).tolist()


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_asymmetric_zeros_take_int8(tmp_path: Path, method: str) -> None:
    grid = random_grid(32, 96, symmetric=False)
    fmt, codes, dense = held(adopted(one_site(tmp_path, grid, method))[0])
    assert str(fmt) == "int8-g32"
    assert torch.equal(dense, grid.matrix())
    assert codes.tolist() == (grid.fields - np.repeat(grid.zeros, 32, axis=1)).tolist()


def test_groups_turn_one_by_one(tmp_path: Path) -> None:
    """Zeros of 7 and 8 side by side: a group whose codes reach 8 gets a scale below zero."""
    grid = random_grid(16, 64)
    zeros = np.random.default_rng(1).integers(7, 9, grid.zeros.shape)
    fmt, _, dense = held(adopted(one_site(tmp_path, replace(grid, zeros=zeros)))[0])
    assert str(fmt) == "int4-g32"
    assert torch.equal(dense, replace(grid, zeros=zeros).matrix())


@pytest.mark.parametrize(
    ("k", "group", "name"),
    [
        (96, 32, "int4-g32"),
        (96, 64, "int4-g32"),
        (320, 128, "int4-g64"),
        (384, 128, "int4-g128"),
        (512, 256, "int4-g256"),
        (1024, 512, "int4-g256"),
        (192, 96, "int4-g96"),
        (320, -1, "int4-channel"),
        (64, 128, "int4-channel"),
    ],
)
@pytest.mark.parametrize("act_order", [False, True])
def test_groups(tmp_path: Path, k: int, group: int, name: str, act_order: bool) -> None:
    grid = random_grid(16, k, group=group, act_order=act_order)
    fmt, _, dense = held(adopted(one_site(tmp_path, grid))[0])
    assert str(fmt) == name
    assert torch.equal(dense, grid.matrix())


def test_parts_of_rows_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = random_grid(72, 96, act_order=True, seed=4)
    program = one_site(tmp_path, grid)
    whole = held(adopted(program)[0])
    monkeypatch.setattr("hikui.passes.matrices.PART", 96 * 32)
    parts = held(adopted(program)[0])
    assert parts[0] == whole[0]
    assert torch.equal(parts[1], whole[1])
    assert torch.equal(parts[2], whole[2])


def test_the_program_computes_with_the_matrix(tmp_path: Path) -> None:
    grid = random_grid(24, 96, act_order=True)
    out, _ = adopted(one_site(tmp_path, grid))
    tokens = torch.arange(6)[None]
    want = random(SMALL_VOCABULARY, 96)[tokens].double() @ grid.matrix().double().t()
    got, _ = run(out, tokens, decode=2)
    assert float((got.double() - want).abs().max()) <= 1e-5 * float(want.abs().max())


# ── what cannot be held ─────────────────────────────────────────────────────────────────────────────────────────────


def test_codes_of_128_below_zero_become_127(tmp_path: Path) -> None:
    grid = limited(random_grid(16, 64, bits=8), -128, 127, 128)
    codes = grid.fields - 128
    lowest = int((codes == -128).sum())
    assert lowest
    program = one_site(tmp_path, grid)
    out, notes = adopted(program)
    fmt, got, dense = held(out)
    assert str(fmt) == "int8-g32"
    assert got.tolist() == np.maximum(codes, -127).tolist()
    want = grid.matrix().double()
    error = float((dense.double() - want).norm() / want.norm())
    assert f"a: {lowest} of 1024 codes were -128 and are -127 now, relative error {error:.3g}" in notes
    with pytest.raises(
        HikuiError, match=rf"Site a .*: {lowest} of its codes are -128, which int8 does not hold; .*lossy"
    ):
        adopted(program, saturate=False)


def test_lossy_rounds_what_would_take_more_bits_and_says_by_how_much(tmp_path: Path) -> None:
    grid = random_grid(16, 96, symmetric=False, act_order=True)
    out, notes = adopted(one_site(tmp_path, grid), lossy="int4-g64")
    fmt, _, dense = held(out)
    assert fmt == Format("int4", 64)
    want = grid.matrix()
    assert torch.equal(dense, dequantise(round_matrix(want, fmt), fmt))
    error = float((dense - want).double().norm() / want.double().norm())
    assert notes[0] == f"a: rounded to int4-g64, because its codes take int8; relative error {error:.3g}"
    assert error > 0.01
    assert not calls(out, aten.index_select.default)


def test_lossy_leaves_what_fits_as_it_is(tmp_path: Path) -> None:
    grid = random_grid(16, 96)
    fmt, _, dense = held(adopted(one_site(tmp_path, grid), lossy="int4-g64")[0])
    assert fmt == Format("int4", 32)
    assert torch.equal(dense, grid.matrix())


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        (random_grid(16, 64, group=16), "it has a group of 16 columns, and ours are multiples of 32"),
        (limited(random_grid(16, 64, bits=8), 0, 255, 0), "its codes reach from 0 to 255, beyond int8"),
        (replace(random_grid(16, 64), scale=torch.full((16, 2), 1 / 3)), "float16 does not hold its scales"),
    ],
)
def test_what_no_format_holds_is_refused_or_rounded(tmp_path: Path, grid: Grid, words: str) -> None:
    program = one_site(tmp_path, grid)
    with pytest.raises(HikuiError, match=f"Site a cannot be adopted as it is: {re.escape(words)}"):
        adopted(program)
    out, notes = adopted(program, lossy="int8-g32")
    fmt, _, dense = held(out)
    assert fmt == Format("int8", 32)
    assert words in notes[0]
    want = grid.matrix()
    assert float((dense - want).norm()) <= 0.01 * float(want.norm())
    exact, notes = adopted(program, lossy="float32")
    (node,) = sites(exact)
    assert node.args[4] == "float32"
    assert notes[0].endswith("relative error 0")


def test_half_precision_that_overflows_is_refused(tmp_path: Path) -> None:
    grid = replace(random_grid(16, 64), scale=torch.full((16, 2), 1e5))
    with pytest.raises(HikuiError, match="beyond float16; take lossy=float32"):
        adopted(one_site(tmp_path, grid), lossy="float16")
    with pytest.raises(HikuiError, match="beyond float16; leave it out"):
        adopted(one_site(tmp_path, replace(grid, scale=grid.scale * 1e5)), lossy="int4-g32")


# ── which sites ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_sites_can_be_chosen_left_out_and_given_to_rtn(traced: Program) -> None:
    some = lower(traced, r"adopt{sites=layers\.0\.,skip=mlp}")
    assert {node.meta[SITE].split(".")[3] for node in calls(some, hikui.linear.default)} == {"self_attn"}
    given = lower(traced, "override{sites=q_proj,format=int8-g64},adopt,rtn{bits=8,group=32}")
    formats = {node.meta[SITE]: node.args[4] for node in sites(given)}
    assert formats[Q] == "int8-g64"
    assert formats[K] == "int4-g32"
    assert formats["lm_head"] == "int8-g32"


def test_a_float_model_has_nothing_to_adopt() -> None:
    program = lower(
        program_of(torch.nn.functional.linear, embedding=random(SMALL_VOCABULARY, 32), weight=random(16, 32)),
        "canonicalise",
    )
    with pytest.raises(HikuiError, match="No site comes from a GPTQ or AWQ checkpoint"):
        lower(program, "adopt")


def test_what_is_wrong_with_the_request(traced: Program) -> None:
    with pytest.raises(UsageError, match="adopt cannot round to mixed-g32-c32"):
        Adopt(lossy="mixed-g32-c32")
    with pytest.raises(UsageError, match="int5"):
        Adopt(lossy="int5-g32")
    program = traced.clone()
    for node in sites(program):
        del node.meta[SITE]
    with pytest.raises(HikuiError, match="run `canonicalise` first"):
        Adopt().requires(program)


# ── GGUF ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("kind", "fmt"), [(Kind.Q4_0, "int4-g32"), (Kind.Q8_0, "int8-g32")])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_codes_of_a_gguf_are_taken_as_they_are(architecture: str, kind: Kind, fmt: str, tmp_path: Path) -> None:
    """Also where llama.cpp has changed the order of the rows, as of q and k of a Llama."""
    path = tmp_path / "m.gguf"
    model = write_gguf(path, architecture, kind)
    program = lower(trace(path), "canonicalise")
    out = lower(program, "adopt")
    assert not float_sites(out)
    assert {str(node.meta[FORMAT]) for node in sites(out)} == {fmt}
    file = read_gguf(path)
    for node in sites(out):
        weight, scale = (out.store.load(out.weight_of(at)) for at in node.args[1:3] if is_weight(at))
        want = model.get_parameter(f"{node.meta[SITE]}.weight")
        assert torch.equal(unpack(Format.parse(fmt), weight, scale, *want.shape), want)
    q = next(node for node in sites(out) if node.meta[SITE] == Q)
    entry = file.tensors["blk.0.attn_q.weight"]
    blocks = np.fromfile(path, np.uint8, entry.nbytes, offset=entry.offset).reshape(64, 2, -1)
    scale = out.store.load(out.weight_of(q.args[2]))  # type: ignore[arg-type]
    stored = blocks[..., :2].copy().view(np.float16)[..., 0]
    # float16 [blocks of 16 rows, groups, 16 rows]
    got = scale.permute(0, 2, 1).reshape(-1, 2)[:64].numpy()
    first = 2 if architecture == "llama" else 1  # the second row of a head is the third of the file
    assert np.array_equal(got[1], stored[first])
    assert_same(program, out)
    assert_settled(Adopt(), out)


def gguf_site(folder: Path, kind: Kind, codes: np.ndarray, scales: np.ndarray) -> Program:
    """A program with one site, a matrix of a GGUF: codes [n, k], scales float16 [n, k/32]."""
    n, k = codes.shape
    blocks = codes.reshape(n, k // 32, 32)
    if kind == Kind.Q4_0:
        fields = (blocks + 8).astype(np.uint8)
        packed = fields[..., :16] | fields[..., 16:] << 4
    else:
        packed = blocks.astype(np.int8).view(np.uint8)
    data = np.concatenate([scales.astype(np.float16)[..., None].view(np.uint8), packed], axis=-1).reshape(n, -1)
    writer = gguf.GGUFWriter(folder / "m.gguf", "llama")
    writer.add_tensor("a.weight", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = read_gguf(folder / "m.gguf")

    def body(x: Tensor, a__weight: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, a__weight)

    program = program_of(body, embedding=random(SMALL_VOCABULARY, k), a__weight=torch.zeros(n, k))
    program.store.alias("a.weight", GgufTensor.of(file.path, "a.weight", file.tensors["a.weight"]))
    return lower(program, "canonicalise")


@pytest.mark.parametrize(("kind", "low", "high"), [(Kind.Q4_0, -8, 7), (Kind.Q8_0, -127, 127)])
def test_every_code_of_a_gguf_and_scales_below_zero(kind: Kind, low: int, high: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    codes = np.resize(np.arange(low, high + 1), (20, 96))
    scales = rng.normal(size=(20, 3)).astype(np.float16)
    out, notes = adopted(gguf_site(tmp_path, kind, codes, scales))
    fmt, got, dense = held(out)
    assert str(fmt) == ("int4-g32" if kind == Kind.Q4_0 else "int8-g32")
    assert got.tolist() == codes.tolist()
    assert dense.double().tolist() == (scales.astype(np.float64).repeat(32, axis=1) * codes).tolist()
    assert notes[0] == f"a: {fmt}, as {kind.name} of the GGUF left it"


def test_a_code_that_int8_does_not_hold_leaves_the_matrix_as_floats(tmp_path: Path) -> None:
    codes = np.resize(np.arange(-128, 128), (16, 64))
    program = gguf_site(tmp_path, Kind.Q8_0, codes, np.ones((16, 2)))
    out, notes = adopted(program)
    assert notes == ["a: floats from Q8_0 of the GGUF, because 4 of its codes are -128, which int8 does not hold"]
    assert [node.meta[SITE] for node in float_sites(out)] == ["a"]
    assert_same(program, out)
    Adopt().ensures(out)
    rounded, notes = adopted(program, lossy="int8-g32")
    assert notes[0].startswith("a: rounded to int8-g32, because 4 of its codes are -128")
    assert not float_sites(rounded)


def test_other_types_of_a_gguf_become_floats_and_that_is_said(tmp_path: Path) -> None:
    kinds = {"blk.1.ffn_up.weight": Kind.Q8_0, "output.weight": Kind.F16}
    write_gguf(tmp_path / "m.gguf", kind=Kind.Q5_1, kinds=kinds)
    out, notes = adopted(lower(trace(tmp_path / "m.gguf"), "canonicalise"))
    assert len(float_sites(out)) == 14
    assert f"{Q}: floats from Q5_1 of the GGUF, whose codes no format here has" in notes
    assert "model.layers.1.mlp.up_proj: int8-g32, as Q8_0 of the GGUF left it" in notes
    assert not any(note.startswith("lm_head") for note in notes)


def test_a_gguf_without_codes_of_ours(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", kind=Kind.Q4_1)
    with pytest.raises(
        HikuiError, match="All sites of the GGUF are stored as Q4_1, of which there is nothing to adopt"
    ):
        lower(trace(tmp_path / "m.gguf"), "canonicalise,adopt")


def test_a_gguf_is_lowered_to_an_artefact_that_verifies(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", kind=Kind.Q4_0, kinds={"output.weight": Kind.Q5_0})
    artefact = lower_model(tmp_path / "m.gguf", tmp_path / "out", recipe="adopt", backend="onnxruntime")
    assert verify_artefact.check_numbers(artefact, lambda: open_runner(artefact)).passed
    report = json.loads((artefact.directory / "report.json").read_text())
    for site in report["sites"]:
        assert (site["weight_error"] == 0) == (site["name"] != "lm_head")
    assert "floats from Q5_0 of the GGUF" in json.dumps(report)
    provenance = artefact.manifest.provenance
    assert provenance.stored == {"F32": 5, "Q4_0": 15, "Q5_0": 1}
    assert list(provenance.checkpoint) == ["m.gguf"]
    assert (artefact.directory / "tokenizer" / "chat_template.jinja").is_file()
