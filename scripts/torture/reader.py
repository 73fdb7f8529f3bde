"""What the readers share: how one is described, and the good base that inputs are made of."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "qlora_jax" / "assets" / "base"
CHAT = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MESSAGES = [
    {"role": "user", "content": "a question"},
    {"role": "assistant", "content": "an answer"},
]
Damage = Callable[[Path, random.Random], None]


class Reader(NamedTuple):
    """A reader of one kind of input.

    Attributes:
      make: Writes a good input into an empty folder.
      damage: Damages it there.
      read: Reads the folder, and uses what it has read.
      heavy: Whether a case takes some hundredths of a second, so that fewer are tried.
    """

    make: Callable[[Path], None]
    damage: Damage
    read: Callable[[Path], Any]
    heavy: bool = False


def one_of(*choices: tuple[str, Damage]) -> Damage:
    """Returns what damages one of some files, named relative to the folder."""

    def damage(folder: Path, rng: random.Random) -> None:
        name, how = rng.choice(choices)
        how(folder / name, rng)

    return damage
