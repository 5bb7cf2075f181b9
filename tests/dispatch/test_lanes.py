"""Lanes: the run is where it is, else on the first host that is fit, and never on two."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dispatch.hosts.facts import RunState
from dispatch.hosts.inventory import Host, Inventory
from dispatch.lanes.choose import LaneSeen, choose_lane
from dispatch.lanes.each import HostResult, results_table
from dispatch.lanes.names import several
from dispatch.places import Places
from dispatch.planning.choice import ChosenRun
from dispatch.planning.plan import Plan, Refusal
from latentforge.errors import LatentForgeError, RefusedError, TransportError
from latentforge.verdicts import ExitCode

Make = Callable[..., Any]
RUN = "distill-" + "a" * 20


def lane(
    name: str,
    state: str = "absent",
    outcome: str | None = None,
    *,
    refused: Refusal | None = None,
    busy: str | None = None,
) -> LaneSeen:
    """A lane that answered, on which the run is in that state."""
    found = RunState(state=state, outcome=outcome)
    will: Any = "run" if state == "absent" else "follow" if found.going_on else "keep" if found.passed else "ended"
    run = ChosenRun("distill", RUN, "{}", "k", {}, will, "because", found)
    refusals = (refused,) if refused else ()
    # What else a plan says is no part of the choice.
    rest: dict[str, Any] = {field.name: None for field in dataclasses.fields(Plan)}
    plan = Plan(**{**rest, "host": name, "steps": (), "runs": (run,), "refusals": refusals, "busy": busy})
    return LaneSeen(name, plan)


def away(name: str, given: str | None = None) -> LaneSeen:
    """A lane that does not answer."""
    return LaneSeen(name, None, TransportError(f"{name}: nothing listens on port 22", next=f"ping {name}"), given)


def unplanned(name: str, **states: str) -> LaneSeen:
    """A lane that answers, and cannot be planned on."""
    said = {run: RunState(state=state) for run, state in states.items()}
    return LaneSeen(name, None, RefusedError("teacher.model = '/m': there is no such folder"), None, said)


def chosen(*seen: LaneSeen, abandon: bool = False) -> tuple[str, str]:
    found = choose_lane(seen, abandon=abandon, command="latentforge dispatch go tiny --lanes x")
    return found.chosen, found.text


UNFIT = Refusal("preflight: disk: less than 2 GiB free", "free some", ExitCode.FAIL)
BUSY = Refusal("the device lease of a is held by teacher-1", "wait", ExitCode.BUSY)


def test_the_first_lane_that_is_fit_takes_the_run_and_those_before_it_are_told_with_their_reasons() -> None:
    assert chosen(lane("a"), lane("b")) == ("a", "a of a, b: first that is fit")
    assert chosen(lane("a", refused=UNFIT), unplanned("b", run="absent"), lane("c")) == (
        "c",
        "c of a, b, c: first that is fit; a: preflight: disk: less than 2 GiB free; "
        "b: teacher.model = '/m': there is no such folder",
    )
    assert chosen(lane("a", refused=BUSY), lane("b"))[0] == "b"


@pytest.mark.parametrize(
    ("state", "outcome"), [("running", None), ("queued", None), ("finished", "pass"), ("lost", None)]
)
def test_a_run_that_is_on_a_later_lane_is_found_there_and_not_started_twice(state: str, outcome: str | None) -> None:
    assert chosen(lane("a"), lane("b", state, outcome))[0] == "b"
    assert chosen(away("a"), lane("b", state, outcome))[0] == "b"


def test_one_that_goes_on_goes_before_one_that_passed_and_that_before_one_that_ended() -> None:
    ended, passed, going = lane("a", "finished", "fail"), lane("b", "finished", "pass"), lane("c", "running")
    assert chosen(ended, passed, going)[0] == "c"
    assert chosen(ended, passed)[0] == "b"
    assert chosen(lane("x"), ended)[0] == "a"


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize(
    ("first", "why", "may_have"),
    [
        (away("a", given=RUN), f"lane a cannot be asked, and may have {RUN}, which this laptop gave it", RUN),
        # Another laptop may have given it, or this one before it lost its records: the host alone knows.
        (away("a"), "lane a cannot be asked, and may have the run, from another laptop say", "the run"),
        (unplanned("a", r1="running"), "lane a has r1, and cannot be planned on: teacher.model", "r1"),
    ],
)
def test_an_unreachable_lane_that_may_have_the_run_blocks_the_others_unless_it_is_abandoned(
    order: int, first: LaneSeen, why: str, may_have: str
) -> None:
    seen = [first, lane("b")]
    seen = seen if order == 0 else seen[::-1]
    with pytest.raises(LatentForgeError, match=why) as blocked:
        chosen(*seen)
    assert blocked.value.code is ExitCode.UNKNOWN
    assert str(blocked.value.next).endswith("--abandon")
    name, text = chosen(*seen, abandon=True)
    assert name == "b"
    assert order == 1 or f"abandoned, though it may have {may_have}" in text


def test_a_lane_that_has_the_run_is_no_reason_to_wait_for_one_that_is_away() -> None:
    assert chosen(away("a", given=RUN), lane("b", "running"))[0] == "b"
    with pytest.raises(LatentForgeError, match="may have"):
        chosen(away("a", given=RUN), lane("b", "finished", "fail"))
    assert chosen(away("a"), lane("b", "finished", "fail"))[0] == "b"  # it is reported; nothing is started
    again = lane("b", "finished", "fail")
    assert again.plan is not None
    anew = dataclasses.replace(again.plan, runs=(dataclasses.replace(again.plan.runs[0], will="run"),))
    with pytest.raises(LatentForgeError, match="may have the run"):
        chosen(away("a"), LaneSeen("b", anew))


def test_a_free_lane_goes_before_a_busy_one_that_would_be_waited_for() -> None:
    assert chosen(lane("a", busy="teacher-1"), lane("b")) == (
        "b",
        "b of a, b: first that is fit; a: device lease held by teacher-1",
    )
    assert chosen(lane("a", busy="teacher-1"), lane("b", refused=UNFIT))[0] == "a"


@pytest.mark.parametrize(
    ("seen", "code"),
    [
        ((away("a"), lane("b", refused=BUSY)), ExitCode.BUSY),
        ((away("a"), lane("b", refused=UNFIT)), ExitCode.FAIL),
        ((away("a"), away("b")), ExitCode.TRANSPORT),
    ],
)
def test_where_no_lane_can_every_reason_is_told(seen: tuple[LaneSeen, ...], code: ExitCode) -> None:
    with pytest.raises(RefusedError, match=r"no lane can take the run:\n  a: .*\n  b: ") as refused:
        chosen(*seen)
    assert refused.value.code is code
    assert (str(refused.value.next).endswith("--wait")) == (code is ExitCode.BUSY)


def inventory(tmp_path: Path, lanes: str = "") -> Inventory:
    places = Places(tmp_path, tmp_path / "state", tmp_path / "runs")
    places.hosts_file.write_text(f"{lanes}\n[hosts.a]\naddress = 'x'\n[hosts.b]\naddress = 'y'\n")
    return Inventory.load(places)


def test_lanes_are_named_on_the_command_line_or_in_the_inventory(tmp_path: Path) -> None:
    known = inventory(tmp_path, '[lanes]\nnight = ["b", "local", "a"]')
    assert [host.name for host in several("night", "--lanes", known, {})] == ["b", "local", "a"]
    assert [host.name for host in several("a, b", "--lanes", known, {"GX10_USER": "u"})] == ["a", "b"]
    assert several("a", "--lanes", known, {"GX10_USER": "u"})[0].user == "u"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a,c", "host 'c' is not enrolled"),
        ("a,a", "names 'a' twice"),
        ("a,", "holds an empty name"),
        ("nigth", "neither a host nor a lane .*did you mean 'night'"),
    ],
)
def test_a_list_of_hosts_that_cannot_be_meant_is_refused(tmp_path: Path, text: str, why: str) -> None:
    with pytest.raises(RefusedError) as refused:
        several(text, "--each", inventory(tmp_path, '[lanes]\nnight = ["a"]'), {})
    assert re.search(why, f"{refused.value} {refused.value.next}")


@pytest.mark.parametrize(
    ("lanes", "why"),
    [
        ("lanes = 3", "is not a table"),
        ('[lanes]\na = ["b"]', "lanes.a has the name of a host"),
        ('[lanes]\nn = "a"', "is not a list of host names"),
        ("[lanes]\nn = []", "is not a list of host names"),
        ('[lanes]\nn = ["a", "a"]', "names 'a' twice"),
        ('[lanes]\nn = ["c"]', "names 'c', which is not one of its hosts"),
    ],
)
def test_a_lane_that_cannot_be_meant_is_refused_with_its_field(tmp_path: Path, lanes: str, why: str) -> None:
    with pytest.raises(RefusedError, match=why):
        inventory(tmp_path, lanes)


def test_a_host_that_is_enrolled_keeps_the_lanes(tmp_path: Path) -> None:
    known = inventory(tmp_path, '[lanes]\nnight = ["b", "a"]')
    known.put(Host(name="c", address="z"))
    assert Inventory.load(Places(tmp_path, tmp_path / "state", tmp_path / "runs")).lanes == {"night": ("b", "a")}


@pytest.mark.parametrize("words", [("--host", "a,b"), ()])
def test_one_run_on_several_hosts_is_refused_with_the_reason_and_both_alternatives(laptop: Any, words: Any) -> None:
    key = '{ type = "ssh-ed25519", sha256 = "SHA256:' + "Q" * 43 + '", date = "2026-11-22" }'
    tables = [f'[hosts.{name}]\naddress = "127.0.0.1"\nport = 1\nlink = "eth9"\nkeys = [{key}]' for name in "ab"]
    laptop.places.hosts_file.parent.mkdir(parents=True)
    laptop.places.hosts_file.write_text("\n".join(tables))
    done = laptop.cli("plan", "tiny", *words, **({} if words else {"GX10_HOST": "a,b"}))
    assert done.returncode == 2
    assert "no stage of tiny is spread over processes (distributed = none)" in done.stderr
    assert "--lanes a,b" in done.stderr
    assert "--each a,b" in done.stderr


@pytest.fixture
def pair(shared_sshd: Any, enrolled: Make, built: Make, ask: Make, tmp_path: Path) -> tuple[Host, Host]:
    """Two hosts behind one server, each with a state root of its own."""
    hosts = tuple(enrolled(shared_sshd, name, tmp_path / name) for name in ("a", "b"))
    for host in hosts:
        built(host, ask(host))
    return hosts[0], hosts[1]


@pytest.mark.sshd
def test_go_with_lanes_runs_once_wherever_the_run_already_is_and_the_manifest_says_why_there(
    pair: tuple[Host, Host], jobs: Any, ask: Make, session: Make, laptop: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    from dispatch.lanes.survey import ask_for_lane

    def asks(*names: str, **more: Any) -> list[Any]:
        by_name = {host.name: host for host in pair}
        return [ask(by_name[name], lanes=names, **more) for name in names]

    first = ask_for_lane(asks("b", "a"), laptop.places, abandon=False)
    assert first.lane.text == "b of b, a: first that is fit"
    assert session(first.host).go(first) is ExitCode.PASS
    out = capsys.readouterr().out
    assert "\n  lane       keep    b of b, a: first that is fit\n" in out
    again = ask_for_lane(asks("a", "b"), laptop.places, abandon=False)
    assert again.host.name == "b", "the run is there already, though a is fit and comes first"
    assert session(again.host).go(again) is ExitCode.PASS
    assert len(jobs.starts()) == 4
    run = jobs.starts()[-1]
    manifest = json.loads((laptop.places.run(run) / "manifest.json").read_text())
    assert manifest["predicate"]["plan"]["lanes"]["chosen"] == "b"


@pytest.mark.sshd
@pytest.mark.usefixtures("pair")
def test_a_lane_that_is_away_is_passed_over_only_where_the_operator_says_so(
    jobs: Any, ask: Make, laptop: Any, sshd_at: Make, enrolled: Make, tmp_path: Path, checkout: Path
) -> None:
    from dispatch.records import remember
    from latentforge.spec.pipeline import pipeline_runs

    server = sshd_at()
    gone = enrolled(server, "gone", tmp_path / "gone")
    server.stop()
    done = laptop.cli("plan", "tiny", "--lanes", "gone,b", cwd=checkout)
    assert done.returncode == 3
    assert "lane gone cannot be asked, and may have the run" in done.stderr
    assert "go tiny --lanes gone,b --abandon" in done.stderr
    request = ask(gone)
    last = pipeline_runs(request.spec, digests={}, code=request.code, lock=request.lock)[-1].run_id
    remember(laptop.places, gone, [last], recipe="tiny", plan="p")
    done = laptop.cli("plan", "tiny", "--lanes", "gone,b", cwd=checkout)
    assert done.returncode == 3
    assert f"lane gone cannot be asked, and may have {last}" in done.stderr
    done = laptop.cli("plan", "tiny", "--lanes", "gone,b", "--abandon", cwd=checkout)
    assert done.returncode == 0, done.stderr
    assert "lane       keep    b of gone, b: first that is fit; gone: unreachable: gone" in done.stdout
    assert f"abandoned, though it may have {last}" in done.stdout
    assert "go tiny --lanes gone,b --abandon" in done.stdout


def test_a_host_s_error_is_told_whole_in_the_table_of_many() -> None:
    error = TransportError("host key of b changed\n  pinned   X\n  offered  Y", next="this\nor that")
    found = {"b": HostResult("b", None, error, 0.1), "long": HostResult("long", "fine", None, 0.1)}
    assert results_table(found, str) == [
        "b     error: host key of b changed",
        "        pinned   X",
        "        offered  Y",
        "        next: this",
        "              or that",
        "long  fine",
    ]
