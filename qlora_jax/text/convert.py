"""Folders without tokenizer.json: SentencePiece's tokenizer.model, vocab.json, tekken.json.

transformers makes a fast tokenizer of them (it needs no torch for that). It is what such
folders are measured against, so it is the converter here: the extra `sentencepiece`.
"""

from pathlib import Path

import tokenizers

from qlora_jax.errors import CheckpointError

SOURCES = (
    "tokenizer.model",
    "spm.model",
    "tiktoken.model",
    "tekken.json",
    "merges.txt",
)
"""Files that a tokenizer can be made of, where there is no tokenizer.json."""

PACKAGES = "'transformers>=5' sentencepiece protobuf"


def source_of(folder: Path) -> Path | None:
    """Returns the file to convert; None where there is none."""
    files = (folder / name for name in SOURCES)
    return next((file for file in files if file.is_file()), None)


def convert(source: Path) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """Converts a folder's tokenizer.

    Returns:
      (tokenizer, name -> text of its special tokens).

    Raises:
      CheckpointError: the converter is not installed, or refuses the file.
    """
    folder = source.parent
    try:
        import google.protobuf  # noqa: F401
        import sentencepiece  # noqa: F401 # pyright: ignore[reportMissingImports]
        import transformers  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise CheckpointError(
            f"{folder} has {source.name} and no tokenizer.json, and what converts it is "
            f"not installed ({error}): pip install {PACKAGES}. Or write tokenizer.json "
            "once, in a Python that has them: AutoTokenizer.from_pretrained(folder)"
            ".save_pretrained(folder)"
        ) from None
    try:
        made = transformers.AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True
        )
        return made.backend_tokenizer, dict(made.special_tokens_map)
    except Exception as error:  # it can fail in any way that Python can
        raise CheckpointError(
            f"{source} cannot be converted by transformers {transformers.__version__}: "
            f"{error}"
        ) from None
