"""Which rank a process is: what other launchers say in the environment, and what is wrong with it."""

from __future__ import annotations

import socket
from datetime import timedelta
from pathlib import Path

import pytest

from plans.errors import RealplanError
from runtime.processes.member import Address, Member, began_again, device_index, outside_member
from runtime.processes.network import interface_of, resolve
from runtime.processes.stores import open_store

STATIC = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}


def test_no_other_launcher() -> None:
    assert outside_member({"PATH": "/bin", "MASTER_ADDR": "node1"}) is None


def test_static_ranks_and_torchrun() -> None:
    assert outside_member(STATIC) == Member(1, 4, None, Address("node1", 29500))
    torchrun = {
        "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "3", "TORCHELASTIC_RUN_ID": "my/job",
    }  # fmt: skip
    expected = Address("node1", 29500, served=True, alone=False, job="my/job", attempt=3)
    assert began_again({"SLURM_RESTART_COUNT": "1"}) and not began_again({"SLURM_RESTART_COUNT": "0"})
    assert not began_again({"SLURM_JOB_ID": "7"})
    assert outside_member(STATIC | torchrun) == Member(1, 4, 1, expected)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"RANK": "abc"}, "RANK='abc', not a number from 0 to 3"),
        ({"RANK": "4"}, "RANK='4', not a number from 0 to 3"),
        ({"RANK": "-1"}, "RANK='-1'"),
        ({"RANK": "١"}, "not a number from 0 to 3"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE='0', not a number from 1"),
        ({"WORLD_SIZE": ""}, "but no WORLD_SIZE"),
        ({"MASTER_ADDR": ""}, "RANK=1, WORLD_SIZE=4, MASTER_PORT=29500, but no MASTER_ADDR"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT='99999', not a number from 1 to 65535"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK='x'"),
    ],
)
def test_variables_that_say_nothing_sensible(change: dict[str, str], words: str) -> None:
    with pytest.raises(RealplanError, match="the environment has") as raised:
        outside_member(STATIC | change)
    assert words in raised.value.message and "unset both" in raised.value.hint


def test_a_host_that_is_none() -> None:
    with pytest.raises(RealplanError, match=r"MASTER_ADDR='no.such.host.invalid', which is no host"):
        resolve(Address("no.such.host.invalid", 29500))


def test_a_port_that_nobody_serves() -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with pytest.raises(RealplanError, match=r"nobody answered at MASTER_ADDR=127.0.0.1, .* timeout_s = 0.3 s"):
        open_store(Member(1, 2, 1, Address("127.0.0.1", port)), timedelta(seconds=0.3))


def test_a_port_that_is_taken_and_an_address_that_others_cannot_reach() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(RealplanError, match=r"rank 0 cannot listen at .*: Address already in use"):
            open_store(Member(0, 2, 0, Address("127.0.0.1", port)), timedelta(seconds=1))
    with pytest.raises(RealplanError, match="which the other machines cannot reach"):
        open_store(Member(0, 2, 0, Address("127.0.0.1", port, alone=False)), timedelta(seconds=1))


def test_one_store_for_all_ranks(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    for meeting in (Address("localhost", port, alone=True), tmp_path / "store"):
        stores = [open_store(Member(rank, 2, rank, meeting), timedelta(seconds=10)) for rank in (0, 1)]
        stores[0].set("key", "value")
        assert stores[1].get("key") == b"value"


def test_interfaces() -> None:
    assert interface_of("127.0.0.1") == "lo" and interface_of("::1") == "lo"


def test_the_device_of_a_rank() -> None:
    def member(local: int | None, world: int = 8) -> Member:
        return Member(3, world, local, Path("store"))

    assert device_index(member(2), 8) == 2
    assert device_index(member(2), 1) == 0, "srun --gpus-per-task=1 shows each task one device"
    assert device_index(member(None, world=1), 8) == 0
    with pytest.raises(RealplanError, match="number 5 of its machine and sees 4 devices"):
        device_index(member(5), 4)
    with pytest.raises(RealplanError, match="LOCAL_RANK does not say"):
        device_index(member(None), 4)
