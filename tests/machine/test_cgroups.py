"""Limits of control groups in made-up trees: both versions, nested, as a container sees them, and damaged."""

from __future__ import annotations

from pathlib import Path

import pytest

from ds_offload.machine.cgroups import CgroupLimit, cgroup_limits

GIB = 1 << 30
V2 = "31 23 0:28 {top} {mount} rw,relatime shared:9 - cgroup2 cgroup2 rw,nsdelegate"
V1 = "35 31 0:32 {top} {mount} rw,relatime - cgroup cgroup rw,memory"
CPU = "36 31 0:33 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu"


def write(root: Path, files: dict[str, str | int]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n", encoding="utf-8")
    return root


def v2(root: Path, group: str, top: str = "/", **files: str | int) -> Path:
    write(root, {"proc/self/cgroup": f"0::{group}", "proc/self/mountinfo": V2.format(top=top, mount="/sys/fs/cgroup")})
    return write(root, {f"sys/fs/cgroup/{name}": content for name, content in files.items()})


def test_a_system_without_control_groups_has_no_limits(tmp_path: Path) -> None:
    assert cgroup_limits(tmp_path) == []


def test_every_limit_on_the_way_up_counts_in_version_2(tmp_path: Path) -> None:
    files = {
        "a/memory.max": 8 * GIB,
        "a/memory.current": 3 * GIB,
        "a/memory.stat": f"anon 5\ninactive_file {GIB}\nactive_file 7",
        "a/b/memory.max": "max",
        "a/b/memory.current": 9,
        "a/b/c/memory.max": 2 * GIB,
        "a/b/c/memory.current": GIB,
    }
    limits = cgroup_limits(v2(tmp_path, "/a/b/c", **files))
    assert limits == [CgroupLimit("/a/b/c", 2 * GIB, GIB), CgroupLimit("/a", 8 * GIB, 2 * GIB)]
    assert [limit.free_bytes for limit in limits] == [GIB, 6 * GIB]


@pytest.mark.parametrize(
    ("group", "top"),
    [("/", "/"), ("/docker/1f3a", "/docker/1f3a"), ("/docker/1f3a", "/docker/1f3a/"), ("/../../x", "/"), ("/a", "/b")],
)
def test_a_container_sees_its_own_group_as_the_root(group: str, top: str, tmp_path: Path) -> None:
    files = {"memory.max": 4 * GIB, "memory.current": 5 * GIB}
    (limit,) = cgroup_limits(v2(tmp_path, group, top, **files))
    assert limit == CgroupLimit("/", 4 * GIB, 5 * GIB) and limit.free_bytes == 0


def test_a_group_below_the_one_that_is_mounted(tmp_path: Path) -> None:
    files = {"in/memory.max": GIB, "in/memory.current": 0}
    assert cgroup_limits(v2(tmp_path, "/docker/1f3a/in", "/docker/1f3a", **files)) == [CgroupLimit("/in", GIB, 0)]


def test_version_1_takes_a_huge_number_for_no_limit(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "5:cpu,cpuacct:/y\n4:memory:/x/y\n0::/z",
            "proc/self/mountinfo": "\n".join(
                [CPU, V1.format(top="/", mount="/sys/fs/cgroup/mem\\040ory"), "nonsense", "1 2 - x"]
            ),
            "sys/fs/cgroup/mem ory/memory.limit_in_bytes": 9223372036854771712,
            "sys/fs/cgroup/mem ory/x/memory.limit_in_bytes": 16 * GIB,
            "sys/fs/cgroup/mem ory/x/memory.usage_in_bytes": 6 * GIB,
            "sys/fs/cgroup/mem ory/x/memory.stat": f"inactive_file 1\ntotal_inactive_file {2 * GIB}",
            "sys/fs/cgroup/cpu/memory.limit_in_bytes": 1,
        },
    )
    assert cgroup_limits(root) == [CgroupLimit("/x", 16 * GIB, 4 * GIB)]


def test_both_versions_at_once(tmp_path: Path) -> None:
    mounts = [V1.format(top="/", mount="/cg/memory"), V2.format(top="/", mount="/cg/unified")]
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/a\n0::/b",
            "proc/self/mountinfo": "\n".join(mounts),
            "cg/memory/a/memory.limit_in_bytes": 3 * GIB,
            "cg/unified/b/memory.max": 5 * GIB,
        },
    )
    assert cgroup_limits(root) == [CgroupLimit("/a", 3 * GIB, 0), CgroupLimit("/b", 5 * GIB, 0)]


@pytest.mark.parametrize("content", ["", "-5", "lots", "1e9"])
def test_a_limit_that_is_no_number_is_none(content: str, tmp_path: Path) -> None:
    files = {"memory.max": content, "memory.stat": "inactive_file\ninactive_file x"}
    assert cgroup_limits(v2(tmp_path, "/", **files)) == []
