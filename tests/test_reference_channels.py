"""The reference implementation's channel files: both head counts, short lists, and everything that is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ds_offload.errors import LoadError
from ds_offload.reference_channels import looks_like_json, parse_reference_channels

LAYERS, HEADS, KV_HEADS, HEAD_DIM = 3, 4, 2, 6


def key(layer: int, projection: str = "qk") -> str:
    return f"model.layers.{layer}.self_attn.{projection}_proj"


def rankings(heads: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randperm(HEAD_DIM, generator=generator).tolist() for _ in range(heads)]


def channel_file(heads: int, *projections: str) -> dict[str, Any]:
    return {key(n, p): rankings(heads, 10 * n + len(p)) for n in range(LAYERS) for p in projections or ("qk",)}


def parse(content: Any, **changes: Any) -> tuple[list[list[list[int]]], str]:
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    shape = {"layers": LAYERS, "heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM}
    channels, projection = parse_reference_channels(data, "F", **shape | changes)
    assert channels.dtype == torch.int64
    return channels.tolist(), projection


def test_lists_per_kv_head_are_taken_as_they_are() -> None:
    content = channel_file(KV_HEADS)
    assert parse(content) == ([content[key(n)] for n in range(LAYERS)], "qk")


def test_lists_per_head_are_taken_as_they_are_without_groups() -> None:
    content = channel_file(HEADS, "q")
    assert parse(content, kv_heads=HEADS) == ([content[key(n, "q")] for n in range(LAYERS)], "q")


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("projection", ["q", "k", "qk"])
def test_lists_per_query_head_are_combined_by_borda_count(kv_heads: int, projection: str) -> None:
    content = channel_file(HEADS, projection)
    channels, _ = parse(content, kv_heads=kv_heads)
    groups = HEADS // kv_heads
    for layer in range(LAYERS):
        lists = content[key(layer, projection)]
        for head in range(kv_heads):
            group = lists[head * groups : (head + 1) * groups]
            assert channels[layer][head] == sorted(range(HEAD_DIM), key=lambda c: (sum(r.index(c) for r in group), c))


def test_borda_count_by_hand() -> None:
    lists = [[5, 4, 3, 2, 1, 0], [0, 1, 2, 3, 4, 5], [3, 0, 1, 2, 4, 5], [3, 1, 0, 2, 4, 5]]
    channels, _ = parse({key(0): lists}, layers=1)
    assert channels == [[[0, 1, 2, 3, 4, 5], [3, 0, 1, 2, 4, 5]]]


def test_short_lists_are_completed_in_number_order() -> None:
    channels, _ = parse({key(0): [[4, 2], [5]]}, layers=1)
    assert channels == [[[4, 2, 0, 1, 3, 5], [5, 0, 1, 2, 3, 4]]]


def test_channels_that_a_short_list_leaves_out_share_the_mean_of_the_ranks_left() -> None:
    # The first list leaves out five channels: rank (1 + 2 + 3 + 4 + 5) / 5 = 3 each.
    # Sums: channel 0 has 3, 1 has 4, 2 has 5, 3 has 5, 4 has 6, 5 has 7.
    channels, _ = parse({key(0): [[2], [0, 1, 3, 4, 5, 2]]}, layers=1, heads=2, kv_heads=1)
    assert channels == [[[0, 1, 2, 3, 4, 5]]]
    # Channel 5 is first in one list, channel 1 second: the number does not decide.
    channels, _ = parse({key(0): [[5, 1], [4, 3]]}, layers=1, heads=2, kv_heads=1)
    assert channels == [[[4, 5, 1, 3, 0, 2]]]


def test_the_preferred_projection_and_the_chosen_one() -> None:
    content = channel_file(KV_HEADS, "k", "qk")
    assert parse(content)[1] == "qk"
    assert parse(content, projection="k") == ([content[key(n, "k")] for n in range(LAYERS)], "k")
    assert parse(channel_file(HEADS, "q", "k"), heads=HEADS)[1] == "k"
    with pytest.raises(LoadError, match=r"F has no model\.layers\.0\.self_attn\.q_proj"):
        parse(content, projection="q")


def test_other_keys_and_a_byte_order_mark_do_no_harm() -> None:
    content = channel_file(KV_HEADS)
    data = b"\xef\xbb\xbf  " + json.dumps(content | {"lm_head": [1], "model.layers.7.mlp": 2}).encode()
    assert parse(data) == parse(content)


def without_layer(content: dict[str, Any]) -> None:
    del content[key(1)]


def another_layer(content: dict[str, Any]) -> None:
    content[key(3)] = content[key(0)]


def change(path: tuple[int, ...], value: Any) -> Callable[[dict[str, Any]], None]:
    def apply(content: dict[str, Any]) -> None:
        entry: Any = content
        for step in (key(2), *path[:-1]):
            entry = entry[step]
        entry[path[-1]] = value

    return apply


def whole(value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content.__setitem__(key(2), value)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            without_layer,
            r"F has no model.layers.1.self_attn.qk_proj; it must have one for each of .* 3 layers",
        ),
        (
            another_layer,
            r"F has model.layers.3.self_attn.qk_proj, but this model has layers 0 to 2",
        ),
        (whole([[0, 1]] * 3), r"F: model.layers.2.self_attn.qk_proj has 3 lists, but this model has 2 or 4 heads"),
        (whole([]), r"model.layers.2.self_attn.qk_proj has 0 lists"),
        (whole("0 1 2"), r"model.layers.2.self_attn.qk_proj has no lists"),
        (whole({"0": [1]}), r"model.layers.2.self_attn.qk_proj has no lists"),
        (change((1,), []), r"model.layers.2.self_attn.qk_proj\[1\] must be a list of channel numbers"),
        (change((1,), 4), r"model.layers.2.self_attn.qk_proj\[1\] must be a list of channel numbers"),
        (change((1, 3), 6), r"model.layers.2.self_attn.qk_proj\[1\] has 6, which is no channel; it must be 0 to 5"),
        (change((0, 0), -1), r"model.layers.2.self_attn.qk_proj\[0\] has -1, which is no channel"),
        (change((0, 0), 10**400), r"model.layers.2.self_attn.qk_proj\[0\] has 1000"),
        (change((0, 0), 1.0), r"model.layers.2.self_attn.qk_proj\[0\] has 1.0, which is no channel"),
        (change((0, 0), True), r"model.layers.2.self_attn.qk_proj\[0\] has True, which is no channel"),
        (change((0, 0), None), r"model.layers.2.self_attn.qk_proj\[0\] has None, which is no channel"),
        (change((0,), [3, 2, 3]), r"model.layers.2.self_attn.qk_proj\[0\] names channel 3 twice"),
    ],
)
def test_wrong_files_are_refused_by_key(spoil: Callable[[dict[str, Any]], None], message: str) -> None:
    content = channel_file(KV_HEADS)
    parse(content)
    spoil(content)
    with pytest.raises(LoadError, match=message) as caught:
        parse(content)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 250


def test_a_q_ranking_must_have_every_query_head() -> None:
    with pytest.raises(LoadError, match="q_proj has 2 lists, but this model has 4 heads"):
        parse(channel_file(KV_HEADS, "q"))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "F is not JSON, or is cut short"),
        (b"Call me Ishmael.", "F is not JSON, or is cut short"),
        (b"\xff\xfe\x00", "F is not a text file"),
        (b"[1, 2]", "must be an object with a key per layer"),
        (b"{}", "it has no key like model.layers.0.self_attn.qk_proj"),
        (b'{"model.layers.0.self_attn.o_proj": [[0]]}', "it has no key like"),
        (b'{"model.layers.9999999999.self_attn.q_proj": [[0]]}', "it has no key like"),
        (b"[" * 200_000, "F is JSON, but no channel file|F is not JSON"),
        (b'{"a": ' + b"1" * 5000 + b"}", "F is JSON, but no channel file"),
    ],
)
def test_files_of_another_kind_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(LoadError, match=message) as caught:
        parse(data)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_truncated_files_are_refused(share: float) -> None:
    data = json.dumps(channel_file(KV_HEADS)).encode()
    with pytest.raises(LoadError, match="cut short"):
        parse(data[: int(share * len(data))])


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b'{"model.layers.0', True),
        (b" \n {", True),
        (b"\xef\xbb\xbf{}", True),
        (b"[1]", True),
        (b"", False),
        (b"Call me Ishmael.", False),
        (b"\x7b\x01\x00\x00\x00\x00\x00\x00" + b'{"__metadata__":{}', False),
        (b"\x98\x00\x00\x00\x00\x00\x00\x00" + b'{"__metadata__":{}', False),
    ],
)
def test_json_is_told_from_safetensors(data: bytes, expected: bool) -> None:
    assert looks_like_json(data) is expected
