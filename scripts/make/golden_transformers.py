"""Makes tests/golden/families: logits of tiny models of every family, by transformers.

    pip install torch==2.13.0 transformers==5.24.0 safetensors==0.8.0 accelerate==1.15.0
    PYTHONPATH=tests/models python -m scripts.make.golden_transformers \\
        --out tests/golden/families [CASE ...]

CPU, float32, eager attention. The weights follow from tests/models/family_cases.py and
are not stored. A case is read by transformers from a folder with the names that it
writes itself, so that its own conversions (of fused experts) apply.

NAME.npz holds, all float32 unless noted:

- logits: (2, 3, vocab) at `positions` of `tokens`.
- logits_shorter: the same of fewer tokens, for the cases in SHORTER.
- logits_padded: (vocab,), at the last real token of the second row of `padded_tokens`,
  with an attention mask.
- saved: JSON bytes, {"config": config.json as transformers writes it, "tensors":
  {name on disk: shape}, "versions": {...}}.

defaults.json: {model type: config.json as transformers writes it, made from its `sizes`}.
"""

import argparse
import json
import tempfile
from pathlib import Path

import family_cases as cases
import numpy as np
import safetensors
import torch
import transformers
from safetensors.numpy import save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

# Of every model's config, and nothing about its shape.
UNUSED = set(PreTrainedConfig().to_dict()) - {"tie_word_embeddings"}
VERSIONS = {
    "torch": torch.__version__,
    "transformers": transformers.__version__,
    "numpy": np.__version__,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", help="names (default: all)")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    for case in options.cases or cases.CASES:
        made = make(case)
        np.savez_compressed(options.out / f"{case}.npz", **made)
        size = (options.out / f"{case}.npz").stat().st_size
        spread = made["logits"].std(-1).mean()
        print(f"{case}: {size} bytes, logits spread {spread:.2f}")
    text = json.dumps(defaults(), indent=1, sort_keys=True)
    (options.out / "defaults.json").write_text(text + "\n")


def make(case: str) -> dict[str, np.ndarray]:
    """Returns the arrays of a case's golden."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        saved = write(case, folder)

        def logits(ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
            # Loaded anew: rotary embeddings keep state from the lengths they have seen.
            model, info = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=torch.float32,
                attn_implementation="eager",
                output_loading_info=True,
            )
            bad = {key: value for key, value in info.items() if value}
            if bad:
                raise ValueError(f"{case} did not load cleanly: {bad}")
            if mask is not None:
                mask = torch.from_numpy(mask)
            with torch.no_grad():
                ids = torch.from_numpy(ids.astype(np.int64))
                return model.eval()(ids, attention_mask=mask).logits.numpy()

        mask = np.ones((2, cases.SEQ), np.int64)
        mask[1, cases.PADDED :] = 0
        padded = logits(cases.padded_tokens(case), mask)
        made = {
            "logits": logits(cases.tokens(case))[:, cases.positions(cases.SEQ)],
            "logits_padded": padded[1, cases.PADDED - 1],
        }
        if length := cases.SHORTER.get(case):
            shorter = logits(cases.tokens(case, length))
            made["logits_shorter"] = shorter[:, cases.positions(length)]
    text = json.dumps(saved | {"versions": VERSIONS}, separators=(",", ":"))
    return made | {"saved": np.frombuffer(text.encode(), np.uint8)}


def defaults() -> dict[str, dict]:
    """Returns {model type: its config with every default}."""
    families = dict.fromkeys(hf["model_type"] for hf in cases.CASES.values())
    read = {}
    for family in families:
        config = AutoConfig.for_model(family, **cases.sizes(family)).to_dict()
        kept = {key: value for key, value in config.items() if key not in UNUSED}
        read[family] = {"model_type": family} | kept
    return read


def write(case: str, folder: Path) -> dict:
    """Writes a case's folder; returns its config.json and {tensor name: shape}."""
    fields = json.loads(json.dumps(cases.CASES[case]))
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    with safetensors.safe_open(folder / "model.safetensors", "np") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
    save_file(
        {name: cases.weight(case, name, tuple(s)) for name, s in shapes.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    config = json.loads((folder / "config.json").read_text())
    return {"config": config, "tensors": shapes}


if __name__ == "__main__":
    main()
