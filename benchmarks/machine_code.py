"""Kernels compiled ahead of time for every supported GPU, without a GPU, and what their machine code says.

`python -m benchmarks.aot` compiles each module's `AOT_SPECIMENS` (csrc_triton/specimen.py) and tabulates registers,
spills, shared memory and vector accesses per kernel and target. Spills are read from the machine code: on NVIDIA the
local-memory loads and stores (LDL, STL) in the disassembly of the cubin, on AMD the spill counts in the metadata of the
code object. Instructions are counted too, apart for loops: what a thread executes is `instructions` once and `per_turn`
for each turn, where a kernel has one loop.
"""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field, fields
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from csrc_triton.runtime import PINNED
from csrc_triton.specimen import Specimen

# name -> (target, shared memory in bytes that one program may use)
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * 1024),
    "sm_89": (GPUTarget("cuda", 89, 32), 99 * 1024),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * 1024),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 * 1024),
    "sm_120": (GPUTarget("cuda", 120, 32), 99 * 1024),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * 1024),
}


def source(specimen: Specimen) -> ASTSource:
    """What the compiler is given. AssertionError where the specimen does not list the kernel's arguments exactly."""
    arguments = specimen.kernel.arg_names
    listed = set(specimen.signature) | set(specimen.constexprs)
    assert set(arguments) == listed, f"{specimen.name}: specimen and kernel differ in {set(arguments) ^ listed}"
    aligned = [name for name, kind in specimen.signature.items() if kind.startswith("*") or name in specimen.aligned]
    return ASTSource(
        fn=specimen.kernel,
        signature={name: specimen.signature.get(name, "constexpr") for name in arguments},
        constexprs=dict(specimen.constexprs),
        attrs={(arguments.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )


@dataclass(frozen=True)
class Compiled:
    """What the machine code of one specimen on one target says. Bytes and registers are per program and per thread."""

    kernel: str
    dtype: str
    target: str
    registers: int
    spills: int
    shared: int
    vector_loads: int
    vector_stores: int
    instructions: int  # per thread, outside loops
    per_turn: int  # per thread, one turn of every loop
    assembly: str = field(repr=False)  # PTX or AMD assembly
    classes: tuple[Counter[str], Counter[str]] = field(repr=False)  # both counts by operation, modifiers left out

    @property
    def float_atomics(self) -> list[str]:
        """Instructions that would make a reduction depend on the order of programs."""
        return re.findall(
            r"(?:atom|red)\.[\w.:]*add[\w.:]*\.(?:f16|f32|f64|bf16)\w*|\w*atomic_(?:pk_)?add_(?:f|bf)\w+", self.assembly
        )


COLUMNS = [column.name for column in fields(Compiled) if column.repr]

# Lines of a disassembly: (label), or (operation, operands)
_NVIDIA = (r"^(\.L\w+):", r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)(.*)")
_AMD = (r"^(\.LBB\w+):", r"^\t((?:[sv]|ds|global|buffer|flat)_\w+)(.*)")
_LAST = {"EXIT", "s_endpgm"}


def instruction_classes(code: str, label: str, instruction: str) -> tuple[Counter[str], Counter[str]]:
    """(outside loops, inside them) of a disassembly up to its last exit: how often each operation stands there.

    label, instruction: what lines look like, `_NVIDIA` or `_AMD`. A loop is what lies between a label and a later jump
    to it.
    """
    operations: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for line in code.splitlines():
        if found := re.match(label, line):
            labels[found[1]] = len(operations)
        elif found := re.match(instruction, line):
            operations.append((found[1], found[2]))
    end = 1 + max((i for i, (name, _) in enumerate(operations) if name in _LAST), default=-1)
    looped: set[int] = set()
    for i, (_, operands) in enumerate(operations[:end]):
        target = re.search(r"\.L\w+", operands)
        if target and labels.get(target[0], end) <= i:
            looped.update(range(labels[target[0]], i + 1))
    outside, inside = Counter[str](), Counter[str]()
    for i, (name, _) in enumerate(operations[:end]):
        (inside if i in looped else outside)[name] += 1
    return outside, inside


def _nvidia_tool(name: str) -> Path:
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def _nvidia_machine_code(cubin: bytes) -> tuple[tuple[int, int, int, int], str]:
    """(registers, local-memory instructions, 16-byte loads, 16-byte stores) of a cubin, and its disassembly."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = subprocess.run(
            [_nvidia_tool("cuobjdump"), "--dump-resource-usage", path], capture_output=True, text=True, check=True
        ).stdout
        sass = subprocess.run([_nvidia_tool("nvdisasm"), "-c", path], capture_output=True, text=True, check=True).stdout
    registers = max(int(n) for n in re.findall(r"\bREG:(\d+)", usage))
    spills = len(re.findall(r"\b(?:LDL|STL)\b", sass))
    loads, stores = (len(re.findall(rf"\b{name}\S*\.128\b", sass)) for name in ("LDG", "STG"))
    return (registers, spills, loads, stores), sass


def _amd_machine_code(assembly: str) -> tuple[int, int, int, int]:
    """(vector registers, spilled registers, 16-byte loads, 16-byte stores) of AMD assembly."""

    def count(key: str) -> int:
        return sum(int(n) for n in re.findall(rf"\.{key}:\s*(\d+)", assembly))

    loads = re.findall(r"\b(?:global|buffer)_load_dwordx4\b", assembly)
    stores = re.findall(r"\b(?:global|buffer)_store_dwordx4\b", assembly)
    return count("vgpr_count"), count("vgpr_spill_count") + count("sgpr_spill_count"), len(loads), len(stores)


def compile_specimen(specimen: Specimen, target: str) -> Compiled:
    """Compile for `target` (a name in TARGETS); raises what the compiler raises."""
    gpu, _ = TARGETS[target]
    options = {"num_warps": specimen.num_warps, **PINNED}
    if specimen.maxnreg and gpu.backend == "cuda":
        options["maxnreg"] = specimen.maxnreg
    kernel = triton.compile(source(specimen), target=gpu, options=options)
    if gpu.backend == "cuda":
        assembly = kernel.asm["ptx"]
        (registers, spills, loads, stores), sass = _nvidia_machine_code(kernel.asm["cubin"])
        classes = instruction_classes(sass, *_NVIDIA)
    else:
        assembly = kernel.asm["amdgcn"]
        registers, spills, loads, stores = _amd_machine_code(assembly)
        classes = instruction_classes(assembly, *_AMD)
    once, turn = (count.total() for count in classes)
    return Compiled(
        specimen.name, specimen.dtype, target, registers, spills, kernel.metadata.shared, loads, stores, once, turn,
        assembly, classes,
    )  # fmt: skip


def check(specimen: Specimen, compiled: Compiled) -> list[str]:
    """What is wrong with the machine code; empty when it is as it should be."""
    nvidia = TARGETS[compiled.target][0].backend == "cuda"
    faults = []
    if nvidia and compiled.spills:
        faults.append(f"{compiled.spills} spill instructions")
    if compiled.shared > TARGETS[compiled.target][1]:
        faults.append(f"{compiled.shared} bytes of shared memory, {TARGETS[compiled.target][1]} allowed")
    if compiled.float_atomics:
        faults.append(f"float atomics {sorted(set(compiled.float_atomics))}")
    if nvidia and specimen.vector_load and not compiled.vector_loads:
        faults.append("no 16-byte load")
    if nvidia and specimen.vector_store and not compiled.vector_stores:
        faults.append("no 16-byte store")
    return faults
