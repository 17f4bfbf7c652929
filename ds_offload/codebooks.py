"""Product codes fitted to a model's keys and queries: the basis, the parts and their words."""

from __future__ import annotations

import torch
from torch import Tensor

from ds_offload.kernels.product_code import PART, WORDS, ProductCode, ProductLayout

# Keys of a KV head that words are fitted to.
MOST_KEYS = 4096
_ROUNDS = 6
_SEED = 0
# Directions of queries below this share of the strongest one's power count as if they had it.
_LEAST_POWER = 1e-6
# Parts fitted at a time: their distances to all words stay within 16 MiB.
_PARTS_AT_A_TIME = 64


def has_parts(head_dim: int) -> bool:
    """Whether heads of this size can be cut into parts."""
    return head_dim % PART == 0


class CodeSample:
    """Keys and queries of one layer, on the way to its code.

    Args:
        kv_heads, head_dim: The model's.
        tokens: How many will be added: of more than `MOST_KEYS`, keys are taken at even distances.
        device: Where they are.
    """

    def __init__(self, kv_heads: int, head_dim: int, tokens: int, device: torch.device) -> None:
        self._kv_heads = kv_heads
        self._stride = -(-tokens // MOST_KEYS)
        self._keys: list[Tensor] = []
        self._powers = torch.zeros(kv_heads, head_dim, head_dim, dtype=torch.float64, device=device)

    def add(self, query: Tensor, key: Tensor) -> None:
        """Take in queries `[N, H, D]` and keys `[N, Hkv, D]` at the positions they may be met at."""
        self._keys.append(key[:: self._stride].transpose(0, 1))
        of_group = query.float().unflatten(1, (self._kv_heads, -1)).transpose(0, 1).flatten(1, 2)
        self._powers += of_group.mT @ of_group

    def fit(self) -> ProductCode:
        """The layer's code."""
        return fit_codes(torch.cat(self._keys, 1), self._powers)

    def fit_to_others(self) -> ProductCode:
        """A code that has not seen the keys of the first of several `add`s, to be judged by them."""
        return fit_codes(torch.cat(self._keys[1:], 1), self._powers)


def fit_codes(keys: Tensor, powers: Tensor) -> ProductCode:
    """The code of one layer's KV heads. The same keys and powers always give the same code on a device.

    With S = E[q qT] of a KV head's queries, the error of scores is that of S^(1/2) k: so
    the axes are the principal ones of S^(1/2) (k - mean), in which a squared distance is
    the expected square of a score's error. Axes go to parts of four such that the products
    of their variances are alike, and each part gets 16 words by k-means.

    Args:
        keys: [Hkv, N, D] float, at the positions they may be met at.
        powers: S, [Hkv, D, D] float64, up to a factor.

    Returns:
        The code, float32 on the keys' device.
    """
    kv_heads, _, dim = keys.shape
    layout = ProductLayout(dim)
    mean = keys.mean(1, dtype=torch.float64)
    centred = keys.float() - mean.float()[:, None]
    # Small, and on the CPU the same on every machine.
    spread = (centred.mT @ centred / keys.shape[1]).double().cpu()
    power, directions = torch.linalg.eigh(powers.cpu())
    power = power.clamp(min=max(_LEAST_POWER * power.max().item(), 1e-30)).sqrt()[:, None]
    root, inverse = ((directions * scale) @ directions.mT for scale in (power, 1 / power))
    variances, axes = torch.linalg.eigh(root @ spread @ root)
    axes = axes.gather(-1, _parts(variances, layout)[:, None].expand(-1, dim, -1))
    basis, turn = root @ axes, axes.mT @ inverse
    on_device = {"dtype": torch.float32, "device": keys.device}
    basis, turn = (value.to(**on_device).contiguous() for value in (basis, turn))
    points = (centred @ basis).unflatten(-1, (layout.parts, PART)).transpose(1, 2).flatten(0, 1)
    words = torch.cat([_words(some) for some in points.split(_PARTS_AT_A_TIME)])
    return ProductCode(mean.float(), basis, turn, words.view(kv_heads, layout.parts, WORDS, PART))


def stack_codes(layers: list[ProductCode]) -> ProductCode:
    """The codes of all layers, on the CPU."""
    of_each = zip(*(layer.tensors() for layer in layers), strict=True)
    return ProductCode(*(torch.stack(tensors).cpu() for tensors in of_each))


def random_codes(layers: int, kv_heads: int, head_dim: int) -> ProductCode:
    """Words of nothing, for weights that mean nothing."""
    generator = torch.Generator().manual_seed(_SEED)
    axes = torch.eye(head_dim).repeat(layers, kv_heads, 1, 1)
    words = torch.randn(layers, kv_heads, head_dim // PART, WORDS, PART, generator=generator)
    return ProductCode(torch.zeros(layers, kv_heads, head_dim), axes, axes.clone(), words)


def _parts(variances: Tensor, layout: ProductLayout) -> Tensor:
    """The axes [Hkv, D] int64 in the order of their parts, given ascending variances [Hkv, D].

    From the widest axis on, each goes to the part whose product of variances is least so far.
    """
    logs = (variances / variances[:, -1:].clamp(min=1e-300)).clamp(min=1e-12).log()
    # Above zero: so every axis counts.
    logs = logs - logs[:, :1] + 1e-3
    kv_heads = len(logs)
    product = logs.new_zeros(kv_heads, layout.parts)
    filled = torch.zeros(kv_heads, layout.parts, dtype=torch.int64)
    order = torch.empty(kv_heads, layout.head_dim, dtype=torch.int64)
    for axis in reversed(range(layout.head_dim)):
        part = product.masked_fill(filled == PART, torch.inf).argmin(-1, keepdim=True)
        order.scatter_(1, part * PART + filled.gather(1, part), axis)
        product.scatter_add_(1, part, logs[:, axis : axis + 1])
        filled.scatter_add_(1, part, torch.ones_like(part))
    return order


def _words(points: Tensor) -> Tensor:
    """K-means of points [parts, N, 4]: their words [parts, 16, 4]."""
    generator = torch.Generator().manual_seed(_SEED)
    count = points.shape[1]

    def some() -> Tensor:
        """Points to begin with, and for words that no point is nearest to."""
        chosen = torch.randperm(count, generator=generator).repeat(-(-WORDS // count))[:WORDS]
        return points[:, chosen.to(points.device)]

    words = some()
    for _ in range(_ROUNDS):
        half_norms = words.square().sum(-1).mul_(0.5)
        nearest = torch.sub(half_norms[:, None], points @ words.mT).argmin(-1)
        mine = torch.nn.functional.one_hot(nearest, WORDS).to(points.dtype)
        members = mine.sum(1)[..., None]
        words = torch.where(members > 0, mine.mT @ points / members.clamp(min=1), some())
    return words
