"""QuantConfig checks itself, in the words of the command line."""

import dataclasses

import pytest

from qlora_jax.config.quant import QuantConfig
from qlora_jax.errors import ConfigError


def test_the_defaults_are_those_of_the_paper():
    assert QuantConfig() == QuantConfig(
        codebook="nf4", block_size=64, double_quant=True
    )


@pytest.mark.parametrize("block_size", [16, 48, 0, 8192])
def test_a_block_size_that_is_no_power_of_two_in_range_is_refused(block_size):
    with pytest.raises(
        ConfigError, match=rf"--quant.block-size is {block_size}, .*32 to"
    ):
        QuantConfig(block_size=block_size)


def test_it_is_frozen_and_hashable():
    config = QuantConfig()
    assert hash(config) == hash(QuantConfig())
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.block_size = 128
