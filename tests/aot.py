"""Compiles for a GPU that is not there, and reads what came out.

Needs the CUDA wheels but no GPU and no driver (kernels/notes: a compile-only PJRT
topology): jax-cuda13-plugin, jax-cuda13-pjrt, nvidia-cuda-nvcc, nvidia-nvvm, and
nvidia-cuda-cuobjdump for the disassembly. JAX_PLATFORMS must be cpu.
"""

import contextlib
import dataclasses
import importlib.util
import os
import re
import subprocess
import tempfile
from pathlib import Path

import jax
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec, use_abstract_mesh

TARGETS = Path(__file__).parent / "targets"


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One function of a cubin."""

    name: str
    registers: int
    stack: int
    spills: int
    warnings: list[str]
    sass: str

    def instructions(self) -> list[str]:
        """Mnemonics with their modifiers, in order."""
        line = r"/\*[0-9a-f]{4,6}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)"
        return [m.group(1) for m in re.finditer(line, self.sass)]

    def count(self, mnemonic: str) -> int:
        """Instructions whose first part is `mnemonic`."""
        return sum(i.split(".")[0] == mnemonic for i in self.instructions())

    def loop(self, mnemonic: str) -> list[str]:
        """The innermost loop (backward branch) with the most of `mnemonic`."""
        line = r"/\*([0-9a-f]{4,6})\*/\s+((?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)[^;]*);"
        code = [
            (int(m.group(1), 16), m.group(3), m.group(2))
            for m in re.finditer(line, self.sass)
        ]
        best: tuple[int, int, list[str]] = (0, 0, [])
        for address, name, text in code:
            if name.split(".")[0] != "BRA":
                continue
            target = re.search(r"0x([0-9a-f]+)", text)
            if not target or int(target.group(1), 16) >= address:
                continue
            start = int(target.group(1), 16)
            body = [n for a, n, _ in code if start <= a <= address]
            hits = sum(n.split(".")[0] == mnemonic for n in body)
            if (hits, -len(body)) > (best[0], best[1]):
                best = (hits, -len(body), body)
        return best[2]


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


def compile_for(target: str, f, *specs, devices: int = 1):
    """Compiles f of ShapeDtypeStructs for 'h200', 'a100', ...: a jax Compiled."""
    topology = topologies.get_topology_desc(
        "",
        platform="cuda",
        target_config=(TARGETS / f"{target}.txtpb").read_text(),
        topology=f"1x1x{devices}",
    )
    mesh = topologies.make_mesh(topology, (devices,), ("d",))
    replicated = NamedSharding(mesh, PartitionSpec())
    specs = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=replicated), specs
    )
    with use_abstract_mesh(mesh.abstract_mesh), _architecture(target):
        traced = jax.jit(f).trace(*specs)
        return traced.lower(lowering_platforms=("cuda",)).compile()


@contextlib.contextmanager
def _architecture(target: str):
    """Mosaic takes every absent device for a Hopper; tells it what `target` is."""
    from jax.experimental.mosaic.gpu import utils

    text = (TARGETS / f"{target}.txtpb").read_text()
    major = int(re.search(r"compute_capability \{ major: (\d+)", text).group(1))
    minor = re.search(r"compute_capability \{[^}]*minor: (\d+)", text)
    arch = (major, int(minor.group(1)) if minor else 0)
    before = utils._infer_arch
    utils._infer_arch = lambda: arch
    try:
        yield
    finally:
        utils._infer_arch = before


def mosaic_kernels(target: str, f, *specs) -> list[Kernel]:
    """Compiles f as `compile_for` does; returns its Mosaic GPU kernels, disassembled.

    Runs in a process of its own: what Mosaic dumps goes by variables that are read once.
    """
    # XLA keeps the machine code compressed inside the executable; Mosaic hands out PTX.
    with tempfile.TemporaryDirectory() as folder:
        names = ("TO", "PTX")
        before = {n: os.environ.get(f"MOSAIC_GPU_DUMP_{n}") for n in names}
        os.environ["MOSAIC_GPU_DUMP_TO"] = folder
        os.environ["MOSAIC_GPU_DUMP_PTX"] = "1"
        try:
            compile_for(target, f, *specs)
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[f"MOSAIC_GPU_DUMP_{name}"]
                else:
                    os.environ[f"MOSAIC_GPU_DUMP_{name}"] = value
        return [_assemble(path) for path in sorted(Path(folder).glob("*.ptx"))]


def _assemble(ptx: Path) -> Kernel:
    text = ptx.read_text()
    arch = re.search(r"\.target (sm_\w+)", text).group(1)
    cubin = ptx.with_suffix(".cubin")
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
    registers, stack, stores, loads = (int(n.group(1)) if n else 0 for n in numbers)
    return Kernel(
        name=re.search(r"\.entry (\w+)", text).group(1),
        registers=registers,
        stack=stack,
        spills=stores + loads,
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
