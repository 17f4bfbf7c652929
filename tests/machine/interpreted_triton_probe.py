"""The probe kernel on CPU tensors; run by test_triton_probe.py under TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import torch

from ds_offload.machine.triton_probe import _launch, scale_reference


@pytest.mark.parametrize("length", [1, 3, 64, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_kernel_equals_the_reference(length: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **options: empty(*args, **options).fill_(torch.nan))
    source = torch.randn(length).to(dtype)
    torch.testing.assert_close(_launch(source), scale_reference(source), rtol=0, atol=0)
