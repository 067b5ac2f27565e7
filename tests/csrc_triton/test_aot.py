"""Machine code of the kernels, compiled without a GPU: no spills, 16-byte accesses, no float atomics, shared memory in
limits.

By default one bf16 specimen (or the nearest there is) of every kernel for sm_90; every specimen for every target is
`slow`.
"""

from collections import Counter

import pytest
import triton
import triton.language as tl

from benchmarks import aot as command
from benchmarks.machine_code import (
    _AMD,
    _NVIDIA,
    COLUMNS,
    TARGETS,
    Compiled,
    check,
    compile_specimen,
    instruction_classes,
    source,
)
from csrc_triton.specimen import Specimen, specimens

SPECIMENS = specimens()


def one_of_each_kernel():
    chosen = {}
    for specimen in sorted(SPECIMENS, key=lambda s: s.dtype != "bf16"):
        chosen.setdefault(specimen.kernel, specimen)
    return list(chosen.values())


def label(specimen):
    return f"{specimen.name}-{specimen.dtype}"


@pytest.mark.long
@pytest.mark.parametrize("specimen", one_of_each_kernel(), ids=label)
def test_machine_code_for_hopper(specimen):
    assert check(specimen, compile_specimen(specimen, "sm_90")) == []


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("specimen", SPECIMENS, ids=label)
def test_machine_code(specimen, target):
    assert check(specimen, compile_specimen(specimen, target)) == []


@triton.jit
def unordered_sum_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.atomic_add(out_ptr, tl.sum(tl.load(x_ptr + i * 3, mask=i < n, other=0.0)))


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_faults_are_found(target):
    """A float atomic and a strided load are seen in real machine code."""
    specimen = Specimen(
        "unordered_sum",
        unordered_sum_kernel,
        "fp32",
        {"x_ptr": "*fp32", "out_ptr": "*fp32", "n": "i32"},
        {"BLOCK": 512},
        vector_store=False,
    )
    faults = check(specimen, compile_specimen(specimen, target))
    assert any("float atomics" in fault for fault in faults)
    assert ("no 16-byte load" in faults) == (target == "sm_90")


def test_spills_and_shared_memory_are_judged():
    specimen = SPECIMENS[0]
    bad = Compiled(specimen.name, specimen.dtype, "sm_89", 255, 12, 100 * 1024, 1, 1, 10, 0, "", (Counter(), Counter()))
    assert check(specimen, bad) == ["12 spill instructions", "102400 bytes of shared memory, 101376 allowed"]


NVIDIA_LOOP = """
.text.sum:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/              @!P0 LDG.E.128 R16, desc[UR8][R22.64] ;
        /*0020*/                   FFMA R86, R47, R17, R10 ;
        /*0030*/               @P1 BRA `(.L_x_1) ;
        /*0040*/                   FFMA R86, R47, R17, R10 ;
        /*0050*/                   EXIT ;
.L_x_2:
        /*0060*/                   BRA `(.L_x_2);
        /*0070*/                   NOP;
"""
AMD_LOOP = """
\ts_load_dword s0, s[4:5], 0x0
.LBB0_1:
\tglobal_load_dwordx4 v[0:3], v4, s[0:1]
\tv_fma_f32 v0, v1, v2, v0
\ts_cbranch_scc1 .LBB0_1
\tv_fma_f32 v0, v1, v2, v0
\ts_endpgm
\t.section .rodata
"""


@pytest.mark.parametrize(
    ("code", "lines", "once", "turn"),
    [
        (NVIDIA_LOOP, _NVIDIA, "MOV FFMA EXIT", "LDG FFMA BRA"),
        (AMD_LOOP, _AMD, "s_load_dword v_fma_f32 s_endpgm", "global_load_dwordx4 v_fma_f32 s_cbranch_scc1"),
    ],
)
def test_instructions_are_counted_apart_for_loops(code, lines, once, turn):
    assert instruction_classes(code, *lines) == (Counter(once.split()), Counter(turn.split()))


def test_the_gradients_of_channels_take_few_instructions():
    """In its loop 17.8 for each element, two of them of the unit for exp and reciprocals: no range is handled apart."""
    specimen = next(s for s in SPECIMENS if s.kernel.__name__ == "channel_gradients_kernel" and s.dtype == "bf16")
    elements = specimen.constexprs["BLOCK_P"] * specimen.constexprs["BLOCK_C"] // (32 * specimen.num_warps)
    compiled = compile_specimen(specimen, "sm_90")
    turn = compiled.classes[1]
    assert turn["MUFU"] == 2 * elements and not turn["FSETP"], turn
    assert 0 < compiled.per_turn == turn.total() < 19 * elements


def test_specimen_must_match_its_kernel():
    with pytest.raises(AssertionError, match="differ in"):
        source(Specimen("unordered_sum", unordered_sum_kernel, "fp32", {"x_ptr": "*fp32"}, {"BLOCK": 512}))


def test_command_writes_the_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        command,
        "compile_specimen",
        lambda s, t: Compiled(s.name, s.dtype, t, 32, 0, 0, 4, 4, 10, 0, "", (Counter(), Counter())),
    )
    for name in ("table.csv", "table.md"):
        assert (
            command.main(
                ["--out", str(tmp_path / name), "--target", "sm_90", "--kernel", "noise_pairs", "--dtype", "bf16"]
            )
            == 0
        )
    assert (tmp_path / "table.csv").read_text().splitlines()[0] == ",".join(COLUMNS)
    assert "| noise_pairs | bf16 | sm_90 | 32 | 0 |" in (tmp_path / "table.md").read_text()
    assert "1 compiled, 0 with faults" in capsys.readouterr().out
