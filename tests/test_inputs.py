"""Files that others wrote: what is no file, no text, no JSON, or of another kind."""

import json
import os
import socket
from pathlib import Path

import pytest

from qlora_jax.errors import CheckpointError, ConfigError
from qlora_jax.inputs import MAX_DEPTH, parse_json, read_bytes, read_json, read_text
from qlora_jax.schema import (
    FINITE,
    FLAG,
    NULL,
    TEXT,
    either,
    listed,
    mapped,
    misfits,
    number,
    pattern_problem,
    shaped,
    whole,
)


def test_what_is_no_regular_file_is_never_opened(tmp_path):
    os.mkfifo(fifo := tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(sock := tmp_path / "sock"))
    (link := tmp_path / "zero").symlink_to("/dev/zero")
    for path, kind in (
        (fifo, "a FIFO"),
        (sock, "a socket"),
        (tmp_path, "a folder"),
        (link, "a device"),
    ):
        with pytest.raises(ConfigError, match=f"{path} is {kind}, expected a file"):
            read_bytes(path, error=ConfigError)


def test_a_file_beyond_the_limit_is_refused_without_reading_it(tmp_path):
    with (tmp_path / "large").open("wb") as stream:
        stream.truncate(1 << 40)  # a hole: it takes no room
    with pytest.raises(
        CheckpointError, match="1099511627776 bytes, expected at most 9"
    ):
        read_bytes(tmp_path / "large", limit=9)
    assert len(read_bytes(Path("/proc/self/status"))) > 0  # whose size is said to be 0


def test_a_link_to_nothing_is_no_absent_file(tmp_path):
    assert read_json(tmp_path / "absent", optional=True) == {}
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "link", optional=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": }', r"is not JSON: .* \(line 1, column 7\)"),
        ('{"a": 1,\n "a": 2}', "has the key 'a' twice in one object"),
        ('{"a": NaN}', "has NaN, which is no number"),
        ('{"a": [-Infinity]}', "has -Infinity, which is no number"),
        ('{"a": 1e999}', "has 1e999, which is no number"),
        ('{"a": ' + "9" * 5000 + "}", "has a number of more digits"),
        ("[" * 200_000, "is not JSON: nested too deeply"),
        ("[" * 200_000 + "]" * 200_000, "is not JSON: nested too deeply"),
        (
            "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1),
            "is nested in more than 100 levels",
        ),
        ('{"a": ["\\ud800b"]}', r"has a text with half of a surrogate pair: \\ud800b"),
        ('{"\\udc00": 1}', r"has a text with half of a surrogate pair: \\udc00"),
        ("[" + "[]," * 1_000_001 + "1]", "has more than 1000000 lists and objects"),
        ("", "is not JSON"),
    ],
)
def test_what_is_no_json_by_the_standard_is_refused(text, message):
    with pytest.raises(CheckpointError, match=f"^here {message}"):
        parse_json(text, "here")


def test_what_is_json_is_read():
    text = '{"a": [1, -2.5e-3, "\\ud83d\\ude00", null, true], "b": {}}'
    assert parse_json(text, "here") == json.loads(text)
    deep = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert parse_json(deep, "here") == json.loads(deep)
    assert parse_json('[NaN, {"a": Infinity}]', "here", strict=False)[1]["a"] > 1e308


def test_text_that_is_no_utf8_is_named_with_its_byte(tmp_path):
    (tmp_path / "a").write_bytes(b"ab\xffc")
    with pytest.raises(CheckpointError, match="a is not UTF-8: byte 2 is 0xff"):
        read_text(tmp_path / "a")


@pytest.mark.parametrize(
    ("kind", "fitting", "others"),
    [
        (whole(1, 9), (1, 9), (0, 10, 1.0, True, "1", None, 10**400)),
        (number(0, 1), (0.5, 1), (0, 0.0, -1, 1.5, True, "x", float("nan"), 1e400)),
        (number(0, 1, least=True), (0, 0.0), (-0.5, float("nan"))),
        (FINITE, (-1e308, 3), (float("inf"), float("nan"), 10**400, False)),
        (FLAG, (True, False), (0, 1, "true", None)),
        (TEXT, ("", "a"), (None, 3, ["a"])),
        (listed(TEXT, 2), ([], ["a"]), ("a", [1], ["a", "b", "c"], {"a": 1})),
        (mapped(FLAG), ({}, {"a": True}), ([], {"a": 1})),
        (either(NULL, TEXT), (None, "a"), (3,)),
        (shaped({"a": TEXT}, ("a",)), ({"a": "b"},), ({}, {"a": None}, {"a": 3}, 3)),
    ],
)
def test_kinds_tell_values_apart(kind, fitting, others):
    assert all(map(kind.fits, fitting))
    assert not any(map(kind.fits, others))


def test_misfits_name_the_place_and_the_value():
    kinds = {
        "size": whole(1, 8),
        "ranks": either(NULL, mapped(whole(1, 8))),
        "tokens": listed(shaped({"content": TEXT}, ("content",))),
    }
    values = {"size": 9, "ranks": {"q": 1, "v": -1}, "tokens": [{"content": 3}], "x": 1}
    assert misfits(values, kinds, ("more",), "it.") == [
        "it.more is missing",
        "it.size is 9, expected a whole number from 1 to 8",
        "it.ranks.v is -1, expected a whole number from 1 to 8",
        "it.tokens[0].content is 3, expected a text",
    ]
    (long,) = misfits({"size": "x" * 10**6}, kinds)
    assert len(long) < 200


@pytest.mark.parametrize(
    ("pattern", "bad"),
    [
        (r".*layers\.\d+\.(self_attn|mlp)\..*(q|k|v)_proj", False),
        (r"(.*\.)?q_proj$", False),
        (r"(?:a\.)*b", False),
        (r"[(|+]*\(a+\)+", False),
        (r"(a+)+b", True),
        (r"(a|a)*b", True),
        (r"((a*)b?)*c", True),
        (r"(?:(?:a|b)c){2,}", True),
        (r"(", True),
        (r"a{99999999999}", True),
        ("(" * 5000 + ")" * 5000, True),
    ],
)
def test_patterns_that_never_end_are_told(pattern, bad):
    assert (pattern_problem(pattern) is not None) == bad
