"""bitsandbytes' 4-bit product, timed as gpu/suite.py times ours.

Device time by torch's profiler, the sum of a call's kernels; medians over calls that
rotate among weights larger together than the L2.
"""

from collections.abc import Callable
from typing import Any

from scripts.gpu import products

_weights: dict[tuple[int, int], list] = {}


def measure(task: dict[str, Any], turn: Callable[[], Any]) -> dict[str, Any]:
    """matmul_4bit, or what its autograd function does in backward."""
    import bitsandbytes as bnb
    import torch
    from bitsandbytes import functional

    m, n, k = task["m"], task["n"], task["k"]
    with turn():
        if (n, k) not in _weights:
            _weights.clear()
            one = -(-products.ROTATED_BYTES // (n * k // 2))
            _weights[n, k] = [
                functional.quantize_4bit(
                    torch.randn(n, k, device="cuda", dtype=torch.bfloat16),
                    quant_type="nf4",
                    compress_statistics=True,
                )
                for _ in range(max(3, min(24, one)))
            ]
        weights = _weights[n, k]
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        dy = torch.randn(m, n, device="cuda", dtype=torch.bfloat16)

        def call(packed, state):
            if task["direction"] == "forward":
                with torch.no_grad():
                    return bnb.matmul_4bit(x, packed.t(), quant_state=state)
            return dy @ functional.dequantize_4bit(packed, state)

        for packed, state in weights:
            call(packed, state)
        calls = weights * max(2, products.CALLS // len(weights))

        def run():
            for packed, state in calls:
                call(packed, state)

        repeats = [
            products.per_call(profiled(run), len(calls))
            for _ in range(products.REPEATS)
        ]
    return {**products.statistic(repeats), "version": bnb.__version__}


def profiled(run: Callable[[], Any]) -> list[float]:
    """Returns the microseconds of each kernel that runs, in order."""
    import torch
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        run()
        torch.cuda.synchronize()
    return kernel_times(seen.events(), DeviceType.CUDA)


def kernel_times(events: Any, cuda: Any) -> list[float]:
    """Returns the kernels' microseconds by start; copies and fills are none, as in CUPTI's
    list of ours."""
    kernels = [
        e
        for e in events
        if e.device_type == cuda and not e.name.startswith(("Memcpy", "Memset"))
    ]
    kernels.sort(key=lambda e: e.time_range.start)
    return [e.time_range.elapsed_us() for e in kernels]
