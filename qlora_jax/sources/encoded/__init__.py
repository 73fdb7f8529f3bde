"""Weights that other libraries quantized: decoded as they are read, and dense to everyone else.

    encoding, problems = read_encoding(config_json)  # which form a folder has, of config.json
    join(checkpoint, encoding)                       # M.qweight, M.scales, ... become M.weight

A form is one file: which entries a weight of it has, what shape it will have, and what they
decode to, which is what the library that made it computes.
"""

from qlora_jax.sources.encoded.config import Encoding as Encoding
from qlora_jax.sources.encoded.config import read_encoding as read_encoding
from qlora_jax.sources.encoded.join import join as join
