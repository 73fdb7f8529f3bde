"""GEMM shapes of real models, shared by tests, tuning and benchmarks."""

from typing import NamedTuple


class Shape(NamedTuple):
    """A weight's shape: n outputs, k inputs."""

    name: str
    n: int
    k: int


SHAPES = {
    "square_2048": Shape("square_2048", 2048, 2048),
    "llama2_7b_down": Shape("llama2_7b_down", 4096, 11008),
    "llama2_7b_gate_up": Shape("llama2_7b_gate_up", 11008, 4096),
    "llama3_8b_q_o": Shape("llama3_8b_q_o", 4096, 4096),
    "llama3_8b_k_v": Shape("llama3_8b_k_v", 1024, 4096),
    "llama3_8b_gate_up": Shape("llama3_8b_gate_up", 14336, 4096),
    "llama3_8b_down": Shape("llama3_8b_down", 4096, 14336),
    "llama3_70b_q_o": Shape("llama3_70b_q_o", 8192, 8192),
    "llama3_70b_k_v": Shape("llama3_70b_k_v", 1024, 8192),
    "llama3_70b_gate_up": Shape("llama3_70b_gate_up", 28672, 8192),
    "llama3_70b_down": Shape("llama3_70b_down", 8192, 28672),
}
