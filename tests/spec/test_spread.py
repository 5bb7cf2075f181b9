"""What cannot be trained together is refused where it is planned, and never left out in silence."""

from __future__ import annotations

from typing import Any

import pytest

from latentforge.errors import RefusedError
from latentforge.spec.hosts import Hosts, check_hosts, following, hosts_of
from latentforge.spec.identity import RunIdentity
from latentforge.spec.pipeline import effective_pipeline
from latentforge.spec.run import LaunchRecord
from latentforge.spec.sections import DistillSpec, PipelineSpec
from latentforge.spec.spread import processes_of, without_spread


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({"processes": 2}, "processes = 2 with distributed = 'none': they would not train together"),
        ({"distributed": "ddp", "processes": 5, "batch_size": 4}, "some would never have a row"),
        (
            {"distributed": "ddp", "processes": 2, "batch_size": 5, "micro_batch_size": 4},
            "micro_batch_size = 4 is more than the 3 rows that each of 2 processes has of batch_size = 5",
        ),
        ({"distributed": "fsdp2", "student": {"frozen": True}}, "there is nothing to train together"),
        ({"distributed": "ddp", "targets": "live"}, "each process would hold or ask a teacher of its own"),
        ({"distributed": "ddp", "on_policy": 0.5}, "the processes do not write text together"),
        ({"distributed": "deepspeed-zero1"}, "Input should be 'none', 'ddp', 'fsdp2'"),
        ({"distributed": "ddp", "processes": 0}, "greater than or equal to 1"),
    ],
)
def test_what_cannot_be_combined_is_refused(asked: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=".*".join(map(str, [why]))):
        DistillSpec.model_validate(asked)


def test_a_temperature_that_would_make_targets_live_is_refused_for_several_processes() -> None:
    spec = PipelineSpec.model_validate({"distill": {"temperature": 2.0, "distributed": "ddp", "processes": 2}})
    with pytest.raises(RefusedError, match="distributed = 'ddp' takes stored targets alone") as refused:
        effective_pipeline(spec)
    assert refused.value.next == "add 2 to score.temperatures, or set distill.distributed = 'none'"


def test_how_training_is_spread_is_no_part_of_what_is_trained() -> None:
    one, two = ({"distill": {"steps": 3, "distributed": name, "processes": n}} for name, n in (("ddp", 2), ("none", 1)))
    assert (
        without_spread(one | {"seed": 7}) == without_spread(two | {"seed": 7}) == {"distill": {"steps": 3}, "seed": 7}
    )
    assert (processes_of("distill", one), processes_of("distill", two), processes_of("data", {})) == (2, None, None)


WORLD: dict[str, Any] = {"hosts": ["a", "b"], "index": 1, "address": "10.77.0.1", "port": 29512, "interface": "eth1"}


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"hosts": ["a"]}, "hosts: .*at least 2"),
        ({"hosts": ["a", "a"]}, "a host is named twice"),
        ({"index": 2}, "index 2 is none of the 2 hosts"),
        ({"address": "0.0.0.0"}, "is every address of a host"),
        ({"address": "spark-1"}, "address: "),
        ({"port": 80}, "port: "),
        ({"interface": "eth1,eth2"}, "interface: "),
        ({"deadline_seconds": 0}, "deadline_seconds: "),
        ({"key": "00"}, "key: Extra inputs"),
    ],
)
def test_a_world_that_cannot_be_meant_is_refused_by_its_field(changed: dict[str, Any], why: str) -> None:
    run = "follow-" + "0" * 20
    with pytest.raises(RefusedError, match=f"world of {run}: .*{why}"):
        hosts_of(LaunchRecord(run, "", {}, world=WORLD | changed))


def test_the_processes_of_a_host_are_told_its_link_and_the_run_that_follows_names_its_leader() -> None:
    hosts = hosts_of(LaunchRecord("follow-" + "0" * 20, "", {}, world={**WORLD, "hca": "rocep1s0f0,roceP2p1s0f0"}))
    assert hosts is not None
    assert hosts == Hosts.model_validate(hosts.as_json())
    assert (hosts.leads, hosts.here, hosts.leader, hosts.deadline_seconds) == (False, "b", "a", 30.0)
    assert hosts.environment() == {
        "GLOO_SOCKET_IFNAME": "eth1",
        "NCCL_SOCKET_IFNAME": "eth1",
        "NCCL_IB_HCA": "rocep1s0f0,roceP2p1s0f0",
    }
    leader = RunIdentity("distill", {"distill": {}}, {}, "c" * 64, "l" * 64, ("HF_TOKEN",), 3)
    own = following(leader, 1)
    assert own.spec == {"follows": leader.run_id, "index": 1}
    assert (own.code, own.lock, own.secrets, own.attempt) == (leader.code, leader.lock, leader.secrets, 3)
    assert RunIdentity.from_bytes(own.canonical, run_id=own.run_id) == own


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({"distributed": "none", "processes": 1}, "distributed = 'none', which is one process on one host"),
        ({"processes": 3}, "2 hosts x distill.processes = 3 with batch_size = 4: some would never have a row"),
        ({"processes": 2, "micro_batch_size": 2}, "micro_batch_size = 2 is more than the 1 rows"),
    ],
)
def test_a_run_that_two_hosts_cannot_share_is_refused(asked: dict[str, Any], why: str) -> None:
    section = {"distributed": "ddp", "batch_size": 4, "micro_batch_size": None, **asked}
    with pytest.raises(RefusedError, match=why):
        check_hosts("distill", {"distill": section}, 2)
    assert check_hosts("distill", {"distill": section | {"distributed": "ddp", "processes": 1}}, 2) == 1
