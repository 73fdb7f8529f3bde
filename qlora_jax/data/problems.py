"""What is wrong with the rows of a file, gathered by kind."""

from typing import NoReturn

from qlora_jax.errors import DataError, gathered

_MOST = 100_000


class Problems:
    """Problems of one file's rows: those with the same words are one kind.

    Attributes:
      name: The file's name, as the user gave it.
      lines: Whether a row's place is a line of the file, else its number.
    """

    def __init__(self, name: str, *, lines: bool = True):
        self.name, self.lines = name, lines
        self._places: dict[str, list[int]] = {}
        self._count = 0

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._places)

    def add(self, place: int, message: str) -> None:
        """Notes what is wrong with the row at a place, from 1.

        Raises:
          DataError: there are so many that more would say nothing.
        """
        self._places.setdefault(message, []).append(place)
        self._count += 1
        if self._count == _MOST:
            self.fail()

    def at(self, place: int) -> str:
        """Says where a row is."""
        return f"{self.name}:{place}" if self.lines else f"{self.name}, row {place}"

    def texts(self) -> list[str]:
        """Returns a line for each kind: its first place, and how many rows it has."""
        texts = []
        for message, places in self._places.items():
            count = f" ({len(places)} rows)" if len(places) > 1 else ""
            texts.append(f"{self.at(min(places))}: {message}{count}")
        return texts

    def fail(self) -> NoReturn:
        """Raises DataError with all of them."""
        raise DataError(gathered(f"{self.name} cannot be used", self.texts()))
