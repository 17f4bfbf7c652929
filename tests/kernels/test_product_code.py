"""Product codes: the nearest words in float64, the bytes of a row, and the kernels in the interpreter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from product_cases import double, product_code

from ds_offload.kernels.product_code import (
    ProductCode,
    ProductLayout,
    ProductRows,
    code_bytes,
    decode_product,
    encode_new,
    encode_product,
    encode_product_reference,
    pack_parts,
    unpack_parts,
)


def random_keys(code: ProductCode, tokens: int, seed: int = 2) -> torch.Tensor:
    kv_heads, head_dim = code.mean.shape
    return torch.randn(kv_heads, tokens, head_dim, generator=torch.Generator().manual_seed(seed)) + code.mean[:, None]


def encoded(keys: torch.Tensor, code: ProductCode) -> torch.Tensor:
    out = torch.full((*keys.shape[:2], code.layout.row_bytes), 255, dtype=torch.uint8, device=keys.device)
    encode_product(keys, code, out)
    return out


def check_nearest(rows: torch.Tensor, keys: torch.Tensor, code: ProductCode) -> None:
    """Every word is the nearest of its part, but for what float32 cannot tell."""
    wide, layout = double(code), code.layout
    axes = (keys.double() - wide.mean[:, None]) @ wide.basis
    parts = axes.unflatten(-1, (layout.parts, 4))
    distances = (parts[..., None, :] - wide.words[:, None]).norm(dim=-1)
    taken = distances.gather(-1, unpack_parts(rows, layout)[..., None])[..., 0]
    assert ((taken - distances.amin(-1)) < 1e-4).all()


@pytest.mark.parametrize(
    ("head_dim", "row_bytes"), [(4, 4), (32, 4), (36, 8), (64, 8), (80, 12), (96, 12), (128, 16), (256, 32)]
)
def test_a_row_takes_a_bit_a_channel_in_whole_words(head_dim: int, row_bytes: int) -> None:
    layout = ProductLayout(head_dim)
    assert (layout.parts, layout.row_bytes) == (head_dim // 4, row_bytes)
    code = product_code(3, 2, head_dim=head_dim)
    assert code_bytes(3, 2, head_dim) == sum(tensor.nbytes for tensor in code.tensors())
    numbers = torch.arange(layout.parts).mul(7) % 16
    rows = pack_parts(numbers, layout)
    assert rows.shape == (row_bytes,) and torch.equal(unpack_parts(rows, layout), numbers)
    assert rows[0] == 0x70 if layout.parts > 1 else rows[0] == 0
    assert not rows[-(-layout.parts // 2) :].any()


@pytest.mark.parametrize("head_dim", [0, 2, 30])
def test_heads_without_whole_parts_are_refused(head_dim: int) -> None:
    with pytest.raises(ValueError, match=f"head_dim={head_dim} must be a multiple of 4"):
        ProductLayout(head_dim)


@pytest.mark.parametrize("head_dim", [4, 20, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("tokens", [1, 1500])
def test_every_part_is_told_by_its_nearest_word(head_dim: int, tokens: int) -> None:
    code = product_code(2, head_dim=head_dim)
    keys = random_keys(code, tokens)
    rows = encoded(keys, code)
    check_nearest(rows, keys, code)
    spare = code.layout.row_bytes * 2 - code.layout.parts
    assert spare == 0 or not rows[..., -(-code.layout.parts // 2) :].any()


def test_decoding_turns_the_words_back() -> None:
    code = product_code(2, head_dim=20)
    numbers = torch.randint(16, (2, 9, 5), generator=torch.Generator().manual_seed(1))
    words = torch.stack([torch.stack([code.words[h, p, numbers[h, :, p]] for p in range(5)], 1) for h in range(2)])
    keys = words.flatten(-2).double() @ torch.linalg.inv(code.basis.double())
    torch.testing.assert_close(decode_product(pack_parts(numbers, code.layout), code).double(), keys, rtol=0, atol=1e-4)
    # A key that is words has the label of those words.
    again = encoded(keys.float() + code.mean[:, None], code)
    assert torch.equal(unpack_parts(again, code.layout), numbers)


def test_strided_keys_of_every_dtype() -> None:
    code = product_code(2, head_dim=64)
    rows = random_keys(code, 2 * 50).view(2, 50, 2, 64)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        keys = rows.to(dtype)[:, :, 0]
        assert torch.equal(encoded(keys, code), encoded(keys.float().contiguous(), code))


def test_new_tokens_land_behind_their_sequence() -> None:
    code = product_code(3, head_dim=64)
    keys = random_keys(code, 2)
    rows = torch.full((3, 50, code.layout.row_bytes), 9, dtype=torch.uint8)
    expected = rows.clone()
    expected[:, [7, 31]] = encoded(keys, code)
    encode_new(keys.transpose(0, 1), ProductRows(rows, code, torch.tensor([0, 30])), torch.tensor([7, 1]))
    assert torch.equal(rows, expected)


def test_wrong_arguments_are_named() -> None:
    code = product_code(2, head_dim=64)
    keys, out = random_keys(code, 5), torch.zeros(2, 5, 8, dtype=torch.uint8)
    cases = {
        r"keys .* must be floating point \(2, 5, 64\)": [(keys[:1], out), (keys.long(), out), (keys[:, :3], out)],
        r"labels .* must be uint8 \[2, n, 8\]": [(keys, out.int()), (keys, torch.zeros(2, 5, 16).byte()[..., ::2])],
    }
    for message, arguments in cases.items():
        for given, target in arguments:
            with pytest.raises(ValueError, match=message):
                encode_product(given, code, target)
    with pytest.raises(ValueError, match=r"basis .* must be \(2, 64, 64\), contiguous"):
        ProductCode(code.mean, code.basis.mT, code.turn, code.words)


@pytest.mark.slow
def test_triton_kernels_in_the_interpreter(interpret: Callable[[str], None]) -> None:
    interpret("interpreted_product_code.py")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [4, 20, 64, 80, 96, 128, 256])
def test_cuda(head_dim: int, dtype: torch.dtype) -> None:
    code = product_code(3, head_dim=head_dim)
    rows = random_keys(code, 2 * 5001).view(3, 5001, 2, head_dim).to(dtype).cuda()
    keys, on_device = rows[:, :, 0], code.to(torch.device("cuda"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours = encoded(keys, on_device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    check_nearest(ours.cpu(), keys.cpu(), code)
    expected = torch.empty_like(ours)
    encode_product_reference(keys, on_device, expected)
    assert (ours == expected).float().mean() > 0.999
    new = torch.full((3, 50, code.layout.row_bytes), 9, dtype=torch.uint8, device="cuda")
    starts, positions = torch.tensor([0, 30], device="cuda"), torch.tensor([7, 1], device="cuda")
    encode_new(keys[:, :2].transpose(0, 1), ProductRows(new, on_device, starts), positions)
    assert torch.equal(new[:, [7, 31]], ours[:, :2])
    new[:, [7, 31]] = 9
    assert (new == 9).all()
