"""What tells one base from another by its files: small ones whole, large ones by samples."""

import hashlib
import json
from pathlib import Path

from qlora_jax.sources.source import Source
from qlora_jax.text.folder import FILES

WHOLE_BYTES = 64 << 20
"""Files up to this size count whole."""
SAMPLES, SAMPLE_BYTES = 64, 64 << 10
"""Of a larger file its size counts, its header (of safetensors), and so many places."""


def identity_of(source: Source) -> dict[str, str]:
    """Returns digests of a base, in hex: of its config, its weights and its tokenizer.

    The same files have the same ones wherever they lie. A change within a file of more than
    64 MiB shows if it is in the header, or at one of 64 places.
    """
    if source.is_gguf:
        return {"weights": _sampled([source.path])}
    folder = source.path
    config = json.dumps(source.hf, sort_keys=True)
    texts = [path for name in FILES if (path := folder / name).is_file()]
    return {
        "config": hashlib.sha256(config.encode()).hexdigest(),
        "weights": _sampled(sorted(folder.glob("*.safetensors"))),
        "tokenizer": _sampled(texts),
    }


def _sampled(paths: list[Path]) -> str:
    found = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        found.update(f"{path.name} {size} ".encode())
        with path.open("rb") as stream:
            if size <= WHOLE_BYTES:
                found.update(hashlib.file_digest(stream, "sha256").digest())
                continue
            header = 8 + int.from_bytes(stream.read(8), "little")
            stream.seek(0)
            found.update(stream.read(min(header, WHOLE_BYTES)))
            for i in range(SAMPLES):
                stream.seek((size - SAMPLE_BYTES) * i // (SAMPLES - 1))
                found.update(stream.read(SAMPLE_BYTES))
    return found.hexdigest()
