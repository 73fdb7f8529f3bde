"""`qlora SUBCOMMAND`: parses, runs, prints one JSON line; errors are one message."""

import errno
import importlib
import json
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from qlora_jax.cli import stopping

COMMANDS = {
    "quickstart": "quantize, fine-tune, evaluate and sample the embedded model",
    "quantize": "write a 4-bit copy of a model folder",
    "plan": "what a run needs of memory, and settings that fit",
    "data": "what a run will see of its rows",
    "train": "fine-tune an adapter",
    "teach": "rows with a teacher's probabilities, for --objective distill",
    "evaluate": "perplexity of a text; loss, exact match or choices of rows",
    "generate": "continue prompts",
    "merge": "fold an adapter into a dense model folder",
    "combine": "several adapters as one",
    "compress": "an adapter of lower rank",
    "export": "an adapter as a PEFT folder, or a model as a GGUF file",
    "import": "a PEFT adapter as one of ours",
    "inspect": "what a folder holds, whether an adapter fits, how two differ",
    "doctor": "devices, versions, and which kernels will run",
}
_OF_ALL = ("--debug", "--no-compile-cache", "--offline")
"""Flags that every subcommand has."""

_OFFLINE = "HF_HUB_OFFLINE"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand.

    Each one lives in qlora_jax/cli/NAME.py with a dataclass `Args` and `run(args)`,
    which returns what the last line on stdout says.

    Returns:
      The exit status: 0 done; 2 refused, as something of what was given is wrong; 1 failed,
      though nothing of it is wrong; 130 interrupted (Ctrl-C), 143 terminated (SIGTERM).
    """
    with stopping.handled(keep=argv is None):
        return _main(argv)


def _main(argv: Sequence[str] | None) -> int:
    args = list(sys.argv[1:] if argv is None else argv)
    debug, no_cache = "--debug" in args, "--no-compile-cache" in args
    if "--offline" in args:
        # Before the packages that ask the network are imported, which read it then.
        os.environ[_OFFLINE] = "1"
    args = [arg for arg in args if arg not in _OF_ALL]
    if not args or args[0] in ("-h", "--help"):
        print(_usage())
        return 0 if args else 2
    if args[0] == "--version":
        from qlora_jax import __version__

        print(__version__)
        return 0
    if args[0] not in COMMANDS:
        print(f"error: no subcommand {args[0]!r}\n\n{_usage()}", file=sys.stderr)
        return 2
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    for name in ("qlora_jax", "pallas_kernels"):
        logging.getLogger(name).setLevel(logging.INFO)
    return _run(args[0], args[1:], debug, no_cache)


def _run(name: str, args: list[str], debug: bool, no_cache: bool) -> int:
    import jax

    from qlora_jax.cli.compile_cache import use_cache
    from qlora_jax.errors import QLoRAError

    try:
        module = "import_" if name == "import" else name  # a keyword
        command = importlib.import_module(f"qlora_jax.cli.{module}")
        parsed = command.parse(args, f"qlora {name}")
        use_cache(off=no_cache)
        stopping.started()
        figures = command.run(parsed)
    except (QLoRAError, OSError) as error:
        if debug:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return 1 if _failed(error) else 2
    except jax.errors.JaxRuntimeError as error:
        if debug or "RESOURCE_EXHAUSTED" not in str(error):
            return _fault(error, debug)
        print(
            "error: the device ran out of memory. Lower --train.micro-batch or "
            f"--data.max-tokens, or pass --train.checkpoint layer.\n{error}",
            file=sys.stderr,
        )
        return 1
    # Panics of compiled packages and interrupts are no Exceptions.
    except BaseException as error:
        if isinstance(error, SystemExit):  # of flags that cannot be parsed, or --help
            raise
        if not stopping.status() and not isinstance(error, KeyboardInterrupt):
            return _fault(error, debug)
        print(stopping.word(), file=sys.stderr)
        return stopping.status() or 130
    _print(figures)
    return stopping.status()


def _failed(error: Exception) -> bool:
    """Whether nothing that was given is wrong: disk, memory or numbers let the command down."""
    from qlora_jax.errors import OutputError, SaveError

    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
    if isinstance(error, OSError) and error.errno in full:
        return True
    return isinstance(error, (ArithmeticError, MemoryError, OutputError, SaveError))


def _fault(error: BaseException, debug: bool) -> int:
    """Says in a line what should have been an error of ours; returns the status."""
    if debug:
        traceback.print_exc()
    text = " ".join(str(error).split())[:500]
    said = f"{type(error).__name__}: {text}" if text else type(error).__name__
    if isinstance(error, MemoryError):
        print(f"error: this machine's memory is used up ({said})", file=sys.stderr)
        return 1
    what = "the traceback above" if debug else "the traceback that --debug shows"
    print(
        f"error: this is a fault of qlora_jax ({said}); please report it to the project's "
        f"issue tracker, with {what}",
        file=sys.stderr,
    )
    return 1


def _print(figures: dict[str, Any]) -> None:
    """Prints figures as JSON, which has no NaN and no Inf: those are null, and named."""
    from qlora_jax.train.metrics import finite

    said = finite(figures)
    if lost := [name for name in figures if said[name] != figures[name]]:
        print(f"not a finite number, so null: {', '.join(lost)}", file=sys.stderr)
    print(json.dumps(said, allow_nan=False))


def _usage() -> str:
    lines = [f"  {name:<12}{text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: qlora SUBCOMMAND [options]     (qlora SUBCOMMAND --help for its options)",
            "",
            *lines,
            "",
            "  --debug               show the traceback behind an error",
            "  --offline             ask no network: models and datasets of the hub are taken",
            "                        from what was downloaded before",
            "  --no-compile-cache    keep no compiled programs for later runs; the variable",
            "                        QLORA_JAX_COMPILE_CACHE names their folder, or says off",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
