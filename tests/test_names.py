"""The grammar of names: every conversion undone gives what it was made of."""

import pytest

from qlora_jax.models import FAMILIES
from qlora_jax.names import Numbered, Table, dotted, is_stacked


@pytest.mark.parametrize(
    ("name", "path", "index"),
    [
        ("norm.weight", "norm.weight", ()),
        ("layers.3.attn.q_proj.lora_a", "layers.attn.q_proj.lora_a", (3,)),
        (
            "layers.0.mlp.experts.12.up.kernel",
            "layers.mlp.experts.up.kernel",
            (0, 12),
        ),
        ("layers.mlp.experts.up_proj", "layers.mlp.experts.up_proj", ()),
        ("layers.1.mlp.experts.up_proj", "layers.mlp.experts.up_proj", (1,)),
        # A stranger's own numbers and names stay what they are.
        ("blocks.3.linear.kernel", "blocks.3.linear.kernel", ()),
        ("experts.3.up.kernel", "experts.3.up.kernel", ()),
        ("layers", "layers", ()),
        ("layers.2", "layers", (2,)),
    ],
)
def test_a_numbered_name_is_a_path_and_an_index(name, path, index):
    assert Numbered.parse(name) == (path, index)
    assert str(Numbered(path, index)) == name


def test_paths_are_told():
    assert dotted(("layers", "a", 3)) == "layers.a.3"
    assert is_stacked(("layers", "a")) and not is_stacked(("norm", "layers"))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_familys_table_goes_both_ways(family):
    table = Table(FAMILIES[family].NAMES, layers=3, experts=2)
    pairs = list(table.all())
    names = [name for _, name in pairs]
    assert len(set(names)) == len(names)
    for place, name in pairs:
        assert table.find(name) == place
        assert table.name(*place) == name
        assert Numbered.parse(str(place)) == place
    for path in table.templates:
        places = [place for place, name in pairs if place.path == path]
        assert table.names(path) == [table.name(*place) for place in places]
        sizes = table.stack(path)
        assert len(places) == (sizes[0] if sizes else 1) * (
            sizes[1] if sizes[1:] else 1
        )


def test_names_of_no_parameter_are_found_nowhere():
    table = Table(FAMILIES["llama"].NAMES, layers=3)
    for name in (
        "model.layers.3.self_attn.q_proj.weight",  # there are three layers
        "model.layers.x.self_attn.q_proj.weight",
        "model.layers.1.self_attn.other.weight",
        "model.layers.1.1.self_attn.q_proj.weight",
        "model.norm.bias",
        "",
    ):
        assert table.find(name) is None
