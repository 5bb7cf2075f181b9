"""The second host's part of a plan is a pure function too: which runs follow which, and where both hosts meet."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from dispatch.hosts.facts import HostFacts
from dispatch.hosts.inventory import Host
from dispatch.pairing.beside import check_spread, following_runs, kin_of
from dispatch.pairing.meeting import Side, judge_meeting, port_of, world_of
from dispatch.planning.choice import ChosenRun
from dispatch.planning.choice import choose as chosen_of
from latentforge.errors import RefusedError
from latentforge.spec.hosts import PORTS, Hosts
from latentforge.spec.pipeline import effective_pipeline, pipeline_runs
from latentforge.spec.resolve import resolve_pipeline

WIRES = [
    {
        "interface": f"eth{n}",
        "address": f"10.0.0.{n}",
        "network": "10.0.0.0/24",
        "mtu": 9000,
        "up": True,
        "carrier": True,
    }
    for n in (1, 2)
]


def facts(*, wire: dict[str, Any] | None = None, host: dict[str, Any] | None = None, **more: Any) -> HostFacts:
    python = {"executable": "/usr/bin/python3", "version": "3.12.3"}
    return HostFacts.model_validate({"host": host or {}, "python": python, "root": "/r", "link": wire, **more})


def leader_plan() -> Any:
    """A full pipeline's runs as chosen on a host that has none of them: the canary and the student are spread."""
    words = ["profile=full", "data.corpus=/c", "distill.distributed=fsdp2"]
    spec, _ = effective_pipeline(resolve_pipeline("tiny", overrides=words).spec)
    planned = pipeline_runs(spec, digests={"/c": "1" * 64}, code="c" * 64, lock="d" * 64)
    return SimpleNamespace(runs=tuple(chosen_of(planned, facts(), attempt_next=False)))


def test_each_run_that_both_hosts_share_is_followed_by_one_of_its_own_and_a_further_one_when_that_has_ended() -> None:
    plan = leader_plan()
    found = following_runs(plan, facts(), "b")
    by_kind = {run.kind: run for run in plan.runs}
    assert [run.kind for run in found] == ["follow canary", "follow distill"]
    assert [run.resolved["leader"]["run"] for run in found] == [by_kind["canary"].run, by_kind["distill"].run]
    assert [run.will for run in found] == ["run", "run"]

    def there(state: str, **more: Any) -> list[ChosenRun]:
        row = {"id": found[1].run, "state": state, **more}
        return following_runs(plan, facts(kin_runs={kin_of(by_kind["distill"].run): [row]}), "b")

    assert [there("running")[1].run, there("running")[1].will] == [found[1].run, "follow"]
    after = there("finished", outcome="crashed")[1]
    assert (after.will, after.run == found[1].run) == ("run", False)
    passed = SimpleNamespace(runs=tuple(replace(run, will="keep") for run in plan.runs))
    assert {run.will for run in following_runs(passed, facts(), "b")} == {"keep"}, "nothing to take part in"


def test_hosts_meet_at_the_leaders_address_at_a_port_of_the_runs_own_each_by_its_own_interface() -> None:
    sides = sides_of()
    runs = [f"distill-{number:020x}" for number in (7, 7 << 48, 9 << 48)]
    assert {port_of(run) for run in runs} <= set(PORTS)
    assert len({port_of(run) for run in runs}) == 3
    one, other = (Hosts.model_validate(world_of(sides, index, runs[1])) for index in (0, 1))
    assert (one.address, one.port) == (other.address, other.port) == ("10.0.0.1", port_of(runs[1]))
    assert (one.interface, other.interface, one.hca, other.hca) == ("eth1", "eth2", None, "mlx5_0")
    assert one.wait_seconds < other.wait_seconds
    sides[0].ask.wait = True  # type: ignore[misc]
    assert Hosts.model_validate(world_of(sides, 0, runs[1])).wait_seconds == other.wait_seconds
    assert judge_meeting(sides)[0].will == "keep"


@pytest.mark.parametrize("stage", ["autoencoder", "latent"])
def test_each_stage_that_is_spread_can_be_on_two_hosts_and_is_judged_before_anything_runs(stage: str) -> None:
    def ask(*more: str) -> Any:
        overrides = [f"{stage}.distributed=ddp", f"{stage}.processes=1", *more]
        spec = resolve_pipeline("tiny-latent", env={}, overrides=overrides).spec
        return SimpleNamespace(spec=spec, hosts=("a", "b"), recipe="tiny-latent")

    check_spread(ask())
    with pytest.raises(RefusedError, match=stage):
        check_spread(ask(f"{stage}.batch_size=1"))


def sides_of(**second: Any) -> list[Side]:
    hosts = [Host(name="a", address="x", link="eth1"), Host(name="b", address="y", link="eth2", hca="mlx5_0")]
    asks: list[Any] = [SimpleNamespace(host=host, lock="d" * 64, lock_name="cpu", wait=False) for host in hosts]
    wire = {**WIRES[1], **second.pop("wire", {})}
    return [Side(asks[0], facts(wire=WIRES[0])), Side(asks[1], facts(wire=wire, **second))]


def test_a_link_at_which_nobody_is_met_and_hosts_that_are_not_alike_are_refused_by_name() -> None:
    def against(**second: Any) -> str:
        step, refusals, _notes = judge_meeting(sides_of(**second))
        assert step.will == "refuse"
        assert all(one.next for one in refusals)
        return refusals[0].why

    assert "b has no interface 'eth2' (there are: lo)" in against(wire={"up": None, "address": None, "others": ["lo"]})
    assert "eth2 of b has no IPv4 address" in against(wire={"address": None})
    assert "eth2 of b is down" in against(wire={"up": False})
    assert "eth2 of b has no carrier" in against(wire={"carrier": False})
    assert "a and b have one address on the link, 10.0.0.1" in against(wire={"address": "10.0.0.1"})
    assert "a and b have other processors, ? and aarch64" in against(host={"arch": "aarch64"})
    assert "a and b have other GPUs, none and GB10" in against(host={"gpus": [{"name": "GB10"}]})
    step, refusals, notes = judge_meeting(sides_of(wire={"mtu": 1500, "network": "10.0.1.0/24"}))
    assert (step.will, refusals) == ("keep", [])
    assert [note.split(":")[1].split()[0] for note in notes] == ["10.0.0.0/24", "MTU"]
