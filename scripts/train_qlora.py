"""A QLoRA fine-tune in one readable file: no Trainer, no CLI.

    python scripts/train_qlora.py MODEL train.jsonl OUT [--steps 200] [--batch 8]

MODEL is a Hugging Face folder or hub id; rows are {"input", "output"} or any other form
of qlora_jax/data/forms.py. Writes OUT/adapter and OUT/loss.jsonl.
"""

import argparse
import json
from pathlib import Path

import jax
import optax

import qlora_jax as qlora


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=1024)
    parser.add_argument("--rank", type=int, default=16)
    args = parser.parse_args()

    # 4-bit NormalFloat with double-quantized scales, as the tensors stream in.
    model, tokenizer = qlora.load(args.model, quant=qlora.QuantConfig())
    config = qlora.LoRAConfig(rank=args.rank, alpha=2 * args.rank)
    model = qlora.attach(model, config, key=jax.random.key(0))

    # Three values from here on: structure, what trains, what is frozen.
    graphdef, lora, base = qlora.split(model)
    schedule = optax.warmup_cosine_decay_schedule(0.0, 2e-4, 5, args.steps)
    tx = optax.chain(optax.clip_by_global_norm(0.3), optax.adamw(schedule))
    tx = qlora.offload(tx)  # optimizer state rests in host memory
    opt_state = tx.init(lora)
    train_step = qlora.make_train_step(graphdef, tx, checkpoint="layer")

    args.out.mkdir(parents=True, exist_ok=True)
    batches = qlora.load_dataset(
        args.data, tokenizer, args.batch, args.max_tokens, epochs=1000
    )
    with (args.out / "loss.jsonl").open("w") as log:
        for step, batch in zip(range(args.steps), batches, strict=False):
            lora, opt_state, metrics = train_step(lora, base, opt_state, batch)
            row = {"step": step, **{name: float(x) for name, x in metrics.items()}}
            log.write(json.dumps(row) + "\n")
            print(f"step {step:5d}  loss {row['loss']:.4f}", flush=True)

    qlora.save_adapter(args.out / "adapter", lora, config, overwrite=True)
    prompt = [tokenizer.encode("Once upon a time")]
    model = qlora.join(graphdef, lora, base)
    new = qlora.generate(model, prompt, qlora.SampleConfig(max_new_tokens=20))
    print(json.dumps({"out": str(args.out), "sample": tokenizer.decode(new[0])}))


if __name__ == "__main__":
    main()
