"""`qlora generate`: continue prompts, with one adapter, several, or none."""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

from qlora_jax.adapters.bank import BASE, AdapterBank
from qlora_jax.cli import options
from qlora_jax.config.quant import QuantOptions
from qlora_jax.data.prompts import Prompt, read_prompts
from qlora_jax.errors import ConfigError, DataError
from qlora_jax.files import new_file
from qlora_jax.inference import SampleConfig, Stop, decoded, generate
from qlora_jax.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """These settings say how prompts become tokens."""

    chat_template: str | None = None
    """Template for --chat and for messages: a file in Jinja's language, or the name of one
    of the model's own; None for the one of the adapter's run, or the model's."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Continue prompts with a model and adapters: one, or for each prompt its own."""

    model: str
    """Hugging Face folder or hub id."""

    prompt: tuple[str, ...] = ()
    """One or more prompts, answered as one batch."""

    prompts: Path | None = None
    """Instead: a .jsonl file of prompts, answered in batches."""

    out: Path | None = None
    """With --prompts this .jsonl file is written: the same rows, each with a "completion"."""

    batch_size: int = 8
    """With --prompts so many rows are answered at once; fewer need less memory."""

    adapter: str | None = None
    """Run folder, adapter folder or PEFT folder."""

    adapters: tuple[str, ...] = ()
    """Several, as NAME=FOLDER, of one base. Each row of --prompts takes the one in its
    "adapter" field; base, or no such field, is the model alone."""

    route: tuple[str, ...] = ()
    """With --prompt and --adapters each prompt takes the adapter of this name, or base."""

    quant: QuantOptions = QuantOptions()
    """auto: a dense folder stays dense, or is held as the adapter's run held it."""

    dtype: str = "bfloat16"
    """Compute dtype: bfloat16, float16 or float32."""

    chat: bool = False
    """Put each prompt through the chat template as a user's turn."""

    data: PromptOptions = PromptOptions()

    stop: tuple[str, ...] = ()
    """Texts that end an answer; they and what follows them are left out. Decoding ends as
    soon as every row of a batch has one, or its EOS."""

    max_new_tokens: int = 128
    """Most tokens to add."""

    temperature: float = 0.0
    """0 takes the likeliest token."""

    top_k: int | None = None
    """Sample among the k likeliest tokens."""

    top_p: float | None = None
    """Sample among the fewest tokens whose probabilities sum to p."""

    seed: int = 0
    """Tokens are drawn from this number; the same one gives the same texts."""

    def __post_init__(self):
        problems = []
        if bool(self.prompt) == (self.prompts is not None):
            problems.append("give either --prompt or --prompts")
        if (self.prompts is None) != (self.out is None):
            problems.append("--prompts and --out go together")
        if self.batch_size < 1:
            problems.append(f"--batch-size is {self.batch_size}, expected at least 1")
        if self.adapter is not None and self.adapters:
            problems.append("give either --adapter or --adapters")
        if self.route and not (self.adapters and self.prompt):
            problems.append("--route goes with --adapters and --prompt")
        elif self.adapters and len(self.route) != len(self.prompt):
            problems.append(
                f"--route has {len(self.route)} names for {len(self.prompt)} prompts; "
                f"give each the name of an adapter, or {BASE}"
            )
        if "" in self.stop:
            problems.append("--stop has an empty text")
        if problems:
            raise ConfigError("; ".join(problems))


def parse(args: list[str], prog: str) -> Args:
    """Parses the flags."""
    return options.parse(Args, args, prog)


def run(args: Args) -> dict[str, Any]:
    """Prints or writes the continuation of each prompt; returns the figures."""
    config = SampleConfig(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
    )
    if args.out is not None:
        options.check_file("--out", args.out)
    if args.adapters:
        model, tokenizer, said = options.open_bank(
            args.model, args.adapters, args.quant, args.dtype
        )
        names = (BASE, *model.adapters)
    else:
        model, tokenizer, said = options.open_model(
            args.model, args.adapter, args.quant, args.dtype
        )
        names = ()
    if tokenizer is None:
        raise DataError(
            f"{args.model} has no tokenizer.json, so prompts cannot be read"
        )
    template = options.run_template(args.data.chat_template, args.adapter)
    if template is not None:
        tokenizer = tokenizer.with_chat_template(template)
    if args.prompts is not None:
        prompts = read_prompts(args.prompts, tokenizer, chat=args.chat, adapters=names)
        count = _write(args, model, tokenizer, prompts, config)
        return {**said, "out": str(args.out), "rows": len(prompts), "new_tokens": count}
    try:
        rows = [{"prompt": text} for text in args.prompt]
        prompts = [Prompt.of(row, tokenizer, chat=args.chat) for row in rows]
    except DataError as error:
        raise DataError(f"--prompt {error}") from None
    if args.adapters:
        model = model.route(args.route)
    stop = _stop(args, prompts, tokenizer)
    new = generate(model, [p.tokens for p in prompts], config, stop=stop)
    texts = [stop.cut(tokenizer.decode(ids)) for ids in new]
    for prompt, text in zip(args.prompt, texts, strict=True):
        print(f"{prompt}{text}\n")
    return {**said, "texts": texts, "new_tokens": [len(ids) for ids in new]}


def _stop(args: Args, prompts: list[Prompt], tokenizer: Tokenizer) -> Stop:
    """Returns what ends an answer: in a chat, what ends its turns too."""
    chat = any(prompt.chat for prompt in prompts)
    return Stop.of(tokenizer, args.stop, chat=chat)


def _write(
    args: Args,
    model: Any,
    tokenizer: Tokenizer,
    prompts: list[Prompt],
    config: SampleConfig,
) -> int:
    """Writes a file of all rows, which is there when all are; returns the new tokens."""
    assert args.out is not None
    total, size, stop = 0, args.batch_size, _stop(args, prompts, tokenizer)
    model = decoded(model)  # once for all batches
    with (
        new_file(args.out, overwrite=False) as beside,
        beside.open("w", encoding="utf-8") as stream,
    ):
        for start in range(0, len(prompts), size):
            some = prompts[start : start + size]
            # A short last batch is filled up, so that it compiles nothing anew.
            full = some + some[:1] * (size - len(some))
            routed = model
            if isinstance(model, AdapterBank):
                routed = model.route([prompt.adapter for prompt in full])
            new = generate(
                routed,
                [prompt.tokens for prompt in full],
                dataclasses.replace(config, seed=config.seed + start // size),
                stop=stop,
            )
            for prompt, ids in zip(some, new, strict=False):
                completion = stop.cut(tokenizer.decode(ids))
                row = {**prompt.row, "completion": completion}
                stream.write(json.dumps(row, ensure_ascii=False) + "\n")
                total += len(ids)
            logger.info("%d of %d prompts", start + len(some), len(prompts))
    return total
