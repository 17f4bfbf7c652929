"""One tensor in a file: only what was written is read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import ds_offload.tensor_file
from ds_offload.errors import LoadError


def test_only_what_was_written_is_read(tmp_path: Path) -> None:
    """A file that is longer, or whose header is another tensor's, is no more trusted than one cut short."""
    path = tmp_path / "one.safetensors"
    rows = torch.arange(12.0).view(3, 4)
    record = ds_offload.tensor_file.write_tensor(path, rows.dtype, (3, 4), [rows[:1], rows[1:]])
    out = torch.full_like(rows, torch.nan)
    ds_offload.tensor_file.read_tensor(path, record, rows.dtype, (3, 4), [out[:2], out[2:]])
    assert torch.equal(out, rows)
    with pytest.raises(LoadError, match="damaged"):
        ds_offload.tensor_file.read_tensor(path, record, rows.dtype, (4, 3), [out])
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(LoadError, match="damaged"):
        ds_offload.tensor_file.read_tensor(path, record, rows.dtype, (3, 4), [out])
