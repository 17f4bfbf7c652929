"""Calibration: what the labels of keys are made by, per layer and KV head: product codes, and channels in order.

A channel's importance is the mean of |q_i[c] * k_j[c]| over all pairs of tokens of a
text, q and k after their norms and RoPE, summed over the query heads of the KV head
(Double Sparsity, arXiv 2408.07092). Over all pairs that is mean|q[c]| * mean|k[c]|.

Product codes (ds_offload/codebooks.py) are fitted to keys and queries as they would be
at any position the model was trained for. RoPE turns the slow pairs of a key as far as
it stands in the context: words fitted to the first 2K positions alone captured 0.80 of
the attention at 8K where these capture 0.94.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_offload.cache_folder import cache_folder
from ds_offload.calibration_file import REMEDY, Calibration, read_calibration_file
from ds_offload.calibration_text import DEFAULT_TOKENS, SHIPPED_TEXT, shipped_text, text_ids
from ds_offload.codebooks import CodeSample, has_parts, stack_codes
from ds_offload.errors import InputError, LoadError
from ds_offload.kernels.product_code import ProductCode
from ds_offload.label_mass import LEAST_TOKENS, asking, label_mass
from ds_offload.notices import notice
from ds_offload.reference_channels import looks_like_json, parse_reference_channels

if TYPE_CHECKING:
    from ds_offload.decoder import DecoderStack
    from ds_offload.loading import LoadedModel

__all__ = [
    "SHIPPED_TEXT",
    "Calibration",
    "cached_calibration",
    "calibrate",
    "calibrate_loaded",
    "find_or_make_calibration",
    "shipped_text",
    "text_ids",
]

Progress = Callable[[int, int], None]

BLOCK = 2048
SPAN = 8192
DUMMY_TOKENS = 2048


@torch.no_grad()
def calibrate(
    decoder: DecoderStack,
    token_ids: Sequence[int] | Tensor,
    *,
    fingerprint: str,
    text: str,
    block: int = BLOCK,
    span: int = SPAN,
    on_progress: Progress | None = None,
) -> Calibration:
    """Run a text through the model: rank every layer's and KV head's channels, and fit its code.

    The text goes through dense causal attention in blocks, each a context of its own;
    sums run in float64 over all of them. One layer after the other: held are the hidden
    states of the text, one block's activations of a layer, and at most `MOST_KEYS` of its keys.
    For the codes each token's query and key are taken at a position of its own, drawn from `span`.

    Args:
        decoder: The model.
        token_ids: Token ids `[N]` of the text, at least one.
        fingerprint: The model's.
        text: What to call the text.
        block: Most tokens of one context; no more than the model was trained for.
        span: Positions that codes are fitted for, from 0: those the model was trained for.
        on_progress: Called with passes through a layer done, and all of them.

    Raises:
        InputError: No tokens.
        LoadError: The model's own activations are not finite.
    """
    ids = torch.as_tensor(token_ids, dtype=torch.int64, device=decoder.device)
    if ids.ndim != 1 or not len(ids):
        raise InputError("calibration got no tokens; give a text with at least one")
    blocks = ids.split(block)
    query_sum = torch.zeros(decoder.layers, decoder.heads, decoder.head_dim, dtype=torch.float64, device=decoder.device)
    key_sum = query_sum.new_zeros(decoder.layers, decoder.kv_heads, decoder.head_dim)
    key_total, key_squares, query_squares = (torch.zeros_like(key_sum) for _ in range(3))
    generator = torch.Generator().manual_seed(0)
    ropes = []
    for chunk in blocks:
        scattered = torch.randint(span, (len(chunk),), generator=generator)
        positions = scattered, torch.arange(len(chunk))
        ropes.append([decoder.rotary(each.to(decoder.device)) for each in positions])
    codes: list[ProductCode] = []
    masses: list[Tensor] = []
    hiddens = [decoder.embed(chunk) for chunk in blocks]
    for layer in range(decoder.layers):
        sample = CodeSample(decoder.kv_heads, decoder.head_dim, len(ids), decoder.device)
        for number, hidden in enumerate(hiddens):
            anywhere, rope = ropes[number]
            sample.add(*decoder.project_qkv(layer, hidden, anywhere)[:2])
            query, key, value = decoder.project_qkv(layer, hidden, rope)
            query_sum[layer] += query.abs().sum(0, dtype=torch.float64)
            key_sum[layer] += key.abs().sum(0, dtype=torch.float64)
            key_total[layer] += key.sum(0, dtype=torch.float64)
            key_squares[layer] += key.double().square().sum(0)
            query_squares[layer] += query.double().square().sum(0).unflatten(0, (decoder.kv_heads, -1)).sum(1)
            hiddens[number] = decoder.finish_layer(layer, hidden, _attention(query, key, value, decoder.scaling))
            if number == 0:
                first = query[asking(len(hidden)).to(query.device)], key
            if on_progress is not None:
                on_progress(layer * len(blocks) + number + 1, len(blocks) * decoder.layers)
        if not (key_squares[layer].isfinite().all() and query_squares[layer].isfinite().all()):
            raise LoadError(
                f"calibration met values that are not finite in {str(decoder.dtype).removeprefix('torch.')}; "
                "the weights are damaged, or need a wider dtype such as --dtype fp32"
            )
        if has_parts(decoder.head_dim):
            codes.append(sample.fit())
            if len(blocks[0]) >= LEAST_TOKENS:
                judged = sample.fit_to_others() if len(blocks) > 1 else codes[-1]
                masses.append(label_mass(*first, judged, decoder.scaling))
    importance = query_sum.unflatten(1, (decoder.kv_heads, -1)).sum(2) * key_sum / len(ids) ** 2
    factor = _key_factor(key_squares, query_squares)
    fitted = stack_codes(codes) if codes else None
    about: dict[str, Any] = {"fingerprint": fingerprint, "tokens": len(ids), "text": text}
    mass = torch.stack(masses) if masses else None
    return Calibration.rank(importance, key_total / len(ids), factor, fitted, mass, **about)


def _key_factor(key_squares: Tensor, query_squares: Tensor) -> Tensor:
    """What to divide the channels of keys by, `[L, Hkv, D]`, given sums of squares of keys and of their queries.

    The root of a channel's size over its queries' size, as in SmoothQuant (arXiv 2211.10438):
    one step for all channels of a row then takes neither large keys nor large queries for
    more than their product. Channels that RoPE turns together share it: so it is the same
    at every position. 1 where one of them is always zero.
    """
    ratio = (key_squares + key_squares.roll(key_squares.shape[-1] // 2, -1)) / (
        query_squares + query_squares.roll(query_squares.shape[-1] // 2, -1)
    )
    return torch.where(ratio.isfinite() & (ratio > 0), ratio, 1.0) ** 0.25


def _attention(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Causal attention `[N, H * D]` of one context, q `[N, H, D]`, k and v `[N, Hkv, D]`."""
    groups = query.shape[1] // key.shape[1]
    # Repeated rather than enable_gqa: that takes the T x T path for float32 on CUDA.
    key, value = (rows.repeat_interleave(groups, dim=1) for rows in (key, value))
    query, key, value = (rows.transpose(0, 1)[None] for rows in (query, key, value))
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    return out[0].transpose(0, 1).flatten(1)


def calibrate_loaded(
    loaded: LoadedModel,
    decoder: DecoderStack,
    ids: Sequence[int],
    text: str,
    on_progress: Progress | None = None,
) -> Calibration:
    """`calibrate` for a loaded model, in blocks no longer than it was trained for, with notices on the way."""
    notice(f"calibrating {loaded.source.name} on {len(ids):,} tokens of {text}")
    started = time.monotonic()
    made = calibrate(
        decoder,
        ids,
        fingerprint=loaded.fingerprint,
        text=text,
        block=min(BLOCK, loaded.source.shape.trained_context),
        span=loaded.source.shape.trained_context,
        on_progress=on_progress or _slow_progress(),
    )
    notice(f"calibrated in {time.monotonic() - started:.1f} s")
    return made


def find_or_make_calibration(
    loaded: LoadedModel,
    decoder: DecoderStack,
    path: str | None,
    prompt_ids: Sequence[int] | None = None,
) -> Calibration:
    """The calibration in `path`, else the one in the cache folder, else one made now.

    A model with a tokenizer is calibrated on the shipped text, once, and the file kept in
    the cache folder. Dummy weights are calibrated on it each time, in memory. A model
    without a tokenizer is calibrated on `prompt_ids`, in memory.

    Args:
        loaded: The model and its tokenizer.
        decoder: The same model's layers.
        path: A file of `Calibration.save`, or the reference implementation's channels.
        prompt_ids: Token ids of the prompt.

    Raises:
        LoadError: `path` is not to be had or not to be trusted.
        InputError: There is neither a file nor a tokenizer nor a prompt.
    """
    if path is not None:
        return _load_any(os.path.expanduser(path), loaded, decoder)
    if loaded.tokenizer is None:
        if not prompt_ids:
            raise InputError(
                f"{loaded.source.name} has no tokenizer to calibrate with; give a prompt of token ids, "
                "a calibration file, or put tokenizer.json into its folder"
            )
        return calibrate_loaded(loaded, decoder, prompt_ids[:DEFAULT_TOKENS], "the prompt")
    if loaded.source.load_format == "dummy":
        ids = text_ids(loaded, shipped_text(), DUMMY_TOKENS)
        return calibrate_loaded(loaded, decoder, ids, SHIPPED_TEXT)
    cached = cached_calibration(loaded.fingerprint)
    if os.path.exists(cached):
        try:
            found = _matching(Calibration.load(cached, loaded.fingerprint), str(cached), decoder)
            # Contexts of a few hundred tokens say nothing of a selection.
            measured = min(BLOCK, loaded.source.shape.trained_context) >= LEAST_TOKENS
            wanted = found.label_mass if measured else found.codes
            if wanted is not None or not has_parts(decoder.head_dim):
                return found
            notice(f"{cached} is of an older version; making it again")
        except LoadError as error:
            notice(f"{str(error).removesuffix(f'; {REMEDY}')}; making it again")
    made = calibrate_loaded(loaded, decoder, text_ids(loaded, shipped_text()), SHIPPED_TEXT)
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        made.save(cached)
    except (OSError, InputError) as error:
        notice(f"the calibration is not kept for next time: {error}")
    return made


def cached_calibration(fingerprint: str) -> Path:
    """Where the calibration of the model with `fingerprint` is kept."""
    return cache_folder() / "calibration" / f"{fingerprint}.safetensors"


def _slow_progress() -> Progress:
    """Progress as a notice every ten seconds: nothing where calibration is quick."""
    last = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= 10:
            last = time.monotonic()
            notice(f"calibrating: {100 * done // total} %")

    return report


def _load_any(path: str, loaded: LoadedModel, decoder: DecoderStack) -> Calibration:
    data = read_calibration_file(path)
    if not (path.lower().endswith(".json") or looks_like_json(data)):
        return _matching(Calibration.parse(data, path, loaded.fingerprint), path, decoder)
    channels, projection = parse_reference_channels(
        data,
        path,
        layers=decoder.layers,
        heads=decoder.heads,
        kv_heads=decoder.kv_heads,
        head_dim=decoder.head_dim,
    )
    notice(
        f"channels from {path} ({projection}_proj); the file does not say which model it was made for, "
        "so that cannot be checked"
    )
    ranks = channels.argsort(dim=-1)
    return Calibration.rank(
        (decoder.head_dim - ranks).float(),
        torch.zeros(channels.shape),
        fingerprint=loaded.fingerprint,
        tokens=0,
        text=f"{Path(path).name} ({projection}_proj)",
    )


def _matching(calibration: Calibration, name: str, decoder: DecoderStack) -> Calibration:
    needed = (decoder.layers, decoder.kv_heads, decoder.head_dim)
    seen = tuple(calibration.channels.shape)
    if seen != needed:
        raise LoadError(
            f"{name} has {seen[0]} layers x {seen[1]} KV heads x {seen[2]} channels, "
            f"but this model has {needed[0]} x {needed[1]} x {needed[2]}; {REMEDY}"
        )
    return calibration
