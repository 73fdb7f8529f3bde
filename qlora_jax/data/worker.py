"""A process that makes rows for another: `python -m qlora_jax.data.worker`.

It reads a `Forming` and then lists of records, pickled, from stdin, and writes what it made
of each, or the error that it ended in, to stdout. It ends when stdin does.
"""

import pickle
import sys

from qlora_jax.errors import QLoRAError


def work() -> None:
    """Serves the process that started this one."""
    answers, sys.stdout = sys.stdout.buffer, sys.stderr  # a print is no answer
    make = pickle.load(sys.stdin.buffer).maker()
    while True:
        try:
            records = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            made = make(records)
        except QLoRAError as error:  # which the other process raises
            made = error
        pickle.dump(made, answers)
        answers.flush()


if __name__ == "__main__":
    work()
