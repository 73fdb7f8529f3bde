"""`qlora generate`: continue prompts."""

import dataclasses
from typing import Any

from qlora_jax.cli import options
from qlora_jax.cli.options import QuantOptions
from qlora_jax.errors import DataError
from qlora_jax.generate import SampleConfig, generate


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Continue prompts with a model, with or without an adapter."""

    model: str
    """Hugging Face folder or hub id."""

    prompt: tuple[str, ...]
    """One or more prompts, answered as one batch."""

    adapter: str | None = None
    """Run folder or adapter folder."""

    quant: QuantOptions = QuantOptions()
    """auto: a dense folder stays dense, or is held as the adapter's run held it."""

    dtype: str = "bfloat16"
    """Compute dtype: bfloat16, float16 or float32."""

    chat: bool = False
    """Put each prompt through the chat template as a user's turn."""

    max_new_tokens: int = 128
    """Most tokens to add."""

    temperature: float = 0.0
    """0 takes the likeliest token."""

    top_k: int | None = None
    """Sample among the k likeliest tokens."""

    top_p: float | None = None
    """Sample among the fewest tokens whose probabilities sum to p."""

    seed: int = 0
    """Of the sampling."""


def parse(args: list[str], prog: str) -> Args:
    """Parses the flags."""
    return options.parse(Args, args, prog)


def run(args: Args) -> dict[str, Any]:
    """Prints prompt and continuation of each; returns them."""
    config = SampleConfig(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
    )
    model, tokenizer, said = options.open_model(
        args.model, args.adapter, args.quant, args.dtype
    )
    if tokenizer is None:
        raise DataError(
            f"{args.model} has no tokenizer.json, so prompts cannot be read"
        )
    prompts = []
    for text in args.prompt:
        if args.chat:
            turn = [{"role": "user", "content": text}]
            prompts.append(
                tokenizer.encode(tokenizer.chat(turn, add_generation_prompt=True))
            )
        else:
            bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
            prompts.append(bos + tokenizer.encode(text))
    new = generate(model, prompts, config, eos_ids=tokenizer.eos_ids)
    texts = [tokenizer.decode(ids) for ids in new]
    for prompt, text in zip(args.prompt, texts, strict=True):
        print(f"{prompt}{text}\n")
    return {**said, "texts": texts, "new_tokens": [len(ids) for ids in new]}
