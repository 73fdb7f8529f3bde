"""Setup: what the memory of a run depends on."""

import dataclasses
from typing import Any

from qlora_jax.config.lora import LoRAConfig
from qlora_jax.config.quant import Mxfp4Use, QuantConfig, TableFormat
from qlora_jax.config.train import TrainConfig
from qlora_jax.models import DecoderConfig

_NF4 = QuantConfig()
_TRAIN_SETTINGS = {field.name for field in dataclasses.fields(TrainConfig)}


@dataclasses.dataclass(frozen=True, init=False)
class Setup:
    """All that a step's memory depends on: a model's shape, and a run's own settings.

    A setting of TrainConfig may be given and read as the setup's own, here and in
    dataclasses.replace: `Setup(config=..., offload=True).offload`.

    Attributes:
      config: The model's shape.
      train: The settings of training. Where they are not given, micro_batch and grad_accum
        are 1 and checkpoint is "layer".
      lora: The adapter's shape and place.
      quant: The quantization of the layers' linears; None for a dense base.
      embedding: The format of the embedding, and of a head that is tied to it: 'none'
        (dense), '4bit' or 'int8'.
      head: The format of a head of its own, in the same terms.
      mxfp4: Whether experts are held in MXFP4 ('keep'), or as other linears ('decode').
      max_tokens: Tokens of the longest row.
      packed_rows: Where documents are packed, the rows of a step, which are fewer than its
        documents, micro_batch * grad_accum; None where each document is a row.
      pairs: Whether each document of a step has another beside it (preferences).
    """

    config: DecoderConfig
    train: TrainConfig
    lora: LoRAConfig
    quant: QuantConfig | None
    embedding: TableFormat
    head: TableFormat
    mxfp4: Mxfp4Use
    max_tokens: int
    packed_rows: int | None
    pairs: bool

    def __init__(
        self,
        *,
        config: DecoderConfig,
        train: TrainConfig | None = None,
        lora: LoRAConfig | None = None,
        quant: QuantConfig | None = _NF4,
        embedding: TableFormat = "none",
        head: TableFormat = "none",
        mxfp4: Mxfp4Use = "decode",
        max_tokens: int = 2048,
        packed_rows: int | None = None,
        pairs: bool = False,
        **settings: Any,
    ):
        """Takes the attributes, and in `settings` those of TrainConfig that differ from
        `train`; `dtype` is another name of its compute_dtype.

        Raises:
          TypeError: TrainConfig has no such setting.
          ConfigError: a value that it does not take.
        """
        if "dtype" in settings:
            settings["compute_dtype"] = settings.pop("dtype")
        if unknown := settings.keys() - _TRAIN_SETTINGS:
            names = ", ".join(sorted(unknown))
            raise TypeError(f"Setup has no {names}; TrainConfig has none either")
        train = train or TrainConfig(micro_batch=1, grad_accum=1, checkpoint="layer")
        self.__dict__.update(  # the class is frozen
            config=config,
            train=dataclasses.replace(train, **settings),
            lora=lora or LoRAConfig(),
            quant=quant,
            embedding=embedding,
            head=head,
            mxfp4=mxfp4,
            max_tokens=max_tokens,
            packed_rows=packed_rows,
            pairs=pairs,
        )

    def __getattr__(self, name: str) -> Any:
        """Reads a setting of `train`."""
        if name in _TRAIN_SETTINGS:
            return getattr(self.train, name)
        raise AttributeError(f"Setup has no {name!r}")

    @property
    def dtype(self) -> str:
        """The dtype of the computation, and of what stays dense."""
        return self.train.compute_dtype

    @property
    def micro_rows(self) -> int:
        """The rows of a micro-batch, as the device has them."""
        most = self.train.micro_batch
        if self.packed_rows is not None:
            return -(-self.packed_rows // self.micro_batches)
        return 2 * most if self.pairs else most

    @property
    def micro_batches(self) -> int:
        """The micro-batches of a step."""
        if self.packed_rows is not None:
            return -(-self.packed_rows // self.train.micro_batch)
        return self.train.grad_accum

    @property
    def tokens(self) -> int:
        """The tokens of a micro-batch."""
        return self.micro_rows * self.max_tokens
