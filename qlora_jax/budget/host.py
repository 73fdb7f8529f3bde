"""Finds how many bytes of host memory a run may still take."""

from pathlib import Path


def available_host_bytes(root: Path = Path("/")) -> int | None:
    """Returns the bytes of host memory that may still be taken, where Linux says it.

    In a container with a limit of its own (cgroup v2) it is what that leaves, if less.

    Args:
      root: The folder where /proc and /sys lie.
    """

    def numbers(path: str) -> dict[str, int]:
        try:
            lines = (root / path).read_text().replace(":", " ").splitlines()
        except OSError:
            return {}
        pairs = [line.split()[:2] for line in lines if len(line.split()) > 1]
        return {name: int(value) for name, value in pairs if value.isdigit()}

    available = numbers("proc/meminfo").get("MemAvailable")
    if available is None:
        return None
    free = 1024 * available
    try:
        group = root / "sys/fs/cgroup"
        limit, used = ((group / f"memory.{x}").read_text() for x in ("max", "current"))
        # Cached files are given up when memory is asked for.
        files = numbers("sys/fs/cgroup/memory.stat").get("inactive_file", 0)
        free = min(free, int(limit) - int(used) + files)
    except (OSError, ValueError):
        pass  # no such group, or its limit is 'max'
    return max(free, 0)
