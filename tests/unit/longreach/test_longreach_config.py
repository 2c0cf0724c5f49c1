"""Configuration: flags win over the environment, which wins over defaults."""

import dataclasses

import pytest

from longreach.config import parse_bytes, read_config, setting
from longreach.errors import InvalidRequest


@dataclasses.dataclass(frozen=True)
class Example:
    """An example service."""

    listen: str = setting("127.0.0.1:0", "Where to answer.")
    memory_limit_bytes: int = setting(1 << 30, "Memory for KV.")
    threads: int = setting(2, "Threads.")
    share: float = setting(0.5, "Share of something.")
    exit_with_parent: bool = setting(False, "End with the parent.")


def read(argv=(), environ=None):
    return read_config(Example, "example", list(argv), environ or {})


def test_without_flags_and_environment_there_are_defaults():
    assert read() == Example()


def test_flags_win_over_the_environment_and_the_environment_over_defaults():
    environ = {"LONGREACH_THREADS": "3", "LONGREACH_LISTEN": "0.0.0.0:1"}
    config = read(["--threads", "4"], environ)
    assert (config.threads, config.listen, config.share) == (4, "0.0.0.0:1", 0.5)


def test_every_kind_of_field_is_parsed():
    config = read(
        ["--memory-limit-bytes", "1.5GiB", "--share", "0.25", "--exit-with-parent", "yes"]
    )
    assert config.memory_limit_bytes == 3 << 29
    assert config.share == 0.25
    assert config.exit_with_parent is True
    assert read(["--exit-with-parent", "off"]).exit_with_parent is False


def test_an_empty_variable_counts_as_set():
    assert read(environ={"LONGREACH_LISTEN": ""}).listen == ""


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--threads", "two"], "threads is 'two', which is not int"),
        (["--exit-with-parent", "maybe"], "write true or false"),
        (["--memory-limit-bytes", "lots"], "512MiB"),
        (["--share", "half"], "not float"),
    ],
)
def test_values_that_cannot_be_read_say_what_to_write(flags, complaint):
    with pytest.raises(InvalidRequest, match=complaint):
        read(flags)


def test_unknown_flags_end_the_program(capsys):
    with pytest.raises(SystemExit):
        read(["--thread-count", "2"])
    assert "--thread-count" in capsys.readouterr().err


def test_help_prints_every_field_with_its_prose_variable_and_default(capsys):
    with pytest.raises(SystemExit):
        read(["--help"])
    text = capsys.readouterr().out
    for field in dataclasses.fields(Example):
        assert "--" + field.name.replace("_", "-") in text
        assert field.metadata["help"] in text
        assert f"LONGREACH_{field.name.upper()}, default {field.default!r}" in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0", 0), ("4096", 4096), ("1KiB", 1024), ("2 GB", 2 * 10**9), ("1.5mib", 3 << 19)],
)
def test_sizes_are_read_in_binary_and_decimal_units(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "GiB", "1XB", "-5MB", "1 2MB"])
def test_sizes_that_are_none_are_refused(text):
    with pytest.raises(InvalidRequest, match="is not a size"):
        parse_bytes(text)
