"""Which folder a path of an adapter means, and what lies there beside the adapter."""

import os
from pathlib import Path

from qlora_jax.config.lora import LoRAConfig
from qlora_jax.errors import AdapterMismatchError
from qlora_jax.exchange.metadata import ADAPTER, BASE, METADATA, read_metadata
from qlora_jax.exchange.peft import is_peft
from qlora_jax.exchange.steps import CHECKPOINTS, place_of, say_unfinished, unfinished
from qlora_jax.text.tokenizer import Tokenizer


def adapter_tokenizer(
    path: str | os.PathLike[str], base: Tokenizer | None
) -> Tokenizer | None:
    """Returns the tokenizer of a base with the tokens that an adapter added."""
    own = load_tokenizer(path)
    if base is None or own is None:
        return base or own
    return base.with_vocabulary(own) if own.rows > base.rows else base


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer | None:
    """Opens the tokenizer of a run folder, adapter folder or model folder.

    Returns:
      None where there is none: an adapter without new tokens has its base's.
    """
    return Tokenizer.open(_found(path) or place_of(path))


def find_adapter(path: str | os.PathLike[str]) -> Path:
    """Returns the adapter folder of a run folder or of an adapter folder.

    Of an unfinished run it is its newest checkpoint that is whole, which is said. RUN@12 is
    the one after step 12, and RUN@best the one with the least eval loss.

    Raises:
      AdapterMismatchError: there is none.
      CheckpointError: that checkpoint is not there or damaged, or all are.
    """
    if (found := _found(path)) is not None:
        return found.absolute()
    if is_peft(path):
        raise AdapterMismatchError(
            f"{path} is a PEFT adapter; import it first (qlora import)"
        )
    raise AdapterMismatchError(
        f"{path} holds no adapter; expected a run folder, an adapter folder with "
        f"{METADATA}, or a PEFT folder"
    )


def _found(path: str | os.PathLike[str]) -> Path | None:
    """Returns the folder with adapter.json that a path means; None where there is none."""
    place = place_of(path)
    if (place / METADATA).is_file():
        return place
    current = unfinished(place)
    if current is not None and (current / METADATA).is_file():
        say_unfinished(current)
        return current
    folder = place / ADAPTER
    return folder if (folder / METADATA).is_file() else None


def changed_base(path: str | os.PathLike[str]) -> Path | None:
    """Returns the folder of the base that a run changed, which lies beside its adapter.

    Args:
      path: A run folder, the adapter folder or a checkpoint in it, or any other adapter.

    Returns:
      None where the adapter's init changes no base, or its base is not there.
    """
    if is_peft(path):
        return None
    folder = find_adapter(path)
    inside = folder.parent if folder.parent.name == CHECKPOINTS else folder
    if inside.name not in (ADAPTER, CHECKPOINTS):
        return None
    base = inside.parent / BASE
    if read_adapter_config(folder).init != "pissa":
        return None
    return base if (base / "config.json").is_file() else None


def read_adapter_config(path: str | os.PathLike[str]) -> LoRAConfig:
    """Reads an adapter's rank, alpha, dropout and targets."""
    return read_metadata(find_adapter(path))[0]
