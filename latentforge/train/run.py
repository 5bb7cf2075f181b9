"""Executing one run folder in this process: checks before, the recipe of its kind, an ``end`` event always."""

from __future__ import annotations

import json
import traceback
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TextIO

import torch

from latentforge.errors import LatentForgeError, RefusedError
from latentforge.events import EventLog, read_events
from latentforge.evidence.digests import file_sha256, tree_files, tree_sha256
from latentforge.evidence.tensors import tensor_digests
from latentforge.memory import MemoryPlan
from latentforge.spec.code import running_code
from latentforge.spec.endurance import endurance_of
from latentforge.spec.fields import HTTP_BACKENDS
from latentforge.spec.identity import RunIdentity
from latentforge.spec.run import RunDir
from latentforge.spec.spread import processes_of
from latentforge.spec.teacher import answers_of, teacher_of
from latentforge.train import effective, memory
from latentforge.train.capping import capped, each_planned
from latentforge.train.held import Peak, watching
from latentforge.train.hosts.follower import take_part
from latentforge.train.hosts.leading import Leading
from latentforge.train.recipes import follow, set_up
from latentforge.train.setting import fit_threads
from latentforge.train.spread import run_spread
from latentforge.train.stopping import Interrupted, handled_signals
from latentforge.verdicts import ExitCode, Outcome, exit_code, meet


def execute(
    path: Path, *, signals: bool = False, text: TextIO | None = None, restarted: int = 0, restarts_left: int = 0
) -> ExitCode:
    """Run the folder ``path`` and return the exit code that it earned, which its ``end`` event also says.

    With ``signals`` SIGTERM and SIGINT end the run in order (exit code 3). RefusedError, with nothing written, where
    the folder is no run or has ended already; every later error ends the run with a message in its log. Its supervisor
    may begin it again where it crashed: it has been ``restarted`` so many times, and goes on from its last checkpoint.
    With ``restarts_left`` a crash is no end yet, and its event is left to the start that follows.
    """
    run = RunDir(path)
    run.load_identity()
    _refuse_second_start(run, restarted)
    with EventLog(run.events_file, run.run, text=text) as log, watching() as watch:
        if restarted:
            log.emit("phase", name="restart", state="end", restarted=restarted, left=restarts_left)
            log.say(f"restart {restarted}, {restarts_left} left")
        leading, then, held = None, None, None
        try:
            with handled_signals(endurance_of(run).stop_grace) if signals else nullcontext():
                leading = Leading.of(run, log)
                planned = _run(run, log, text, leading)
            if planned is not None:
                plan, held = planned
                memory.compare(run, log, plan, held or watch.peak(), before=0 if held else watch.before)
            code, reason = _earned(run), ""
        except Interrupted as error:
            code, reason = ExitCode.UNKNOWN, str(error)
            log.say(f"error: {reason}")
        except LatentForgeError as error:
            code, reason, then = error.code, str(error), error.next
            log.say(f"error: {error}")
            if error.next:
                log.say(f"  next: {error.next}")
        except Exception as error:
            code, reason = ExitCode.CRASHED, f"{type(error).__name__}: {error}"
            log.say(traceback.format_exc().rstrip())
            log.say(f"error: {reason}")
        effective.record(run, timings=log.timings, peak_memory_bytes=(held or watch.peak()).resident)
        if code is ExitCode.CRASHED and restarts_left:
            log.warning(f"crashed: {reason}")
        else:
            log.end(code, reason=reason)
        if leading is not None:
            leading.end(code, reason, then)
    return code


def _run(
    run: RunDir, log: EventLog, text: TextIO | None, leading: Leading | None
) -> tuple[MemoryPlan, Peak | None] | None:
    """Check, plan its memory and follow the recipe of its kind; returns what it was planned to hold, and what its
    processes held where there are several."""
    identity = run.load_identity()
    check_code(identity)
    with log.phase("inputs"):
        inputs = verify_inputs(run)
    seed = set_up(int(identity.spec.get("seed", 0)))
    if identity.kind == "score":
        fit_threads(_scoring_flops(run, identity))
    effective.record(
        run,
        requested=identity.spec,
        code=identity.code,
        inputs=inputs,
        seeds={"run": seed},
        versions=effective.versions(),
        extension=effective.extension(),
        device=effective.device_record(torch.device("cpu")),
    )
    if identity.kind == "follow":
        return take_part(run, log, text=text)
    planned = memory.plan_of(run, identity)
    if planned is not None:
        memory.require_room(run, log, planned)
    processes = processes_of(identity.kind, identity.spec)
    held = None
    if processes is not None:
        held = run_spread(run, log, processes, planned, leading=leading, text=text)
    elif planned is None:
        follow(run, log, identity.kind)
    else:
        with capped(run, log, each_planned(planned)):
            follow(run, log, identity.kind)
    if identity.kind in ("data", "score"):
        effective.record(run, effective=_product_values(run, identity))
    if identity.kind == "score":
        made = json.loads((run.out / "score.json").read_bytes())
        batches = made["sequences"] / identity.spec["score"]["batch_size"]
        effective.record(run, flops={"score": _scoring_flops(run, identity) * batches})
    return None if planned is None else (planned, held)


def check_code(identity: RunIdentity) -> None:
    """Refuse to run a plan of other code: its result would carry the wrong name."""
    found = running_code().digest
    if found != identity.code:
        raise RefusedError(
            f"{identity.run_id} was planned for code {identity.code[:12]}…, this process runs {found[:12]}…",
            next="plan again with this code:  latentforge dispatch go",
        )


def verify_inputs(run: RunDir) -> dict[str, dict[str, Any]]:
    """The inputs by name with their content digests, weights among them tensor by tensor.

    RefusedError where a run that is an input did not pass or changed.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, ref in run.load_launch().resolved.items():
        source = run.input_run(name)
        if source is not None:
            _require_passed(source, name)
            found[name] = {"run": source.run, "sha256": _verified_tree(source), **_tensors(source.out)}
        elif "path" in ref:
            # Hashed again by whoever reads it, and refused there where it changed or is not there.
            found[name] = {"sha256": ref["sha256"], **_tensors(Path(ref["path"]))}
        else:
            found[name] = dict(ref)
    return found


def _tensors(folder: Path) -> dict[str, Any]:
    """The weights below an input's folder, tensor by tensor, as ``tensors``; nothing where there are none."""
    if not folder.is_dir():
        return {}
    files = {name: path for name, path in tree_files(folder) if name.endswith(".safetensors")}
    kept = {name: tensor_digests(path) for name, path in files.items() if not name.startswith("checkpoints/")}
    return {"tensors": kept} if kept else {}


def _require_passed(source: RunDir, name: str) -> None:
    events = read_events(source.events_file) if source.events_file.is_file() else []
    code = events[-1].fields.get("code") if events and events[-1].kind == "end" else None
    if code != 0:
        said = "has not ended" if code is None else f"ended with exit code {code}"
        raise RefusedError(f"input {name!r}: run {source.run} {said}", next="run it again:  latentforge dispatch go")


def _verified_tree(source: RunDir) -> str:
    """The digest of a run's products; refused where one differs from what was recorded when that run ended."""
    if source.artifacts_file.is_file():
        for file in json.loads(source.artifacts_file.read_bytes())["files"]:
            path = source.path / file["path"]
            if not file["path"].startswith("out/"):
                continue
            if not path.is_file() or file_sha256(path) != file["sha256"]:
                raise RefusedError(
                    f"{source.run}: {file['path']} is not what that run wrote",
                    next=f"make {source.run} again with another attempt",
                )
    return made_sha256(source.out)


def made_sha256(out: Path) -> str:
    """The content digest (hex) of a run's ``out`` without its checkpoints: they stay on their host, and what is built
    on the run reads none of them, so a collected copy has the same."""
    return tree_sha256(out, without="checkpoints")


def _refuse_second_start(run: RunDir, restarted: int) -> None:
    if not run.events_file.is_file() or not run.events_file.stat().st_size:
        return
    if not restarted or any(event.kind == "end" for event in read_events(run.events_file)):
        raise RefusedError(
            f"{run.run} was started before",
            next="a new attempt resumes from its last checkpoint:  latentforge dispatch go --attempt next",
        )


def _earned(run: RunDir) -> ExitCode:
    """The code that follows from the verdicts in the event log; a run that has none passes by ending."""
    outcomes = [Outcome[e.fields["outcome"].upper()] for e in read_events(run.events_file) if e.kind == "verdict"]
    return exit_code(meet(outcomes)) if outcomes else ExitCode.PASS


def _scoring_flops(run: RunDir, identity: RunIdentity) -> float:
    """Operations of one scored batch, by the size of the teacher's files."""
    data = json.loads((run.input_path("data") / "data.json").read_bytes())
    if identity.spec["teacher"]["backend"] in HTTP_BACKENDS:
        return 0.0  # computed elsewhere
    folder = run.input_path("teacher")
    # Of a run of ours its checkpoints, with the optimiser's moments, lie below the same folder.
    folder = folder if run.input_run("teacher") is None else folder / "model"
    weights = sum(file.stat().st_size / 4 for file in folder.glob("*.safetensors"))
    return float(2.0 * weights * identity.spec["score"]["batch_size"] * data["sequence_length"])


def _product_values(run: RunDir, identity: RunIdentity) -> dict[str, Any]:
    """What a data or score run really made, read back from its product."""
    if identity.kind == "data":
        made = json.loads((run.out / "data.json").read_bytes())
        kept: tuple[str, ...] = ("sequence_length", "train_sequences", "heldout_sequences")
        # A teacher's own tokenizer has the size it has; then the asked one does not apply.
        kept = kept if run.has_input("tokenizer") else (*kept, "vocab_size")
        ref = run.input_ref("corpus")
        # The recipe has hashed a corpus of the user's again and refused another one.
        corpus = made["corpus"]["kind"] if "builtin" in ref else f"sha256:{ref['sha256']}"
        # What a recipe that knows no other way did: the corpus's documents, one after the other, and no BOS.
        ways = {"documents": made.get("documents_from", "corpus"), "bos": made.get("bos", "none")}
        ways["chunk"] = made.get("chunk", 1)
        # A run that asks no one cuts no answer: the value as it was asked for.
        ways["answer_tokens"] = made.get("answer_tokens", identity.spec["data"]["answer_tokens"])
        asks = {"teacher": answers_of(teacher_of(run)), "score": {"k": made["k"]}} if "k" in made else {}
        data = {"corpus": corpus, **ways, **{name: made[name] for name in kept}}
        return {"seed": torch.initial_seed(), "data": data, **asks}
    made = json.loads((run.out / "score.json").read_bytes())
    kept = ("temperatures", "batch_size", "mode", "draws", "rounding", "ttl_days", "max_bytes")
    # Drawn rows are as wide as their draws; then the asked k does not apply.
    kept = kept if made["mode"] == "sample" else ("k", *kept)
    score = {name: made[name] for name in kept}
    across = {"cross_tokenizer": True} if made.get("cross_tokenizer") else {}
    return {"seed": torch.initial_seed(), "score": score, "teacher": made["teacher"], **across}
