"""Every field of OffloadConfig on the command line."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import typer
import typer.testing

from ds_offload.cli.config_options import build_config, config_options
from ds_offload.config import OffloadConfig
from ds_offload.errors import InputError

VALUES: dict[str, tuple[str, Any]] = {
    "max_context": ("256k", 262144),
    "token_budget": ("1/8", "1/8"),
    "label_code": ("scalar", "scalar"),
    "label_channels": ("12", 12),
    "label_bits": ("4", 4),
    "sink_tokens": ("8", 8),
    "recent_tokens": ("0", 0),
    "dense_layers": ("1,0", (0, 1)),
    "kv_location": ("gpu", "gpu"),
    "kv_dir": ("some folder", "some folder"),
    "kv_dtype": ("fp16", "fp16"),
    "prefetch": ("exact", "exact"),
    "hot_set": ("1.5", 1.5),
    "gpu_memory": ("2GiB", 2**31),
    "host_memory": ("1GB", 10**9),
    "calibration": ("some file.json", "some file.json"),
    "segment_tokens": ("2k", 2048),
    "monitor": ("widen", "widen"),
    "monitor_every": ("16", 16),
}


def parse(*arguments: str) -> OffloadConfig:
    """The config that a command with these arguments gets."""
    got: list[OffloadConfig] = []

    @config_options
    def command(config: OffloadConfig, file: str = "") -> None:
        got.append(config)

    app = typer.Typer()
    app.command()(command)
    result = typer.testing.CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return got[0]


def test_every_field_is_an_option_of_the_same_spelling() -> None:
    assert set(VALUES) == {field.name for field in dataclasses.fields(OffloadConfig)}
    default = OffloadConfig()
    for name, (text, value) in VALUES.items():
        config = parse("--" + name.replace("_", "-"), text)
        assert getattr(config, name) == value != getattr(default, name)
        assert dataclasses.replace(config, **{name: getattr(default, name)}) == default


def test_nothing_given_is_the_default() -> None:
    assert parse() == OffloadConfig()


def test_all_at_once_beside_the_command_s_own_options() -> None:
    # Files are for K/V on the host.
    together = {name: both for name, both in VALUES.items() if name != "kv_dir"}
    arguments = [part for name, (text, _) in together.items() for part in ("--" + name.replace("_", "-"), text)]
    assert parse(*arguments, "--file", "x") == OffloadConfig(**{name: value for name, (_, value) in together.items()})


def test_ctx_is_max_context() -> None:
    assert parse("--ctx", "64k").max_context == 65536


def test_no_dense_layers() -> None:
    assert parse("--dense-layers", "").dense_layers == ()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("max_context", "256q"),
        ("max_context", "0"),
        ("max_context", "-5"),
        ("token_budget", "0"),
        ("token_budget", "1.5"),
        ("token_budget", "3/2"),
        ("token_budget", "top-p:2"),
        ("label_code", "vector"),
        ("label_channels", "0"),
        ("label_channels", "many"),
        ("label_bits", "3"),
        ("label_bits", "2.0"),
        ("sink_tokens", "-1"),
        ("recent_tokens", "few"),
        ("dense_layers", "a,b"),
        ("dense_layers", "-1"),
        ("kv_location", "disk"),
        ("kv_dtype", "fp8"),
        ("prefetch", "maybe"),
        ("hot_set", "0.5"),
        ("hot_set", "nan"),
        ("hot_set", "large"),
        ("gpu_memory", "24X"),
        ("host_memory", ""),
        ("segment_tokens", "none"),
        ("monitor", "shout"),
        ("monitor_every", "0"),
        ("monitor_every", "often"),
    ],
)
def test_wrong_values_name_field_and_value(name: str, text: str) -> None:
    with pytest.raises(InputError) as caught:
        build_config({name: text})
    assert name in str(caught.value) and text in str(caught.value) and "\n" not in str(caught.value)
