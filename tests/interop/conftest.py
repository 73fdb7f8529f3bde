"""PyTorch's side of these tests: one process of $QLORA_JAX_TORCH_PYTHON, which does jobs."""

import json
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from models import family_cases

VARIABLE = "QLORA_JAX_TORCH_PYTHON"
SECONDS = 300
"""After which a job hangs; the first one imports torch too."""


class Side:
    """A process of side.py."""

    def __init__(self, python: str, log: Path):
        self.log = log
        # Nothing is looked up on the network, and sums do not depend on the cores.
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [python, Path(__file__).with_name("side.py")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=env,
            )

    def __call__(self, do: str, **job: Any) -> dict[str, Any]:
        """Does a job; returns what it says."""
        answer = self.ask(do, **job)
        assert "error" not in answer, f"{do}: {answer['error']}"
        return answer

    def fails(self, do: str, **job: Any) -> str:
        """Does a job that must fail; returns why it did."""
        answer = self.ask(do, **job)
        assert "error" in answer, f"{do} did not fail"
        return answer["error"]

    def ask(self, do: str, **job: Any) -> dict[str, Any]:
        """Does a job; returns what it says, or {"error": why it failed}."""
        assert self.process.stdin is not None and self.process.stdout is not None
        limit = threading.Timer(SECONDS, self.process.kill)
        limit.start()
        try:
            self.process.stdin.write(json.dumps({"do": do, **job}, default=str) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            limit.cancel()
        assert line, f"side.py died in {do}:\n{self.log.read_text()[-3000:]}"
        return json.loads(line)


@pytest.fixture(scope="session")
def side(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Side]:
    """Runs side.py; skips where there is no PyTorch, which is no dependency of ours."""
    python = os.environ.get(VARIABLE)
    if not python:
        pytest.skip(
            f"NOT TRIED IN PYTORCH: set ${VARIABLE} to what scripts/interop_venv prints"
        )
    side = Side(python, tmp_path_factory.mktemp("side") / "stderr")
    yield side
    side.process.communicate(timeout=30)  # which ends its stdin


@pytest.fixture(scope="session")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of token ids that all tiny models have."""
    file = tmp_path_factory.mktemp("ids") / "ids.npy"
    np.save(file, np.asarray(tiny.tokens(2, 11)))
    return file


_SMALL = {
    "vocab_size": tiny.CONFIG.vocab_size,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
CONFIGS: dict[str, dict[str, Any]] = {
    # Rows of 64 and 256: both planar layouts.
    "llama": {"model_type": "llama", "intermediate_size": 256},
    # Biases; a tied head; rows of 72 and 104, in which blocks straddle rows.
    "qwen2": {
        "model_type": "qwen2",
        "hidden_size": 72,
        "intermediate_size": 104,
        "tie_word_embeddings": True,
    },
    "mixtral": {
        "model_type": "mixtral",
        "intermediate_size": 128,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "head_dim": 16,
        "moe_intermediate_size": 64,
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "norm_topk_prob": True,
    },
    "gemma4_text": {
        "model_type": "gemma4_text",
        "head_dim": 16,
        "global_head_dim": 32,
        "layer_types": ["sliding_attention", "full_attention"],
        "intermediate_size": 128,
        "hidden_size_per_layer_input": 0,
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 64,
    },
    "gpt_oss": {
        "model_type": "gpt_oss",
        "head_dim": 16,
        "intermediate_size": 64,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 8,
    },
}


_MIXTURES = ("qwen2_moe", "qwen3_next", "qwen3_5_moe_text", "olmoe", "glm4_moe")
_MIXTURES += ("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "lfm2_moe")
_MIXTURES += ("granitemoehybrid",)
CONFIGS |= {
    name: family_cases.CASES[name]
    for name in (*_MIXTURES, "minimax_m2", "ernie4_5_moe")
}


class Bases(dict[str, Path]):
    """Folders of tiny random models, as transformers writes them, made when first asked for."""

    def __init__(self, side: Side, folder: Path):
        super().__init__()
        self.side, self.folder = side, folder

    def __missing__(self, name: str) -> Path:
        """Makes a folder."""
        out = self[name] = self.folder / name
        rows = {"vocab_size": tiny.CONFIG.vocab_size}
        self.side("make", config=_SMALL | CONFIGS[name] | rows, out=out)
        return out


@pytest.fixture(scope="session")
def bases(side: Side, tmp_path_factory: pytest.TempPathFactory) -> Bases:
    """The folders of this process."""
    return Bases(side, tmp_path_factory.mktemp("bases"))
