"""Writes the README's table of families from the registry: python -m scripts.make.tables"""

import re
from pathlib import Path

from qlora_jax.models import FAMILIES
from scripts.bench import harness

README = Path(__file__).resolve().parents[2] / "README.md"
START, END = "<!-- families: scripts/make/tables.py -->\n", "<!-- end of families -->\n"
CELLS = ("dense folder", "4-bit folder", "merged", "adapters")
"""What every family can: open (and write) each, in both directions where there are two.
tests/models/test_golden_families.py holds each family to all of them."""


def families() -> str:
    """Returns the table in Markdown."""
    head = ("`model_type`", "", *CELLS)
    lines = [head, ("---",) * len(head)]
    for name, module in sorted(FAMILIES.items()):
        about = (module.__doc__ or "").partition("\n\n")[0].strip().rstrip(".")
        lines.append((f"`{name}`", " ".join(about.split()), *("yes",) * len(CELLS)))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def written(readme: str) -> str:
    """Returns the README with its table made anew."""
    pattern = f"(?<={re.escape(START)}).*?(?={re.escape(END)})"
    return re.sub(pattern, lambda _: families(), readme, flags=re.DOTALL)


if __name__ == "__main__":
    harness.only_help(__doc__)
    README.write_text(written(README.read_text()))
