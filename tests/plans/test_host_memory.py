"""Host memory: of the machine, or what a control group leaves of it."""

from __future__ import annotations

import pytest

from plans.host_memory import HostMemory, host_memory

GIB = 2**30
MACHINE = {"/proc/meminfo": f"MemTotal: {64 * 2**20} kB\nMemFree: 1 kB\nMemAvailable: {50 * 2**20} kB\n"}
JOB = "/system.slice/slurmstepd.scope/job_7/step_0/user"
V2 = {
    "/proc/self/cgroup": f"0::{JOB}\n",
    f"/sys/fs/cgroup{JOB}/memory.max": "max\n",
    f"/sys/fs/cgroup{JOB}/memory.current": f"{GIB}\n",
}
LIMITED = {  # slurm bounds the job, two groups above
    "/sys/fs/cgroup/system.slice/slurmstepd.scope/job_7/memory.max": f"{16 * GIB}\n",
    "/sys/fs/cgroup/system.slice/slurmstepd.scope/job_7/memory.current": f"{10 * GIB}\n",
}
CACHE = {
    "/sys/fs/cgroup/system.slice/slurmstepd.scope/job_7/memory.stat": f"anon {5 * GIB}\nfile {5 * GIB}\n"
    f"inactive_file {3 * GIB}\nactive_file {GIB}\nslab 7\n"
}
V1 = {  # a container: the path is that of the host, the group itself is mounted at the root
    "/proc/self/cgroup": "5:devices:/docker/ab\n4:memory:/docker/ab\n0::/\n",
    "/sys/fs/cgroup/memory/memory.limit_in_bytes": f"{8 * GIB}\n",
    "/sys/fs/cgroup/memory/memory.usage_in_bytes": f"{6 * GIB}\n",
    "/sys/fs/cgroup/memory/memory.stat": f"inactive_file 1\ntotal_inactive_file {GIB}\ntotal_active_file 0\n",
}
UNLIMITED = {
    "/proc/self/cgroup": "4:memory:/\n",
    "/sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
    "/sys/fs/cgroup/memory/memory.usage_in_bytes": f"{60 * GIB}\n",
}


@pytest.mark.parametrize(
    ("files", "total", "available"),
    [
        ({}, 64, 50),
        (V2, 64, 50),
        (V2 | LIMITED, 16, 6),
        (V2 | LIMITED | CACHE, 16, 10),
        (V1, 8, 3),
        (UNLIMITED, 64, 50),
    ],
)
def test_the_narrowest_bound_holds(files: dict[str, str], total: int, available: int) -> None:
    found = host_memory(lambda path: {**MACHINE, **files}.get(path, ""))
    assert found == HostMemory(total * GIB, available * GIB)


def test_a_system_that_does_not_say() -> None:
    assert host_memory(lambda _: "") is None
    here = host_memory()
    assert here is None or 0 < here.available <= here.total
