"""The processors that a process may use, read from a file system made for each test."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from moltbot_server.models.cpus import cpu_quota, processor_name, usable_cores, usable_cpus

EIGHT = range(8)
MOUNT_2 = "30 24 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
MOUNT_1 = "31 25 0:27 {shown} /sys/fs/cgroup/cpu,cpuacct rw,nosuid - cgroup cgroup rw,cpu,cpuacct\n"
MEMORY = "32 25 0:28 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"

Write = Callable[[str, str], None]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(name: str, text: str) -> None:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

    return write


def siblings(write: Write, *groups: str) -> None:
    for group in groups:
        for number in group.split(","):
            write(f"sys/devices/system/cpu/cpu{number}/topology/core_cpus_list", group + "\n")


def test_without_control_groups_every_processor_of_the_affinity_mask_is_usable(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path) is None
    assert usable_cpus(tmp_path, EIGHT) == 8
    assert usable_cpus(tmp_path, {3}) == 1
    assert usable_cpus() >= 1


@pytest.mark.parametrize(
    ("limit", "quota", "processors"),
    [
        ("max 100000", None, 8),
        ("200000 100000", 2.0, 2),
        ("150000 100000", 1.5, 1),
        ("50000 100000", 0.5, 1),
        ("290000 100000", 2.9, 2),
        ("30000 10000", 3.0, 3),
        ("6400000 100000", 64.0, 8),
        ("nonsense", None, 8),
        ("100000 0", None, 8),
    ],
)
def test_whole_processors_of_a_quota_of_version_2_count(
    tmp_path: Path, write: Write, limit: str, quota: float | None, processors: int
) -> None:
    write("proc/self/mountinfo", MOUNT_2)
    write("proc/self/cgroup", "0::/\n")
    write("sys/fs/cgroup/cpu.max", limit + "\n")

    assert cpu_quota(tmp_path) == quota
    assert usable_cpus(tmp_path, EIGHT) == processors


def test_of_nested_groups_the_tightest_holds(tmp_path: Path, write: Write) -> None:
    write("proc/self/mountinfo", MOUNT_2)
    write("proc/self/cgroup", "0::/user.slice/moltbot.service\n")
    write("sys/fs/cgroup/user.slice/cpu.max", "300000 100000\n")
    write("sys/fs/cgroup/user.slice/moltbot.service/cpu.max", "max 100000\n")

    assert cpu_quota(tmp_path) == 3.0

    write("sys/fs/cgroup/user.slice/moltbot.service/cpu.max", "200000 100000\n")

    assert cpu_quota(tmp_path) == 2.0


def test_a_quota_of_version_1_counts_and_a_negative_one_is_none(tmp_path: Path, write: Write) -> None:
    write("proc/self/mountinfo", MEMORY + MOUNT_1.format(shown="/"))
    write("proc/self/cgroup", "4:memory:/a\n3:cpu,cpuacct:/a/b\n0::/\n")
    write("sys/fs/cgroup/cpu,cpuacct/a/b/cpu.cfs_quota_us", "-1\n")
    write("sys/fs/cgroup/cpu,cpuacct/a/b/cpu.cfs_period_us", "100000\n")

    assert cpu_quota(tmp_path) is None

    write("sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_quota_us", "250000\n")
    write("sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_period_us", "100000\n")

    assert cpu_quota(tmp_path) == 2.5
    assert usable_cpus(tmp_path, EIGHT) == 2


def test_the_path_of_the_host_is_found_within_what_a_container_sees(tmp_path: Path, write: Write) -> None:
    write("proc/self/mountinfo", MOUNT_1.format(shown="/docker/c0ffee"))
    write("proc/self/cgroup", "3:cpu,cpuacct:/docker/c0ffee\n")
    write("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", "100000\n")
    write("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us", "100000\n")

    assert usable_cpus(tmp_path, EIGHT) == 1


@pytest.mark.parametrize("path", ["/kubepods/pod-1/c0ffee", "/../../elsewhere"])
def test_a_path_that_cannot_be_seen_stands_for_the_top(tmp_path: Path, write: Write, path: str) -> None:
    write("proc/self/mountinfo", MOUNT_2)
    write("proc/self/cgroup", f"0::{path}\n")
    write("sys/fs/cgroup/cpu.max", "400000 100000\n")

    assert usable_cpus(tmp_path, EIGHT) == 4


def test_two_hyper_threads_of_one_core_count_once(tmp_path: Path, write: Write) -> None:
    siblings(write, "0,4", "1,5", "2,6", "3,7")

    assert usable_cores(tmp_path, EIGHT) == 4
    assert usable_cores(tmp_path, {0, 4}) == 1
    assert usable_cores(tmp_path, {0, 1}) == 2
    assert usable_cpus(tmp_path, EIGHT) == 8


def test_cores_are_never_more_than_a_quota_allows(tmp_path: Path, write: Write) -> None:
    siblings(write, "0,4", "1,5", "2,6", "3,7")
    write("proc/self/mountinfo", MOUNT_2)
    write("proc/self/cgroup", "0::/\n")
    write("sys/fs/cgroup/cpu.max", "300000 100000\n")

    assert usable_cores(tmp_path, EIGHT) == 3


def test_without_a_topology_every_processor_is_a_core(tmp_path: Path) -> None:
    assert usable_cores(tmp_path, EIGHT) == 8


def test_older_kernels_name_the_siblings_otherwise(tmp_path: Path, write: Write) -> None:
    for number in (0, 1):
        write(f"sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list", "0-1\n")

    assert usable_cores(tmp_path, {0, 1}) == 1


def test_the_processor_has_a_name(tmp_path: Path, write: Write) -> None:
    write("proc/cpuinfo", "processor\t: 0\nmodel name\t: Fast Processor 9\nflags\t\t: fpu\n")

    assert processor_name(tmp_path) == "Fast Processor 9"
    assert processor_name() != ""
