"""Channel files of Double Sparsity's reference implementation, as channel rankings.

The file is JSON: for every layer i the keys `model.layers.{i}.self_attn.q_proj`,
`.k_proj` and `.qk_proj` (one of them is enough), each a list per head of channel
numbers, the most important first.
"""

from __future__ import annotations

import json
import re
from typing import Any

import torch
from torch import Tensor

from ds_offload.errors import LoadError

PROJECTIONS = ("qk", "k", "q")
"""What a ranking can be made on, the preferred first."""

_KEY = re.compile(r"model\.layers\.(\d{1,9})\.self_attn\.(q|k|qk)_proj")


def looks_like_json(data: bytes) -> bool:
    """Whether a file with this content is meant as JSON; safetensors begin with a binary length."""
    return data.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in (b"{", b"[") and b"\0" not in data[:64]


def parse_reference_channels(
    data: bytes,
    name: str,
    *,
    layers: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    projection: str | None = None,
) -> tuple[Tensor, str]:
    """The ranking in a channel file of the reference implementation.

    A layer's lists stand per KV head or per query head. In the second case the lists of
    a KV head's query heads become one by Borda count: the channel with the smallest sum
    of ranks first, ties by channel number. A list may name only the first channels: the
    others share the mean of the ranks left, so they follow in number order.

    Args:
        data: The file's content.
        name: What errors call the file.
        layers, heads, kv_heads, head_dim: The model's shape.
        projection: "qk", "k" or "q"; None takes the first of them that the file has.

    Returns:
        Channel numbers `[L, Hkv, D]` int64 on the CPU, the most important first; and the
        projection they come from.

    Raises:
        LoadError: Not such a file, or one of another model, naming the key.
    """
    content = _parse_json(data, name)
    found = {(int(match[1]), match[2]) for match in map(_KEY.fullmatch, content) if match}
    if not found:
        raise LoadError(f"{name} is JSON, but no channel file: it has no key like model.layers.0.self_attn.qk_proj")
    beyond = next(((layer, kind) for layer, kind in sorted(found) if layer >= layers), None)
    if beyond is not None:
        raise LoadError(
            f"{name} has {_key(*beyond)}, but this model has layers 0 to {layers - 1}; it is another model's"
        )
    if projection is None:
        projection = next(kind for kind in PROJECTIONS if any(kind == other for _, other in found))
    ranks = []
    for layer in range(layers):
        key = _key(layer, projection)
        if key not in content:
            raise LoadError(f"{name} has no {key}; it must have one for each of the model's {layers} layers")
        lists = content[key]
        allowed = {heads} if projection == "q" else {heads, kv_heads}
        if not isinstance(lists, list) or len(lists) not in allowed:
            seen = f"{len(lists)} lists" if isinstance(lists, list) else "no lists"
            needed = " or ".join(map(str, sorted(allowed)))
            raise LoadError(f"{name}: {key} has {seen}, but this model has {needed} heads; it is another model's")
        per_head = torch.stack([_ranks(entry, head_dim, f"{name}: {key}[{n}]") for n, entry in enumerate(lists)])
        ranks.append(per_head.view(kv_heads, -1, head_dim).sum(1))
    return torch.stack(ranks).sort(dim=-1, stable=True).indices, projection


def _key(layer: int, projection: str) -> str:
    return f"model.layers.{layer}.self_attn.{projection}_proj"


def _parse_json(data: bytes, name: str) -> dict[str, Any]:
    try:
        content = json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise LoadError(f"{name} is not a text file, so no JSON; give a calibration file or a channel file") from None
    except json.JSONDecodeError as error:
        raise LoadError(f"{name} is not JSON, or is cut short: {error.msg} at line {error.lineno}") from None
    except (RecursionError, ValueError):
        raise LoadError(f"{name} is JSON, but no channel file") from None
    if not isinstance(content, dict):
        raise LoadError(f"{name} is JSON, but no channel file: it must be an object with a key per layer")
    return content


def _ranks(channels: Any, head_dim: int, where: str) -> Tensor:
    """Rank of each channel `[D]` float64 in one head's list, the most important at 0."""
    if not isinstance(channels, list) or not channels:
        raise LoadError(f"{where} must be a list of channel numbers, the most important first")
    for channel in channels:
        if isinstance(channel, bool) or not isinstance(channel, int) or not 0 <= channel < head_dim:
            raise LoadError(f"{where} has {channel!r:.40}, which is no channel; it must be 0 to {head_dim - 1}")
    if len(set(channels)) != len(channels):
        twice = next(c for n, c in enumerate(channels) if c in channels[:n])
        raise LoadError(f"{where} names channel {twice} twice; each channel has one rank")
    ranks = torch.full((head_dim,), (len(channels) + head_dim - 1) / 2, dtype=torch.float64)
    ranks[torch.tensor(channels)] = torch.arange(len(channels), dtype=torch.float64)
    return ranks
