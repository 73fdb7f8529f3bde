"""Every kernel that a model's products get, compiled for a GPU that is not there.

Cases are what `choose` gives, by the tuned table or without it. Among those that make the
same program but for a count of turns, one is compiled.
"""

import dataclasses
import functools
import importlib
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import aot
import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import tuning
from pallas_kernels.device import Device
from pallas_kernels.formats import QuantizedTensor
from pallas_kernels.packed_matmul import ampere, choose, decode, hopper
from pallas_kernels.shapes import SHAPES
from pallas_kernels.tuning import Problem

# The kernels cannot even be imported there: their dialect is newer. The oldest stack of
# .ci/run is such a one; both others, 0.11.2 and the newest, run this file.
if jax.__version_info__ < (0, 11, 2):
    pytest.skip("Mosaic GPU kernels need jax >= 0.11.2", allow_module_level=True)
# CUDA's compiler is 500 MB that `scripts/test` does not ask a newcomer for; .ci/run installs
# it on both of these stacks, and says loudly where it could not.
if reason := aot.available():
    pytest.skip(f"NOT COMPILED FOR A GPU: {reason}", allow_module_level=True)

pytestmark = pytest.mark.aot
_MORE = [pytest.mark.slow, pytest.mark.rotates]

CONFIGS = {
    "hopper": hopper.config.Config,
    "decode": decode.config.Config,
    "ampere": ampere.config.Config,
}
H200 = Device("gpu", "NVIDIA H200", (9, 0), 132)
RANK = 64
RESERVED = 1024  # bytes of shared memory that CUDA takes of every block

# Instructions a weight in the main loop, all told, by decoder. The tensor core's share at
# 128 tokens is 8 issue slots a weight.
HOPPER_BUDGET = {"table": 3.7, "permute": 6.1, "table_exact": 4.2}
ONE_PLANE = 2.0  # more, when a warpgroup decodes one plane of a word
# By tokens: products, sums and loads for them come on top of decoding.
DECODE_BUDGET = {8: 2.7, 16: 3.7, 32: 4.2}
CLUSTER_STEP = 0.6  # more, when all of a tile is one step and its sums go to a cluster


def kernel_of(implementation: str, direction: str) -> Callable[..., jax.Array]:
    package = f"pallas_kernels.packed_matmul.{implementation}"
    return getattr(importlib.import_module(f"{package}.{direction}"), direction)


@dataclasses.dataclass(frozen=True)
class Case:
    """One product; `why` has the table's key, or that there is none."""

    implementation: str
    direction: str
    m: int
    n: int
    k: int
    config: Any
    dtype: str = "bfloat16"
    rank: int = 0
    why: str = ""

    def __str__(self) -> str:
        return (
            f"{self.implementation} {self.direction} {self.m} {self.n} {self.k} "
            f"{self.dtype} {self.rank} {self.why}"
        )

    @property
    def steps(self) -> int:
        """Turns of the main loop of a tile."""
        if self.implementation == "decode":
            groups = -(-self.k // 256 // self.config.splits)
            return -(-groups // (4 * self.config.team))
        width = self.k // 256 if self.direction == "forward" else -(-self.n // 64)
        return width // self.config.split_k

    def program(self) -> tuple[Any, ...]:
        """What makes it another program than a case of the same."""
        fields = dataclasses.asdict(self.config)
        if self.implementation == "decode":
            return (self.direction, -(-self.m // 8), self.k, *fields.values())
        fields["split_k"] = min(2, self.config.split_k)
        # Loops of one turn are none; backward takes two steps a turn.
        turns = min(
            self.steps, 2 if self.direction == "forward" else 4 + self.steps % 2
        )
        return (self.direction, turns, *fields.values())

    def compile(self, target: str, num_sms: int) -> aot.Kernel:
        m, n, k, config = self.m, self.n, self.k, self.config
        dtype = jnp.dtype(self.dtype)
        kernel = kernel_of(self.implementation, self.direction)
        spec = jax.ShapeDtypeStruct
        if self.implementation == "decode":
            specs, treedef = jax.tree.flatten(QuantizedTensor.abstract((n, k)))

            def product(x, *arrays):
                w = jax.tree.unflatten(treedef, arrays)
                return kernel(x, w, config=config, num_sms=num_sms)

            return aot.mosaic_kernel(target, product, spec((m, k), dtype), *specs)

        def product(x, codes, scales, *addend):
            return kernel(
                x,
                codes,
                scales,
                addend or None,
                config=config,
                codebook="nf4",
                num_sms=num_sms,
            )

        m += -m % config.block_m  # as mosaic.tiled pads it
        width, other = (k, n) if self.direction == "forward" else (n, k)
        specs = [
            spec((m, width), dtype),
            spec((n, k // 4), jnp.uint16),
            spec((k // 64, n), jnp.float32 if config.exact else dtype),
        ]
        if self.rank:
            specs += [spec((m, self.rank), dtype), spec((other, self.rank), dtype)]
        return aot.mosaic_kernel(target, product, *specs)


def chosen() -> list[Case]:
    """What an H200 runs for the shapes of models, each program once."""
    programs: dict[Any, Case] = {}
    asked = [(None, exact) for exact in (False, True)]
    asked += [(name, False) for name in ("hopper", "decode")]
    for shape in SHAPES.values():
        w = QuantizedTensor.abstract((shape.n, shape.k))
        for name, exact in asked:
            for direction in ("forward", "backward"):
                for m in (1 << e for e in range(15)):
                    bf16 = jnp.dtype(jnp.bfloat16)
                    try:
                        choice = choose(
                            direction, m, w, bf16, device=H200, name=name, exact=exact
                        )
                    except ValueError:
                        assert name == "decode"  # in forward of few tokens only
                        continue
                    config = CONFIGS[choice.implementation](**dict(choice.config))
                    case = Case(
                        choice.implementation,
                        direction,
                        m,
                        shape.n,
                        shape.k,
                        config,
                        rank=0 if choice.implementation == "decode" else RANK,
                        why=choice.why + (" exact" if exact else ""),
                    )
                    programs.setdefault(case.program(), case)
    return list(programs.values())


CHOSEN = chosen()


def samples() -> list[Case]:
    """Those of other dtype and without an adapter: of each kind of tile one."""
    found: dict[Any, Case] = {}
    for case in CHOSEN:
        c = case.config
        kind = getattr(c, "block_m", c), getattr(c, "decoder", "")
        if case.steps > 3:
            found.setdefault((case.direction, *kind), case)
    return [
        dataclasses.replace(case, dtype="float16", rank=RANK * (i % 2))
        for i, case in enumerate(found.values())
        if case.implementation == "hopper" or i % 3 == 0
    ]


PERMUTE = hopper.config.Config(decoder="permute", x_stages=6, weight_stages=2)
BY_HAND = [  # what is not chosen, and kept for other cards and codebooks
    Case("hopper", "forward", 1024, 14336, 4096, PERMUTE, why="permute"),
    Case(
        "hopper",
        "backward",
        1024,
        14336,
        4096,
        dataclasses.replace(PERMUTE, weight_stages=4),
        why="permute",
    ),
    Case(
        "hopper",
        "forward",
        32,
        14336,
        4096,
        hopper.config.Config(
            decoder="table",
            block_m=32,
            x_depth=256,
            x_stages=3,
            weight_stages=2,
            warpgroups=4,
        ),
        rank=RANK,
        why="four warpgroups",
    ),
    Case(
        "decode",
        "forward",
        16,
        4096,
        4096,
        decode.config.Config(teams=2, team=2, splits=2),
        why="cluster",
    ),
    Case(
        "decode",
        "forward",
        32,
        4096,
        4096,
        decode.config.Config(teams=2, team=1, splits=4, rows=32),
        why="cluster",
    ),
]


def ragged() -> list[Case]:
    """Rows of W that no tile divides."""
    found = []
    for direction, m, n in itertools.product(
        ("forward", "backward"), (16, 512), (1000, 32064)
    ):
        w, bf16 = QuantizedTensor.abstract((n, 4096)), jnp.dtype(jnp.bfloat16)
        choice = choose(direction, m, w, bf16, device=H200, name="hopper")
        config = hopper.config.Config(**dict(choice.config))
        case = Case("hopper", direction, m, n, 4096, config, rank=RANK, why="ragged")
        found.append(case)
    return found


def few(cases: list[Case]) -> list[Any]:
    """Marks all but every tenth slow, which .ci/run has."""
    return [
        pytest.param(case, id=str(case), marks=_MORE if i % 10 else [])
        for i, case in enumerate(cases)
    ]


def test_every_entry_of_the_table_is_among_the_cases():
    path = os.path.join(os.path.dirname(tuning.__file__), "tuned", "nvidia_h200.json")
    with open(path) as file:
        entries = json.load(file)["entries"]
    programs = {case.program() for case in CHOSEN}
    for key, entry in entries.items():
        direction, m, n, k, dtype = key.split()
        config = CONFIGS[entry["implementation"]](**entry["config"])
        case = Case(
            entry["implementation"],
            direction,
            int(m[3:]),
            int(n[2:]),
            int(k[2:]),
            config,
            dtype,
        )
        assert case.program() in programs, key


@pytest.mark.parametrize("case", few(CHOSEN + samples() + BY_HAND + ragged()))
def test_an_h200_runs_it_without_spills_and_within_its_budget(case: Case):
    kernel = case.compile("h200", H200.cores)
    assert kernel.spills == 0
    assert kernel.warnings == []  # C7513 and its kin: products run one by one
    assert 0 < kernel.shared <= aot.limit("h200", "shared_memory_per_block_optin")
    if case.implementation == "decode":
        check_decode(case, kernel)
    else:
        check_hopper(case, kernel)


def check_hopper(case: Case, kernel: aot.Kernel) -> None:
    config = case.config
    assert kernel.registers * 128 * (config.warpgroups + 1) <= 65536
    assert kernel.count("HGMMA") > 0
    assert kernel.overwritten_operands() == []
    # The smallest weights are cut in so many parts that no loop is left to hold to it.
    if case.steps < (2 if case.direction == "forward" else 4):
        return
    loop = kernel.loop("HGMMA")
    products = sum(i.startswith("HGMMA") for i in loop)
    budget = HOPPER_BUDGET[config.decoder]
    if case.direction == "backward" and config.planes == 1:
        budget += ONE_PLANE
    # A thread gives 8 weights to each m64k16 product.
    assert 0 < len(loop) < 8 * products * budget


def check_decode(case: Case, kernel: aot.Kernel) -> None:
    blocks = -(-case.m // 8)
    assert kernel.count("HMMA") > 0
    tiles = -(-case.n // case.config.rows // (H200.cores // case.config.splits))
    if case.steps == 1 and tiles == 1:
        return  # nothing is left to loop over
    loop = kernel.loop("HMMA", leaves=True)
    products = sum(i.startswith("HMMA") for i in loop)
    weights = 8 * products / blocks  # a thread gives 8 weights to each m16n8k16
    budget = DECODE_BUDGET[8 * blocks]
    if case.steps == 1 and case.config.splits > 1:
        budget += CLUSTER_STEP
    assert 0 < len(loop) < weights * budget


# --- Ampere and Ada -----------------------------------------------------------------------

CARDS = {"a100": (8, 0), "rtx4090": (8, 9), "rtx3090": (8, 6)}
# Both directions, both dtypes, with and without an adapter.
AMPERE = [
    (direction, dtype, rank)
    for direction in ("forward", "backward")
    for dtype, rank in (("bfloat16", RANK), ("float16", 0))
]
# Instructions a weight in the main loop, for 64 tokens, whose products take an A100's
# tensor cores 8 issue slots a weight: below that, decoding hides behind them. What is
# there, 6.6 and 7.1, and a twentieth.
AMPERE_BUDGET = {"forward": 6.9, "backward": 7.4}


@functools.cache
def compiled(target: str) -> list[dict[str, Any]]:
    """What came of the cases, in a process of its own: one knows one architecture."""
    here = os.path.dirname(__file__)
    tests = os.path.dirname(os.path.dirname(here))
    code = "import sys; sys.path[:0] = sys.argv[1:3]\nimport test_compiled as t\n"
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"{code}t.report({target!r})",
            here,
            tests,
        ],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def report(target: str) -> None:
    """Compiles the cases and prints the kernels' figures."""
    found = []
    for direction, dtype, rank in AMPERE:
        _, n, k = SHAPES["llama3_8b_gate_up"]
        problem = Problem(direction, 512, n, k, dtype)
        device = Device("gpu", capability=CARDS[target])
        config = ampere.config.Config(**ampere.config.configure(problem, device))
        case = Case("ampere", direction, 512, n, k, config, dtype, rank)
        kernel = case.compile(target, aot.limit(target, "core_count"))
        loop = kernel.loop("HMMA")
        # A thread gives 8 weights to as many m16n8k16 products as there are 8 tokens.
        products = sum(i.startswith("HMMA") for i in loop)
        found.append(
            {
                "spills": kernel.spills,
                "registers": kernel.registers * 128 * config.blocks_per_sm,
                "shared": kernel.shared,
                "blocks": config.blocks_per_sm,
                "mma.sync": kernel.count("HMMA"),
                "cp.async": kernel.count("LDGSTS"),
                "a weight": len(loop) / (8 * products / (config.block_m // 8)),
            }
        )
    print(json.dumps(found))


@pytest.mark.parametrize("number", range(len(AMPERE)), ids=lambda i: str(AMPERE[i]))
@pytest.mark.parametrize(
    "target",
    ["a100", *(pytest.param(card, marks=pytest.mark.slow) for card in list(CARDS)[1:])],
)
def test_older_cards_run_it_without_spills_and_within_its_budget(target, number):
    kernel = compiled(target)[number]
    assert kernel["spills"] == 0
    assert kernel["registers"] <= aot.limit(target, "registers_per_core_limit")
    assert 0 < kernel["shared"] <= aot.limit(target, "shared_memory_per_block_optin")
    on_a_core = kernel["blocks"] * (kernel["shared"] + RESERVED)
    assert on_a_core <= aot.limit(target, "shared_memory_per_core")
    assert kernel["mma.sync"] > 0
    assert kernel["cp.async"] > 0
    assert kernel["a weight"] < AMPERE_BUDGET[AMPERE[number][0]]
