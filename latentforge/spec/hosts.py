"""A run over several hosts: what ``launch.json`` says of them, and the run of a host that follows another one's.

Where a run is computed is no part of what it means: it lies in ``launch.json`` under ``world``, and may be another for
the next attempt. The host of index 0 leads: the run is its own, with events, checkpoints and products. Each other host
has one of kind ``follow``, which takes part in the leader's and makes nothing.
"""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from latentforge.errors import RefusedError
from latentforge.spec.fields import Section
from latentforge.spec.identity import RunIdentity
from latentforge.spec.run import LaunchRecord
from latentforge.spec.spread import processes_of

PORTS = range(29512, 29912)
"""Where the plan takes a run's port from: below the ports that a kernel gives out by itself."""

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,252}$")]
Seconds = Annotated[float, Field(gt=0.0, le=7 * 86400.0, allow_inf_nan=False)]


class Hosts(Section):
    """``world`` of a launch record: the hosts of a run and which of them this is."""

    hosts: Annotated[list[Name], Field(min_length=2, max_length=64)] = Field(description="by name; the first leads")
    index: Annotated[int, Field(ge=0)] = Field(description="which of them this is")
    address: str = Field(description="the leader's address on its fast link, at which it listens and nowhere else")
    port: Annotated[int, Field(ge=1024, le=65535)] = Field(description="the port there")
    interface: Annotated[str, Field(pattern=r"^[A-Za-z0-9._@-]{1,15}$")] = Field(
        description="this host's interface on the fast link: GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
    )
    hca: Annotated[str, Field(pattern=r"^[A-Za-z0-9_:,=^-]{1,255}$")] | None = Field(
        None, description="its RDMA devices, NCCL_IB_HCA; NCCL's own choice if absent"
    )
    deadline_seconds: Seconds = Field(30.0, description="a host that is silent for so long is lost, and the run ends")
    wait_seconds: Seconds = Field(600.0, description="how long this host waits for the others to come")

    @field_validator("hosts")
    @classmethod
    def _distinct(cls, hosts: list[str]) -> list[str]:
        if len(set(hosts)) < len(hosts):
            raise ValueError(f"{', '.join(hosts)}: a host is named twice")
        return hosts

    @field_validator("address")
    @classmethod
    def _one_address(cls, address: str) -> str:
        if ipaddress.ip_address(address).is_unspecified:
            raise ValueError(f"{address} is every address of a host: name the one on the link")
        return address

    @model_validator(mode="after")
    def _is_one_of_them(self) -> Self:
        if self.index >= len(self.hosts):
            raise ValueError(f"index {self.index} is none of the {len(self.hosts)} hosts")
        return self

    @property
    def leads(self) -> bool:
        """Whether this host's run is the one that is trained."""
        return self.index == 0

    @property
    def here(self) -> str:
        """This host's name."""
        return self.hosts[self.index]

    @property
    def leader(self) -> str:
        """The leading host's name."""
        return self.hosts[0]

    def environment(self) -> dict[str, str]:
        """What the processes on this host are told of its link, for gloo and NCCL; all else is left to these."""
        known = {"GLOO_SOCKET_IFNAME": self.interface, "NCCL_SOCKET_IFNAME": self.interface}
        return known if self.hca is None else {**known, "NCCL_IB_HCA": self.hca}

    def as_json(self) -> dict[str, Any]:
        """The content of ``world`` in ``launch.json``."""
        return self.model_dump(mode="json")


def hosts_of(launch: LaunchRecord) -> Hosts | None:
    """The hosts of a run by its launch record, or None where it runs on one; refused where they cannot be read."""
    if not launch.world:
        return None
    try:
        return Hosts.model_validate_json(json.dumps(launch.world))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise RefusedError(f"world of {launch.run}: {where or 'it'}: {first['msg']}", next=_PLAN_AGAIN) from error


def following(leader: RunIdentity, index: int) -> RunIdentity:
    """The run of the host ``index`` (from 1) in the run of ``leader``: of its code, attempt and secrets."""
    spec = {"follows": leader.run_id, "index": index}
    return RunIdentity("follow", spec, {}, leader.code, leader.lock, leader.secrets, leader.attempt)


def check_hosts(kind: str, spec: Mapping[str, Any], hosts: int) -> int:
    """The processes that a run of this kind and spec has on each of ``hosts``; refused where it cannot be spread so."""
    processes = processes_of(kind, spec)
    if processes is None:
        raise RefusedError(
            f"{hosts} hosts for a {kind} run with distributed = 'none', which is one process on one host",
            next=f"set {kind}.distributed = 'ddp', or name one host",
        )
    rows, world, micro = spec[kind]["batch_size"], processes * hosts, spec[kind].get("micro_batch_size")
    if world > rows:
        raise RefusedError(
            f"{hosts} hosts x {kind}.processes = {processes} with batch_size = {rows}: some would never have a row",
            next=f"set {kind}.batch_size = {world} or more, or fewer processes",
        )
    share = -(-rows // world)
    if micro is not None and micro > share:
        raise RefusedError(
            f"{kind}.micro_batch_size = {micro} is more than the {share} rows that each of {hosts} hosts x {processes} "
            f"processes has of batch_size = {rows}",
            next=f"set {kind}.micro_batch_size = {share} or less",
        )
    return processes


_PLAN_AGAIN = "plan again:  latentforge dispatch go"
