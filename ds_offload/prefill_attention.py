"""Exact attention of a prompt, by torch's fastest kernels whose memory is linear in the number of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention, can_use_flash_attention
from torch.nn.attention import SDPBackend, sdpa_kernel

from ds_offload.memory.workspace import CHUNK_BYTES
from ds_offload.notices import notice

# cuDNN plans every new shape for itself, which short prompts of ever new lengths do not earn back.
CUDNN_TOKENS = 4096
# A longer prompt is attended to in pieces on a CPU, where no kernel can be interrupted.
CPU_TOKENS = 4096

# Whether cuDNN's kernel failed in this process where torch had said that it takes the inputs.
_cudnn_failed = False


def causal_attention_(
    queries: Tensor, rows: Tensor, scaling: float, attended: Callable[[float], None] | None = None
) -> None:
    """Exact causal attention of a whole prompt; the result takes the queries' place.

    Args:
        queries: `[T, H, D]`; overwritten with the attention output.
        rows: K and V `[Hkv, T, 2, D]`.
        attended: Called now and then, behind a part of the work, with its number of pairs of tokens times heads.
    """
    length, _, head_dim = queries.shape
    attended = attended or _nothing
    if queries.device.type == "cpu" and length > CPU_TOKENS:
        for start in range(0, length, CPU_TOKENS):
            piece = slice(start, min(start + CPU_TOKENS, length))
            earlier = (rows[:, first : first + CPU_TOKENS] for first in range(0, start, CPU_TOKENS))
            piece_attention_(queries[piece], rows[:, piece], earlier, scaling, attended)
        return
    grouped = _by_kv_head(queries, rows.shape[0])
    group = grouped.shape[1]
    # A whole block's output stands beside its queries.
    block = max(1, CHUNK_BYTES // (group * length * head_dim * queries.element_size()))
    for first in range(0, len(rows), block):
        part = slice(first, first + block)
        grouped[part] = _causal(grouped[part], rows[part, :, 0], rows[part, :, 1], scaling)
        attended(len(rows[part]) * group * length * length / 2)


def piece_attention_(
    queries: Tensor,
    rows: Tensor,
    earlier: Iterable[Tensor],
    scaling: float,
    attended: Callable[[float], None] | None = None,
) -> None:
    """Exact causal attention of a piece of a prompt and all tokens before it; the result takes the queries' place.

    The attention over each block is a softmax of its own; they are put together in float32
    by their log-sum-exp (as in FlashAttention, arXiv 2205.14135, section 3.1).

    Args:
        queries: `[n, H, D]`; overwritten with the attention output.
        rows: K and V `[Hkv, n, 2, D]` of the same tokens.
        earlier: Blocks `[Hkv, m, 2, D]` of the tokens before, in any order and of any float dtype.
            A block is done with when the next one is asked for.
        attended: As for `causal_attention_`.
    """
    length, heads, _ = queries.shape
    attended = attended or _nothing
    grouped = _by_kv_head(queries, rows.shape[0])
    part, total_lse = attention_with_lse(grouped, rows[:, :, 0], rows[:, :, 1], scaling, causal=True)
    attended(heads * length * length / 2)
    total = part.float()
    for block in earlier:
        taken = block.to(queries.dtype)
        part, lse = attention_with_lse(grouped, taken[:, :, 0], taken[:, :, 1], scaling, causal=False)
        merge_(total, total_lse, part, lse)
        attended(heads * length * block.shape[1])
    grouped.copy_(total)


def merge_(total: Tensor, total_lse: Tensor, part: Tensor, lse: Tensor) -> None:
    """Add the attention over further tokens to `total` `[Hkv, G, n, D]` and `total_lse` `[Hkv, G, n]`, both float32."""
    total.lerp_(part.float(), torch.sigmoid(lse - total_lse)[..., None])
    torch.logaddexp(total_lse, lse, out=total_lse)


def attention_with_lse(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, *, causal: bool
) -> tuple[Tensor, Tensor]:
    """Attention `[Hkv, G, n, D]` and the log-sum-exp of its scores `[Hkv, G, n]` float32.

    Args:
        query: `[Hkv, G, n, D]`, the G query heads of a KV head together.
        key, value: `[Hkv, m, D]` of the same dtype.
        causal: Token i sees no token beyond i; m = n then.
    """
    shared = _shared(query, key, value)
    if query.device.type == "cpu":
        cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return _with_lse(cpu(*shared, 0.0, causal, scale=scaling), query)
    flat = _flat(query, key, value)
    backend = _backend(*flat, causal)
    if backend is SDPBackend.CUDNN_ATTENTION:
        cudnn = torch.ops.aten._scaled_dot_product_cudnn_attention
        try:
            return _with_lse(cudnn(*flat, None, True, 0.0, causal, False, scale=scaling), query)
        except RuntimeError as error:
            _give_up_cudnn(error)
        backend = _backend(*flat, causal)
    if backend is SDPBackend.FLASH_ATTENTION:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return _with_lse(flash(*flat, 0.0, causal, False, scale=scaling), query)
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    return _with_lse(efficient(*shared, None, True, 0.0, causal, scale=scaling), query)


def attention_with_lse_reference(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, *, causal: bool
) -> tuple[Tensor, Tensor]:
    """`attention_with_lse` in float32, with all scores at once."""
    scores = query.float() @ key[:, None].float().transpose(-1, -2) * scaling
    if causal:
        ahead = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).triu(1)
        scores = scores.masked_fill(ahead, -torch.inf)
    return (scores.softmax(-1) @ value[:, None].float()).to(query.dtype), scores.logsumexp(-1)


def _causal(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Causal attention `[Hkv, G, T, D]` of a prompt; see `attention_with_lse`."""
    if query.device.type == "cpu":
        return F.scaled_dot_product_attention(*_shared(query, key, value), is_causal=True, scale=scaling)
    backend = _backend(*_flat(query, key, value), True)
    try:
        return _sdpa(backend, query, key, value, scaling)
    except RuntimeError as error:
        if backend is not SDPBackend.CUDNN_ATTENTION:
            raise
        _give_up_cudnn(error)
    return _sdpa(_backend(*_flat(query, key, value), True), query, key, value, scaling)


def _sdpa(backend: SDPBackend, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """By one of torch's kernels, and by no other: never by the one with a tensor T x T."""
    efficient = backend is SDPBackend.EFFICIENT_ATTENTION
    given = _shared(query, key, value) if efficient else _flat(query, key, value)
    grouped = not efficient and query.shape[1] > 1
    with sdpa_kernel([backend]):
        out = F.scaled_dot_product_attention(*given, is_causal=True, scale=scaling, enable_gqa=grouped)
    return out if efficient else out[0].unflatten(0, query.shape[:2])


def _backend(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> SDPBackend:
    """The first of cuDNN's, FlashAttention's and the memory-efficient kernel that takes these inputs."""
    asked = SDPAParams(query, key, value, None, 0.0, causal, query.shape[1] != key.shape[1])
    if query.shape[2] >= CUDNN_TOKENS and not _cudnn_failed and can_use_cudnn_attention(asked):
        return SDPBackend.CUDNN_ATTENTION
    return SDPBackend.FLASH_ATTENTION if can_use_flash_attention(asked) else SDPBackend.EFFICIENT_ATTENTION


def _give_up_cudnn(error: RuntimeError) -> None:
    """Go on without cuDNN in this process, and say so; an error of memory is raised again."""
    global _cudnn_failed
    if isinstance(error, torch.OutOfMemoryError):
        raise error
    _cudnn_failed = True
    notice(f"cuDNN's attention failed ({str(error).splitlines()[0]}): the prefill goes on with a slower kernel")


def _by_kv_head(queries: Tensor, kv_heads: int) -> Tensor:
    """`[T, H, D]` as `[Hkv, G, T, D]`, the same memory."""
    return queries.unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)


def _flat(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`[1, H, n, D]` and `[1, Hkv, m, D]`, for kernels that know that query heads share a KV head."""
    return query.flatten(0, 1)[None], key[None], value[None]


def _shared(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All `[Hkv, G, ., D]`, for kernels that do not: K and V are seen G times and lie there once."""
    seen = (-1, query.shape[1], -1, -1)
    return query, key[:, None].expand(seen), value[:, None].expand(seen)


def _with_lse(result: tuple[Tensor, ...], query: Tensor) -> tuple[Tensor, Tensor]:
    """An operator's attention and log-sum-exp, the latter without padding, in the query's shape."""
    out, lse = result[:2]
    lse = lse.reshape(*lse.shape[:2], -1)[..., : query.shape[2]].float()
    if out.shape == query.shape:
        return out, lse
    return out[0].unflatten(0, query.shape[:2]), lse[0].unflatten(0, query.shape[:2])


def _nothing(done: float) -> None:
    pass
