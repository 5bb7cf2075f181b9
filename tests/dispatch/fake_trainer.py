"""Stands in for a trainer: writes the events, files and lines of one, as slowly and as badly as it is told to.

Run by the real agent as ``python fake_trainer.py <run folder> <json of behaviour>``. What it can be told:
``steps``; ``wait_at`` a step, or ``hang_in`` ("start", "load", "warm-up") until the file ``gate`` is there, by
a busy loop if ``spin``, for ``patience`` seconds at most; ``losses`` and lines to ``say`` by step; ``noise``; ``fail``,
or ``exit`` with a ``reason``; a ``stamp`` of the time after each step and a pause of so many seconds; ``no_end``,
``no_verdict``, or one more ``verdict`` by its falsifier; ``effective`` fields; raw ``forged`` lines for its own event
log; ``checkpoint`` fields at its last one.
"""

import hashlib
import json
import os
import sys
import time
from pathlib import Path

from latentforge.events import EventLog
from latentforge.spec.run import RunDir
from latentforge.verdicts import ExitCode, Outcome, Verdict


def wait_for(path: str, seconds: float = 60.0, *, spin: bool = False) -> None:
    """Go on when the test says so."""
    deadline = time.monotonic() + seconds
    while not os.path.exists(path):
        if time.monotonic() > deadline:
            raise SystemExit(f"nobody made {path}")
        if not spin:
            time.sleep(0.01)


def main() -> int:
    """Train nothing, convincingly."""
    run, how = RunDir(Path(sys.argv[1])), json.loads(sys.argv[2])
    steps = how.get("steps", 20)

    def wait() -> None:
        wait_for(how["gate"], how.get("patience", 60.0), spin=bool(how.get("spin")))

    def hang(where: str) -> None:
        if how.get("hang_in") == where:
            wait()

    if "starts" in how:
        with open(how["starts"], "a") as file:
            file.write(f"{run.run}\n")
    hang("start")
    with EventLog(run.events_file, run.run) as log:
        spec = run.load_identity().spec
        effective = {"requested": spec, "effective": spec, "seeds": {}, "timings": {}, **how.get("effective", {})}
        run.effective_file.write_text(json.dumps(effective))
        with log.phase("load"):
            hang("load")
            for name in how.get("digest_of", []):
                (run.out / f"{name}.sha256").write_text(hashlib.sha256(os.environ[name].encode()).hexdigest())
            (run.out / "student").mkdir(parents=True, exist_ok=True)
            (run.out / "student" / "model.safetensors").write_bytes(b"weights " * 1000)
        hang("warm-up")
        for step in range(1, steps + 1):
            if how.get("wait_at") == step:
                wait()
            log.step(
                step,
                steps,
                model="student",
                loss=float(how.get("losses", {}).get(str(step), 5.0 - step / steps)),
                learning_rate=1e-3,
                rows=31,
                tokens_per_second=1e4,
            )
            for line in how.get("say", {}).get(str(step), []):
                log.say(line)
            if "stamp" in how:
                time.sleep(how["stamp"])
                log.say(f"stamp {time.time():.3f}")
            if how.get("noise"):
                log.say("ünïcödé " * 40)
        if "checkpoint" in how:
            log.checkpoint(steps, path="checkpoints/1", **how["checkpoint"])
        for line in how.get("forged", []):
            with open(run.events_file, "a") as file:
                file.write(line.replace("RUN", run.run) + "\n")
        if "exit" in how:
            log.end(ExitCode(how["exit"]), reason=how.get("reason", ""))
            return int(how["exit"])
        outcome = Outcome.FAIL if how.get("fail") else Outcome.PASS
        if run.kind == "distill" and not how.get("no_verdict"):
            log.verdict(Verdict("F-DISTILL-SMOKE-001", outcome, "val_loss 4.0 < 5.0 at step 20", {}, run.run))
        if "verdict" in how:
            log.verdict(Verdict(how["verdict"], outcome, f"said by {run.kind}", {"value": 1}, run.run))
        code = ExitCode.FAIL if outcome is Outcome.FAIL else ExitCode.PASS
        if not how.get("no_end"):
            log.end(code)
        return int(code)


if __name__ == "__main__":
    sys.exit(main())
