"""The number of CPU threads of a process, by hand-made files of /sys."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from gft_lite.utils.cpu import MAX_THREADS, default_threads, usable_cores


def cores(folder: Path, siblings: dict[int, str], limit: str | None = None) -> int:
    for cpu, text in siblings.items():
        topology = folder / f"devices/system/cpu/cpu{cpu}/topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(f"{text}\n")
    (folder / "fs/cgroup").mkdir(parents=True)
    if limit:
        (folder / "fs/cgroup/cpu.max").write_text(f"{limit}\n")
    return usable_cores(siblings, folder)


@pytest.mark.parametrize(
    ("siblings", "limit", "expected"),
    [
        ({0: "0", 1: "1"}, None, 2),
        ({0: "0,2", 1: "1,3", 2: "0,2", 3: "1,3"}, None, 2),  # Two threads a core.
        ({2: "0,2", 3: "1,3"}, "max 100000", 2),  # An affinity, no quota.
        ({n: str(n) for n in range(8)}, "250000 100000", 2),  # A quota of 2.5 CPUs.
        ({0: "0", 1: "1"}, "50000 100000", 1),
        ({0: "0", 1: "1"}, "800000 100000", 2),
    ],
)
def test_physical_cores_within_affinity_and_quota(siblings, limit, expected, tmp_path):
    assert cores(tmp_path, siblings, limit) == expected


def test_the_quota_of_the_first_version_of_cgroups(tmp_path):
    folder = tmp_path / "fs/cgroup/cpu"
    folder.mkdir(parents=True)
    (folder / "cpu.cfs_quota_us").write_text("300000\n")
    (folder / "cpu.cfs_period_us").write_text("100000\n")
    assert usable_cores(range(8), tmp_path) == 3
    (folder / "cpu.cfs_quota_us").write_text("-1\n")
    assert usable_cores(range(8), tmp_path) == 8


def test_the_users_own_number_and_the_processes_of_a_launch(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert default_threads() == 7
    monkeypatch.setenv("OMP_NUM_THREADS", "")
    for total, processes, expected in ((8, "2", 4), (8, "16", 1), (64, "1", MAX_THREADS)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        monkeypatch.setattr("gft_lite.utils.cpu.usable_cores", lambda total=total: total)
        assert default_threads() == expected


@pytest.mark.parametrize(("own", "policy"), [("", "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_waiting_threads_sleep_unless_the_user_says_otherwise(own, policy):
    code = (
        "import os\nos.environ.pop('OMP_WAIT_POLICY', None)\n"
        f"own = {own!r}\nif own: os.environ['OMP_WAIT_POLICY'] = own\n"
        "from gft_lite.cli import main\nassert main(['train', 'none.yaml']) == 2\n"
        "print(os.environ['OMP_WAIT_POLICY'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"{policy}\n"
