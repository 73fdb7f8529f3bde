"""The readers that are tried, by name."""

from scripts.torture import of_models, of_runs, of_text
from scripts.torture.reader import Reader

READERS: dict[str, Reader] = of_models.READERS | of_text.READERS | of_runs.READERS
