"""A process that makes rows for another: `python -m qlora_jax.data.worker`.

It reads a `Forming` and then lists of records, pickled, from stdin, and writes what it made
of each to stdout. It ends when stdin does.
"""

import pickle
import sys


def work() -> None:
    """Serves the process that started this one."""
    answers, sys.stdout = sys.stdout.buffer, sys.stderr  # a print is no answer
    make = pickle.load(sys.stdin.buffer).maker()
    while True:
        try:
            records = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        pickle.dump(make(records), answers)
        answers.flush()


if __name__ == "__main__":
    work()
