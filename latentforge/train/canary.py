"""What a full run asks of the canary that it names: the same training, the same code, and every gate passed."""

from __future__ import annotations

from typing import cast

from latentforge.errors import RefusedError
from latentforge.events import read_events
from latentforge.spec.canary import REQUIRED, Trained, canary_key
from latentforge.spec.identity import RunIdentity
from latentforge.spec.run import RunDir


def require_canary(run: RunDir, identity: RunIdentity) -> None:
    """Refuse a full run whose input ``canary`` is none, stands for other training or code, or did not pass.

    Boot and driver are the plan's to judge: they are of the host, and what a run reads is its folder.
    """
    if identity.spec["profile"] != "full" or identity.is_canary:
        return
    source = run.input_run("canary") if run.has_input("canary") else None
    if source is None:
        raise _refused(f"{run.run} is a full run without a canary")
    canary, kind = source.load_identity(), cast(Trained, identity.kind)
    wanted = f"sha256:{canary_key(kind, int(identity.spec['seed']), identity.spec[kind])}"
    if canary.inputs.get("stands_for") != wanted:
        raise _refused(f"{source.run} is no canary of {run.run}: it stands for other training")
    for name, its, ours in (("code", canary.code, identity.code), ("lock file", canary.lock, identity.lock)):
        if its != ours:
            raise _refused(f"{source.run} is no canary of {run.run}: its {name} is {its[:12]}…, not {ours[:12]}…")
    events = read_events(source.events_file) if source.events_file.is_file() else []
    own = [one for one in events if one.kind == "verdict" and one.run == source.run]
    verdicts = dict.fromkeys(REQUIRED[kind], "unknown")
    verdicts |= {one.fields["falsifier"]: one.fields["outcome"] for one in own}
    against = sorted(name for name, outcome in verdicts.items() if outcome != "pass")
    if against:
        raise _refused(f"the canary {source.run} did not pass {', '.join(against)}")


def _refused(what: str) -> RefusedError:
    return RefusedError(what, next="plan it as a pipeline:  latentforge dispatch go PIPELINE")
