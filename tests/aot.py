"""Compiles for a GPU that is not there, and reads what came out.

Needs the CUDA wheels but no GPU and no driver (a compile-only PJRT
topology): jax-cuda13-plugin, jax-cuda13-pjrt, nvidia-cuda-nvcc, nvidia-nvvm, and
nvidia-cuda-cuobjdump for the disassembly. JAX_PLATFORMS must be cpu.
"""

import contextlib
import ctypes
import dataclasses
import importlib.util
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
from jax._src.interpreters import mlir
from jax._src.lib import mosaic_gpu_dialect
from jax.sharding import NamedSharding, PartitionSpec
from jaxlib.mlir import ir

from qlora_jax.train.compiled import TARGETS, absent_gpu


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A compiled kernel; `shared` are the bytes of shared memory that a launch asks for."""

    name: str
    registers: int
    stack: int
    spills: int
    shared: int
    warnings: list[str]
    sass: str

    def instructions(self) -> list[str]:
        """Mnemonics with their modifiers, in order."""
        return [_split(text)[0] for _, text in self._code()]

    def count(self, mnemonic: str) -> int:
        """Instructions whose first part is `mnemonic`."""
        return sum(i.split(".")[0] == mnemonic for i in self.instructions())

    def overwritten_operands(self) -> list[str]:
        """Writes to registers that a wgmma in flight still reads, around the main loop.

        The assembler does not guard the A operand of an asynchronous product over a
        loop's back edge, so this walks the loop with the most HGMMA twice: from each HGMMA to
        the DEPBAR that retires its group, nothing may write its A registers.
        """
        found: list[str] = []
        code = self._code()
        for start, end in self._inner_loops("HGMMA"):
            body = [text for at, text in code if start <= at <= end]
            found += _overwrites(body)
        return found

    def _inner_loops(self, mnemonic: str) -> list[tuple[int, int]]:
        """Loops with `mnemonic` inside and no smaller such loop inside."""
        loops = [(a, b) for n, _, a, b in self._loops(mnemonic) if n]
        return [
            (a, b)
            for a, b in loops
            if not any((c, d) != (a, b) and a <= c and d <= b for c, d in loops)
        ]

    def _code(self) -> list[tuple[int, str]]:
        line = r"/\*([0-9a-f]{4,6})\*/\s+([^;/]+);"
        return [(int(a, 16), text) for a, text in re.findall(line, self.sass)]

    def _loops(
        self, mnemonic: str, leaves: bool = False
    ) -> list[tuple[int, int, int, int]]:
        """Backward branches: (count of mnemonic, -instructions, start, end).

        Without those that leave in the middle: they go back from code moved out of the way,
        such as a wait.
        """
        code = self._code()
        found = []
        for address, text in code:
            name, operands = _split(text)
            target = re.search(r"0x([0-9a-f]+)", operands)
            if not name.startswith("BRA") or not target:
                continue
            start = int(target.group(1), 16)
            if start >= address:
                continue
            body = [t for a, t in code if start <= a <= address]
            if not leaves and any(t.strip() == "EXIT" for t in body):
                continue
            hits = sum(_split(t)[0].split(".")[0] == mnemonic for t in body)
            found.append((hits, -len(body), start, address))
        return found

    def loop(self, mnemonic: str, *, leaves: bool = False) -> list[str]:
        """Mnemonics of the innermost loop with the most of `mnemonic`.

        With `leaves`, of the shortest with the most, which may have its exit in the middle.
        """
        loops = self._loops(mnemonic, leaves)
        if not leaves:
            inner = self._inner_loops(mnemonic)
            loops = [one for one in loops if one[2:] in inner]
        *_, start, end = max(loops)
        return [_split(t)[0] for a, t in self._code() if start <= a <= end]


def _split(text: str) -> tuple[str, str]:
    """An instruction's mnemonic and its operands, without the predicate."""
    text = re.sub(r"^@!?U?P\w+\s+", "", text.strip())
    name, _, operands = text.partition(" ")
    return name, operands


def _overwrites(body: list[str]) -> list[str]:
    groups: list[set[int]] = []  # A registers of committed groups, oldest first
    pending: set[int] = set()
    found = []
    for turn in (0, 1):
        for text in body:
            name, operands = _split(text)
            if name.startswith("HGMMA"):
                registers = re.findall(r"\bR(\d+)\b", operands)
                if len(registers) > 2:  # accumulator, A, accumulator
                    first = int(registers[1])
                    pending |= set(range(first, first + 4))
                if "gsb0" in operands:
                    groups.append(pending)
                    pending = set()
            elif name.startswith("WARPGROUP.DEPBAR"):
                left = int(re.search(r"gsb0, 0x([0-9a-f]+)", operands).group(1), 16)
                groups = groups[len(groups) - left :] if left else []
            elif hit := _written(name, operands) & set().union(pending, *groups):
                found.append(f"turn {turn}: {text.strip()} writes {sorted(hit)}")
    return found


def _written(name: str, operands: str) -> set[int]:
    """Registers that an instruction writes: those of its first operand."""
    kind = name.split(".")[0]
    if kind in ("ST", "STS", "STG", "STSM", "BRA", "SYNCS", "BAR", "UTMALDG", "RED"):
        return set()
    parts = [p.strip() for p in operands.split(",")]
    target = next((p for p in parts[:2] if re.fullmatch(r"R\d+", p)), None)
    if target is None or (target != parts[0] and not parts[0].startswith("P")):
        return set()
    width = 1
    if kind == "LDSM":
        width = int(name.rsplit(".", 1)[1]) if name[-1].isdigit() else 1
    elif ".128" in name:
        width = 4
    elif ".64" in name or "WIDE" in name:
        width = 2
    first = int(target[1:])
    return set(range(first, first + width))


def available() -> str | None:
    """Why nothing can be compiled here, or None."""
    for module in ("jax_plugins.xla_cuda13", "jax_cuda13_plugin"):
        try:
            if importlib.util.find_spec(module) is not None:
                break
        except ModuleNotFoundError:
            continue
    else:
        return "the CUDA wheels (jax-cuda13-plugin) are not installed"
    if _tool("cuobjdump") is None:
        return "cuobjdump (nvidia-cuda-cuobjdump) is not installed"
    return None


def without_cudnn() -> str | None:
    """Returns why cuDNN's fused attention cannot be compiled here, or None."""
    try:
        if importlib.util.find_spec("nvidia.cudnn") is not None:
            return None
    except ModuleNotFoundError:
        pass
    return "the wheel of cuDNN (nvidia-cudnn-cu13) is not installed"


def limit(target: str, name: str) -> int:
    """A number of the device's description, such as 'shared_memory_per_block_optin'."""
    text = (TARGETS / f"{target}.txtpb").read_text()
    return int(re.search(rf"^  {name}: (\d+)$", text, re.MULTILINE).group(1))


def compile_for(target: str, f, *specs, devices: int = 1):
    """Compiles f of ShapeDtypeStructs for 'h200', 'a100', ...: a jax Compiled."""
    with absent_gpu(target, devices) as mesh:
        return _lower(mesh, f, specs).compile()


def _lower(mesh, f, specs):
    replicated = NamedSharding(mesh, PartitionSpec())
    specs = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=replicated), specs
    )
    return jax.jit(f).trace(*specs).lower(lowering_platforms=("cuda",))


def mosaic_kernel(target: str, f, *specs) -> Kernel:
    """Compiles f as `compile_for` does; returns its one Mosaic GPU kernel, disassembled.

    A kernel that this process has compiled before is not compiled again, and so not found.
    One process can compile for one architecture.
    """
    # XLA keeps the machine code compressed inside the executable; Mosaic prints its PTX.
    # Asked for files it would write all that it can, which takes longer than to compile.
    before = os.environ.get("MOSAIC_GPU_DUMP_PTX")
    os.environ["MOSAIC_GPU_DUMP_PTX"] = "1"
    try:
        with absent_gpu(target) as mesh, _standard_output() as printed:
            lowered = _lower(mesh, f, specs)
            lowered.compile()
    finally:
        del os.environ["MOSAIC_GPU_DUMP_PTX"]
        if before is not None:
            os.environ["MOSAIC_GPU_DUMP_PTX"] = before
    (shared,) = _launched_shared(lowered.compiler_ir())
    (ptx,) = (
        part
        for part in printed[0].split("//\n// Generated by LLVM NVPTX Back-End\n//\n")
        if ".entry" in part
    )
    return _assemble(ptx, shared)


@contextlib.contextmanager
def _standard_output() -> Iterator[list[str]]:
    """Catches what is printed by this process, C++ included; fills in the list at the end."""
    flush = ctypes.CDLL(None).fflush
    found: list[str] = []
    with tempfile.TemporaryFile() as file:
        flush(None)
        kept = os.dup(1)
        os.dup2(file.fileno(), 1)
        try:
            yield found
        finally:
            flush(None)
            os.dup2(kept, 1)
            os.close(kept)
            file.seek(0)
            found.append(file.read().decode())


def _launched_shared(module: ir.Module) -> list[int]:
    """Bytes of shared memory of each kernel's launch, read from what XLA is given."""
    found: list[int] = []

    def call(op):
        if op.name == "stablehlo.custom_call":
            name = ir.StringAttr(op.attributes["call_target_name"]).value
            if name.startswith("mosaic_gpu"):
                config = ir.DictAttr(op.attributes["mhlo.backend_config"])
                kernel(ir.StringAttr(config["module"]).value_bytes)
        return ir.WalkResult.ADVANCE

    def kernel(code: bytes):
        context = mlir.make_ir_context()
        context.allow_unregistered_dialects = True
        mosaic_gpu_dialect.register_dialect(context)
        with context:
            parsed = ir.Module.parse(code)
            parsed.operation.walk(launch)

    def launch(op):
        if op.name.endswith("gpu.launch"):
            last = op.operands[len(op.operands) - 1].owner
            found.append(ir.IntegerAttr(last.attributes["value"]).value)
        return ir.WalkResult.ADVANCE

    module.operation.walk(call)
    return found


def _assemble(text: str, shared: int) -> Kernel:
    arch = re.search(r"\.target (sm_\w+)", text).group(1)
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        ptx.write_text(text)
        info = _run("ptxas", f"-arch={arch}", "-v", str(ptx), "-o", str(cubin))
        sass = _run("cuobjdump", "--dump-sass", str(cubin))
    numbers = [
        re.search(pattern, info)
        for pattern in (
            r"Used (\d+) registers",
            r"(\d+) bytes stack frame",
            r"(\d+) bytes spill stores",
            r"(\d+) bytes spill loads",
        )
    ]
    registers, stack, stores, loads = (int(n.group(1)) for n in numbers)
    return Kernel(
        name=re.search(r"\.entry (\w+)", text).group(1),
        registers=registers,
        stack=stack,
        spills=stores + loads,
        shared=shared,
        warnings=[line for line in info.splitlines() if "C75" in line],
        sass=sass,
    )


def _tool(name: str) -> str | None:
    spec = importlib.util.find_spec("nvidia")
    for root in (spec.submodule_search_locations or ()) if spec else ():
        for path in Path(root).glob(f"cu*/bin/{name}"):
            return str(path)
    return None


def _run(name: str, *args: str) -> str:
    tool = _tool(name)
    assert tool is not None, f"{name} is not installed"
    done = subprocess.run([tool, *args], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} {' '.join(args)}:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr
