"""The kernels' warm-up: a run of its own after a build, before any training process may load what was built.

It is asked for once for a build and a machine (driver, architecture, GPUs). On a machine with GPUs it proves every
kernel; on one without, the kernel of the pipeline's own loss, since the rest needs no proof there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from dispatch.building.build import BuildChoice, BuildNames
from dispatch.hosts.facts import HostFacts, KinRun, Machine, RunState, moment
from dispatch.planning.ask import Ask
from dispatch.planning.choice import MAX_ATTEMPTS, told_end
from latentforge.spec.canonical import canonical_sha256
from latentforge.spec.identity import RunIdentity

WarmWill = Literal["keep", "run", "follow", "ended", "skip"]


@dataclass(frozen=True)
class WarmUp:
    """The warm-up that a plan stands on, and what will be done about it."""

    run: str
    identity: str
    kin: str
    only: tuple[str, ...]
    will: WarmWill
    because: str
    again: bool = False

    def argv(self, python: str) -> list[str]:
        """The command of its run."""
        words = [word for name in self.only for word in ("--only", name)]
        return [python, "-P", "-m", "latentforge", "kernels", "warmup", *words]


def warmup_kin(ask: Ask) -> str:
    """What all warm-ups of one build have in common, on whatever machine."""
    return canonical_sha256({"kind": "warmup", "build": BuildNames.of(ask).build, "code": ask.code, "lock": ask.lock})


def kernels(ask: Ask, machine: Machine) -> tuple[str, ...]:
    """The kernels to prove, as the guard names them; none named means all of them."""
    if machine.gpus:
        return ()
    spec, wanted = ask.spec, []
    if spec.through != "distill":
        wanted = ["cpu/linear_kd_loss.fp32.dense", "cpu/latent_decode.fp32.float"]
    if spec.through == "latent":
        rows = "topk" if spec.latent.takes_rows else "dense"
        wanted.append(f"cpu/linear_kd_loss.{spec.latent.precision}.{rows}")
    if spec.distils:
        distill = spec.distill
        rows = "topk" if distill.targets == "store" else "dense"
        wanted.append(f"cpu/kd_loss.{distill.precision}.{rows}.{distill.direction}")
    if spec.benches:
        wanted.append("cpu/latent_decode.fp32.float")
    return tuple(dict.fromkeys(wanted))


def warmup_identity(ask: Ask, machine: Machine) -> RunIdentity:
    """What a warm-up means: the build, the machine as far as a kernel sees it, and which kernels."""
    gpus = sorted(f"{gpu.get('name')} {gpu.get('compute_cap')}" for gpu in machine.gpus)
    spec = {"build": BuildNames.of(ask).build, "arch": machine.arch, "driver": machine.driver, "gpus": gpus}
    return RunIdentity(
        kind=cast(Any, "warmup"),  # a run like any other, but no part of a pipeline
        spec={"warmup": {**spec, "only": list(kernels(ask, machine))}},
        inputs={},
        code=ask.code,
        lock=ask.lock,
    )


def choose_warmup(ask: Ask, facts: HostFacts, build: BuildChoice, *, wanted: bool) -> WarmUp:
    """The warm-up for a request: kept where it passed, else run; one that ended otherwise is reported, not repeated."""
    kin, identity, only = warmup_kin(ask), warmup_identity(ask, facts.host), kernels(ask, facts.host)
    attempt, last = _latest(identity, facts.kin_runs.get(kin, ()))

    def choice(will: WarmWill, because: str, number: int = attempt, *, again: bool = False) -> WarmUp:
        one = identity.at_attempt(number)
        return WarmUp(one.run_id, one.canonical.decode(), kin, only, will, because, again)

    state = RunState(state="absent") if last is None else RunState.model_validate(last.model_dump())
    if state.passed:
        return choice("keep", f"its kernels were proven here {moment(state.ended)}")
    if state.going_on:
        return choice("follow", "it goes on")
    if not wanted:
        return choice("keep", "not needed")
    if build.will == "ended":
        return choice("skip", "there is no build")
    if state.has_ended:
        if ask.attempt_next:
            return choice(
                "run", f"attempt {attempt + 1}, after one that ended: {told_end(state)}", attempt + 1, again=True
            )
        return choice("ended", told_end(state))
    what = "all kernels" if not only else ", ".join(only)
    return choice("run", f"{what} of this build, in children, before anything trains with them")


def _latest(identity: RunIdentity, there: Sequence[KinRun]) -> tuple[int, KinRun | None]:
    by_id = {one.id: one for one in there if one.state != "absent"}
    for number in range(min(MAX_ATTEMPTS, len(by_id) + 1), 0, -1):
        found = by_id.get(identity.at_attempt(number).run_id)
        if found is not None:
            return number, found
    return 1, None
