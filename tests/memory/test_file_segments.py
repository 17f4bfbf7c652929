"""Segments in files: zeros, what is written, nothing left of them, and a disk without room."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import ds_offload.memory.file_segments as file_segments
from ds_offload.errors import InputError, MemoryPlanError
from ds_offload.memory.file_segments import FileSegments, disk_room
from ds_offload.memory.kv_store import KVStore

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
MIB = 1 << 20
LIBC = ctypes.CDLL(None)


def mapped(folder: Path) -> int:
    """Bytes of files of `folder` that this process has mapped."""
    total = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        if str(folder) in line:
            first, last = line.split()[0].split("-")
            total += int(last, 16) - int(first, 16)
    return total


def without_nameless_files(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def refuse(path: object, flags: int, *rest: int) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return real(path, flags, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(file_segments.os, "open", refuse)


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "kv").mkdir()
    assert disk_room("~/kv") > 0
    pool = FileSegments("~/kv", CPU)
    pool.begin(MIB)
    assert mapped(tmp_path / "kv") == MIB


@pytest.mark.parametrize("named", [False, True])
def test_blocks_are_files_without_a_name(named: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if named:
        without_nameless_files(monkeypatch)
    pool = FileSegments(tmp_path, CPU)
    first, last = pool.begin(3 * MIB + 5, blocks=2)
    assert list(tmp_path.iterdir()) == []
    # Whole pages are taken.
    assert pool.nbytes == mapped(tmp_path) == 2 * (3 * MIB + 4096) and pool.pinned_bytes == 0
    blocks = [first, *pool.begin(MIB), last]
    assert all(pool.is_ready(block, len(block)) for block in blocks) and not pool.busy
    assert pool.nbytes == mapped(tmp_path) == 7 * MIB + 2 * 4096
    assert [len(block) for block in blocks] == [3 * MIB + 5, MIB, 3 * MIB + 5]
    for number, block in enumerate(blocks):
        assert not block.any()
        block.fill_(number + 1)
    assert [int(block.sum(dtype=torch.int64)) for block in blocks] == [3 * MIB + 5, 2 * MIB, 3 * (3 * MIB + 5)]
    open_files = [os.path.realpath(file) for file in Path("/proc/self/fd").iterdir()]
    assert not any(str(tmp_path) in file for file in open_files), "a mapping needs no file descriptor"
    pool.close()
    assert pool.nbytes == 0
    # Whoever still has a tensor may read it.
    assert int(blocks[1][-1]) == 2
    del blocks, block, first, last
    assert mapped(tmp_path) == 0


def test_a_block_goes_with_the_last_pool_that_has_it(tmp_path: Path) -> None:
    first, second = FileSegments(tmp_path, CPU), FileSegments(tmp_path, CPU)
    (block,) = first.begin(MIB)
    block.fill_(7)
    second.adopt(first, block)
    address = block.data_ptr()
    del block
    first.close()
    assert mapped(tmp_path) == second.nbytes == MIB
    assert second._blocks[0].data_ptr() == address and int(second._blocks[0][-1]) == 7
    second.close()
    assert mapped(tmp_path) == 0


def test_a_cuda_device_cannot_read_them_in_place(tmp_path: Path) -> None:
    for device, pageable in ((CPU, False), (CUDA, True)):
        pool = FileSegments(tmp_path, device)
        assert pool.left_pageable(pool.begin(MIB)[0]) is pageable
        pool.close()


def test_a_disk_that_fills_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was made before stays; of several that were to be made none is kept, so that a second try has their room."""
    left = [3]
    reserve = os.posix_fallocate

    def fill(file: int, start: int, size: int) -> None:
        if not left[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left[0] -= 1
        reserve(file, start, size)

    monkeypatch.setattr(file_segments.os, "posix_fallocate", fill)
    pool = FileSegments(tmp_path, CPU)
    (block,) = pool.begin(MIB)
    block.fill_(1)
    message = rf"kv_dir={tmp_path} has no room for 1 MiB of K/V after 0.00 GiB \(No space left on device\); free"
    with pytest.raises(MemoryPlanError, match=message) as error:
        pool.begin(MIB, blocks=3)
    assert "\n" not in str(error.value)
    assert pool.nbytes == MIB and mapped(tmp_path) == MIB and list(tmp_path.iterdir()) == []
    with pytest.raises(MemoryPlanError, match="has no room"):
        pool.begin(MIB)
    left[0] = 3
    kept = pool.begin(MIB, blocks=3)
    assert len(kept) == 3 and pool.nbytes == 4 * MIB and bool((block == 1).all())
    pool.close()


def test_a_folder_that_goes_away(tmp_path: Path) -> None:
    (tmp_path / "kv").mkdir()
    pool = FileSegments(tmp_path / "kv", CPU)
    pool.begin(MIB)
    (tmp_path / "kv").rmdir()
    with pytest.raises(InputError, match=r"cannot write to kv_dir=.*No such file"):
        pool.begin(MIB)
    pool.close()


@pytest.mark.parametrize("staged", [False, True])
def test_what_is_read_as_a_whole_is_read_ahead(staged: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system is told that rows are far apart, and where they are not it is told which ones will be read."""
    advised: list[tuple[int, int, int]] = []

    def madvise(first: ctypes.c_void_p, size: ctypes.c_size_t, advice: int) -> int:
        advised.append((first.value or 0, size.value, advice))
        return int(LIBC.madvise(first, size, advice))

    monkeypatch.setattr(file_segments.ctypes, "CDLL", lambda name: SimpleNamespace(madvise=madvise))
    pool = FileSegments(tmp_path, CUDA if staged else CPU)
    shape: dict[str, Any] = {"kv_heads": 2, "head_dim": 64, "dtype": torch.float32, "segment_tokens": 32}
    store = KVStore(layers=[0, 1], sequences=1, device=CPU, pool=pool, max_tokens=96, **shape)
    store.reserve(0, 70)
    segments = store.table.tensors[0]
    assert store.staged is staged
    assert [entry for entry in advised if entry[2] == mmap.MADV_RANDOM] == [
        (segment.data_ptr(), segment.nbytes, mmap.MADV_RANDOM) for segment in segments
    ]
    rows = torch.randn(2, 70, 2, 64)
    store.write_prompt(1, 0, 0, rows)
    # 512 bytes a row, 16 KiB a head: token 20 begins in the middle of a page.
    expected = []
    for head in range(2):
        for segment, first, last in ((segments[0], 20, 32), (segments[1], 0, 8)):
            begin = segment[1, head, first].data_ptr()
            page = begin // 4096 * 4096
            expected.append((page, begin - page + (last - first) * 512, mmap.MADV_WILLNEED))
    advised.clear()
    out = torch.empty(2, 20, 2, 64)
    store.read(1, 0, 20, out)
    assert torch.equal(out, rows[:, 20:40]) and sorted(advised) == sorted(expected)
    advised.clear()
    parts = torch.cat(list(store.parts(1, 0, 20, 40)))
    assert torch.equal(parts, rows[:, 20:40].flatten(0, 1)) and advised == expected
    store.close()
    pool.close()


def _on(kind: str) -> Callable[[Path], str]:
    return lambda folder: kind


def test_where_there_can_be_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_segments, "_file_system", _on("ext4"))
    monkeypatch.setattr(file_segments.shutil, "disk_usage", lambda folder: SimpleNamespace(free=12345))
    assert disk_room(tmp_path) == disk_room(str(tmp_path)) == 12345
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "nowhere"):
        with pytest.raises(InputError, match=f"kv_dir={place} is no folder"):
            disk_room(place)
    with monkeypatch.context() as patch, pytest.raises(InputError, match=f"cannot write to kv_dir={tmp_path}"):
        patch.setattr(file_segments.os, "access", lambda place, mode: False)
        disk_room(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(InputError, match="needs Linux"):
        patch.delattr(file_segments.os, "posix_fallocate")
        disk_room(tmp_path)
    monkeypatch.setattr(file_segments, "_file_system", _on("tmpfs"))
    with pytest.raises(InputError, match=r"is a file system in memory \(tmpfs\)"):
        disk_room(tmp_path)


def test_the_kind_of_a_file_system_is_known() -> None:
    assert file_segments._file_system(Path("/proc")) == "proc"
