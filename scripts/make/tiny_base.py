"""Makes the embedded assets: a tiny Llama pretrained from scratch, and its task.

    python -m scripts.make.tiny_base --out qlora_jax/assets --overwrite

From one seed and this file alone:

- base/: a Hugging Face folder with a Llama of 2.5 million parameters (in_features
  multiples of 256) and a byte-level BPE of 512 tokens, pretrained on generated prose
  about counting: numbers in words, and numbers in digits, never one beside the other.
- train.jsonl, test.jsonl: the task, to write a number in digits. The prose never does
  it. No number of the test rows is in the train rows.

      input   "four thousand three hundred and seven\\n"
      output  "4307"

- SOURCE.md: what the base was trained on, and its figures.
"""

import argparse
import json
import random
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers
from flax import nnx

import qlora_jax as qlora
from qlora_jax.files import check_output
from qlora_jax.models.decoder import Decoder, DecoderConfig
from qlora_jax.nn import FrozenParam, Linear
from qlora_jax.nn.matmul import factor_matmul

CONFIG = DecoderConfig(
    vocab_size=512,
    hidden_size=256,
    intermediate_size=512,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    tie_word_embeddings=True,
    max_position_embeddings=512,
)
SPECIAL = ("<unk>", "<s>", "</s>")
BOS_ID, EOS_ID = 1, 2
LARGEST = 9999

UNITS = """zero one two three four five six seven eight nine ten eleven twelve thirteen
fourteen fifteen sixteen seventeen eighteen nineteen""".split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
NAMES = (
    "Ada Ben Clara Dev Emil Fatima Hugo Ines Jonas Kenji Lena Maya Noor Omar".split()
)
THINGS = """apples books boats birds candles coins feathers hats kites lamps maps pears
shells spoons stones tickets""".split()
PLACES = (
    "harbour market meadow mill museum orchard school station tower village".split()
)


def in_words(n: int) -> str:
    """Returns a number from 0 to 9999 in English words."""
    if n < 20:
        return UNITS[n]
    if n < 100:
        rest = f" {UNITS[n % 10]}" if n % 10 else ""
        return TENS[n // 10 - 2] + rest
    if n < 1000:
        rest = f" and {in_words(n % 100)}" if n % 100 else ""
        return f"{UNITS[n // 100]} hundred{rest}"
    joint = " and " if 0 < n % 1000 < 100 else " "
    rest = joint + in_words(n % 1000) if n % 1000 else ""
    return f"{UNITS[n // 1000]} thousand{rest}"


def make_paragraph(rng: random.Random) -> str:
    """Returns a few sentences about numbers, all in words or all in digits."""
    write = in_words if rng.random() < 0.7 else str
    sentences = []
    for _ in range(rng.randint(2, 5)):
        n = int(10 ** rng.uniform(0.3, 3.98))
        name, other = rng.sample(NAMES, 2)
        thing, place = rng.choice(THINGS), rng.choice(PLACES)
        kind = rng.randrange(6)
        if kind == 0:
            sentences.append(f"{name} counted {write(n)} {thing} at the {place}.")
        elif kind == 1:
            run = ", ".join(write(min(n + i, LARGEST)) for i in range(4))
            sentences.append(f"{name} counted on: {run}.")
        elif kind == 2:
            sentences.append(f"After {write(n)} comes {write(min(n + 1, LARGEST))}.")
        elif kind == 3:
            less = rng.randrange(n)
            sentences.append(f"{write(n)} is more than {write(less)}.".capitalize())
        elif kind == 4:
            sentences.append(
                f"The {place} has {write(n)} {thing}, and {other} took one: "
                f"{write(n - 1)} are left."
            )
        else:
            ten = min(n + 10, LARGEST)
            sentences.append(f"{name} had {write(n)}, ten more made {write(ten)}.")
    return " ".join(sentences)


def make_task(rng: random.Random, train: int, test: int) -> tuple[list, list]:
    """Returns disjoint train and test rows; small numbers are train rows."""
    numbers = list(range(100, LARGEST + 1))
    rng.shuffle(numbers)
    held, rest = numbers[:test], [*range(1, 100), *numbers[test:]][:train]

    def row(n: int) -> dict[str, str]:
        return {"input": f"{in_words(n)}\n", "output": str(n)}

    return [row(n) for n in rest], [row(n) for n in held]


def train_tokenizer(rng: random.Random) -> tokenizers.Tokenizer:
    """Returns a byte-level BPE that takes digits one by one."""
    pre = tokenizers.pre_tokenizers
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    byte_level = pre.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre.Sequence(
        [pre.Digits(individual_digits=True), byte_level]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=CONFIG.vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((make_paragraph(rng) for _ in range(5000)), trainer)
    # As Llama's: other tools then add BOS, as qlora_jax does itself.
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", BOS_ID)]
    )
    return tokenizer


def pack(rng: random.Random, tokenizer: tokenizers.Tokenizer, rows: int, width: int):
    """Returns int32 (rows, width) of paragraphs end to end, each in BOS and EOS."""
    ids: list[int] = []
    while len(ids) < rows * width:
        texts = [make_paragraph(rng) for _ in range(1000)]
        for encoded in tokenizer.encode_batch(texts):  # adds BOS
            ids += [*encoded.ids, EOS_ID]
    return np.array(ids[: rows * width], np.int32).reshape(rows, width)


class TrainableLinear(Linear):
    """A linear whose kernel has a gradient; the library's own is frozen."""

    def __call__(self, x):
        y = factor_matmul(x.reshape(-1, x.shape[-1]), self.kernel[...].T)
        return y.reshape(*x.shape[:-1], -1)


def swap_linears(model: Decoder, old: type[Linear], new: type[Linear]) -> Decoder:
    """Returns the model with linears of one class made into another."""

    def swap(path, node):
        return new(node.kernel[...]) if type(node) is old else node

    return nnx.recursive_map(swap, model)


def mean_loss(
    weights: nnx.State, graphdef: nnx.GraphDef, tokens: jax.Array
) -> jax.Array:
    """Returns the mean next-token loss in nats, computed in bfloat16."""
    model = nnx.merge(graphdef, weights)
    embedding = model.embed_tokens.weight[...]
    model.embed_tokens.weight = FrozenParam(embedding.astype(jnp.bfloat16))
    model.dtype = "bfloat16"
    hidden = model.hidden_states(tokens[:, :-1])
    logits = factor_matmul(hidden.reshape(-1, hidden.shape[-1]), embedding.T)
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits.astype(jnp.float32), tokens[:, 1:].reshape(-1)
    )
    return losses.mean()


def pretrain(model: Decoder, rows: np.ndarray, args: argparse.Namespace) -> Decoder:
    """Trains every weight, each row once, batch by batch."""
    graphdef, weights = nnx.split(swap_linears(model, Linear, TrainableLinear))
    rate = optax.warmup_cosine_decay_schedule(0.0, args.learning_rate, 50, args.steps)
    tx = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.98, weight_decay=0.05)
    )
    opt_state = tx.init(weights)

    @jax.jit
    def step(weights, opt_state, tokens):
        loss, grads = jax.value_and_grad(mean_loss)(weights, graphdef, tokens)
        updates, opt_state = tx.update(grads, opt_state, weights)
        return optax.apply_updates(weights, updates), opt_state, loss

    began = time.monotonic()
    for i in range(args.steps):
        batch = rows[i * args.batch : (i + 1) * args.batch]
        weights, opt_state, loss = step(weights, opt_state, batch)
        if i % 25 == 0 or i + 1 == args.steps:
            seconds = time.monotonic() - began
            print(f"step {i + 1:5d}  loss {loss:.3f}  {seconds:.0f} s", file=sys.stderr)
    return swap_linears(nnx.merge(graphdef, weights), TrainableLinear, Linear)


def save(model: Decoder, tokenizer: tokenizers.Tokenizer, folder: Path) -> None:
    """Writes the base in bfloat16, with its tokenizer, as a Hugging Face folder."""
    graphdef, weights = nnx.split(model)
    low = jax.tree.map(lambda w: w.astype(jnp.bfloat16), weights)
    rounded = nnx.merge(graphdef, low)
    rounded.dtype = "bfloat16"
    qlora.save_model(rounded, folder, overwrite=True)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "</s>",
        "model_max_length": CONFIG.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
    }
    ids = {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps(ids, indent=2) + "\n")
    config = json.loads((folder / "config.json").read_text()) | ids
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


SOURCE = """# Embedded assets

Made by scripts/make/tiny_base.py (seed {seed}, {steps} steps of {batch} x {width} tokens)
with jax {jax}; Apache-2.0, as the rest of the repository.

- `base/`: LlamaForCausalLM, {parameters:,} parameters, bfloat16, pretrained from random
  weights on {tokens:,} tokens of prose about numbers that the script generates. Nobody
  else's text is in it. Loss on held-out prose: {loss:.3f} nats a token. It knows nothing
  of the world; it is there to show a fine-tuning run.
- `train.jsonl` ({train} rows), `test.jsonl` ({test} rows): a number in words, to be
  written in digits. The prose has both, never one beside the other. No number is in both
  files.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--overwrite", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--width", type=int, default=129)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--train-rows", type=int, default=2000)
    parser.add_argument("--test-rows", type=int, default=200)
    args = parser.parse_args()
    check_output(args.out, args.overwrite)
    began = time.monotonic()
    rng = random.Random(args.seed)
    tokenizer = train_tokenizer(rng)
    count = args.steps * args.batch
    rows = pack(rng, tokenizer, count + 64, args.width)
    model = Decoder(CONFIG, key=jax.random.key(args.seed), dtype="float32")
    model = pretrain(model, rows[:count], args)
    graphdef, weights = nnx.split(model)
    loss = float(jax.jit(mean_loss, static_argnums=1)(weights, graphdef, rows[count:]))
    save(model, tokenizer, args.out / "base")
    train, test = make_task(rng, args.train_rows, args.test_rows)
    for name, task in (("train", train), ("test", test)):
        lines = "".join(json.dumps(row) + "\n" for row in task)
        (args.out / f"{name}.jsonl").write_text(lines)
    figures = {
        "parameters": sum(w.size for w in jax.tree.leaves(weights)),
        "tokens": count * args.width,
        "loss": loss,
        "seconds": round(time.monotonic() - began),
    }
    said = {**vars(args), **figures, "jax": jax.__version__}
    said |= {"train": len(train), "test": len(test)}
    (args.out / "SOURCE.md").write_text(SOURCE.format(**said))
    print(json.dumps({"out": str(args.out), **figures}))


if __name__ == "__main__":
    main()
