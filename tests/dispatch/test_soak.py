"""Random kills and races through the command line, with the real trainer; rounds and seed by the environment."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from latentforge.evidence.verify import verify_evidence
from latentforge.verdicts import Outcome

pytestmark = [pytest.mark.soak, pytest.mark.slow, pytest.mark.timeout(7200)]

ROUNDS = int(os.environ.get("LATENTFORGE_SOAK_ROUNDS", "20"))
SEED = int(os.environ.get("LATENTFORGE_SOAK_SEED", str(time.time_ns() % 10**9)))
_GOES = ("go", "tiny", "--host", "local", "--set", "distill.checkpoint_every=7")


class Home:
    """An operator's machine of its own, on which processes can be found and killed by the HOME that they carry."""

    def __init__(self, folder: Path, checkout: Path) -> None:
        self.folder, self.checkout = folder, checkout
        folder.mkdir()
        self.state = folder / "state" / "latentforge"
        keep = {name: value for name, value in os.environ.items() if not name.startswith("GX10_")}
        self.env = {**keep, "HOME": str(folder), "XDG_STATE_HOME": str(folder / "state"), "OMP_NUM_THREADS": "1"}
        self.env |= {"XDG_CONFIG_HOME": str(folder / "config"), "EVIDENCE_DIR": str(folder / "runs")}

    def start(self, *more: str) -> subprocess.Popen[str]:
        argv = [sys.executable, "-P", "-m", "latentforge", "dispatch", *_GOES, *more]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            argv, cwd=self.folder, env=self.env, text=True, stdout=pipe, stderr=subprocess.STDOUT, process_group=0
        )

    def go(self, *more: str) -> tuple[int, str]:
        process = self.start(*more)
        said, _ = process.communicate(timeout=300)
        return process.returncode, said

    def processes(self) -> list[int]:
        """Everything that is alive on this machine: commands, agents, supervisors, trainers."""
        mark, found = f"HOME={self.folder}".encode(), []
        for name in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                if mark in Path(f"/proc/{name}/environ").read_bytes().split(b"\0"):
                    found.append(int(name))
        return sorted(found)

    def runs(self, kind: str) -> list[Path]:
        return sorted((self.state / "runs").glob(f"{kind}-*"))

    def starts(self) -> dict[str, int]:
        """How often each run's process was started, by the host's own journal."""
        journals = (self.state / "runs").glob("*/journal.jsonl")
        return {path.parent.name: path.read_bytes().count(b'"started"') for path in journals}

    def result(self, said: str) -> tuple[dict[tuple[str, int], str], str]:
        """The losses that the final run tells, to the last bit, and the digest of its student."""
        run = re.findall(r"F-DISTILL-SMOKE-002 PASS run=(distill-[0-9a-f]{20})", said)[-1]
        copy = self.folder / "runs" / run
        assert verify_evidence(copy).outcome is Outcome.PASS
        events = [json.loads(line) for line in (copy / "events.jsonl").read_bytes().splitlines()]
        steps = [event for event in events if event["kind"] == "step"]
        files = json.loads((copy / "artifacts.json").read_bytes())["files"]
        student = next(one["sha256"] for one in files if one["path"] == "out/student/model.safetensors")
        return {(one["model"], one["step"]): float(one["loss"]).hex() for one in steps}, student


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, checkout: Path) -> tuple[Home, dict[Any, str], str, float]:
    """A run that nobody killed: its losses, its student's digest, and how long it took."""
    home = Home(tmp_path_factory.mktemp("undisturbed") / "home", checkout)
    begin = time.monotonic()
    code, said = home.go()
    assert code == 0, said
    losses, student = home.result(said)
    assert len(losses) == 120
    return home, losses, student, time.monotonic() - begin


def _moment(home: Home, rng: random.Random, seconds: float) -> str:
    """Wait for a random moment: a time, or a step of the final run."""
    if rng.random() < 0.4:
        delay = rng.uniform(0.3, seconds)
        time.sleep(delay)
        return f"after {delay:.2f} s"
    step, model = rng.randint(1, 60), rng.choice(("student", "twin"))
    mark = re.compile(rf'"step": {step}, .*"model": "{model}"')
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and home.processes():
        for run in home.runs("distill"):
            with contextlib.suppress(OSError):
                if mark.search((run / "events.jsonl").read_text()):
                    return f"at step {step} of the {model}"
        time.sleep(0.002)
    return f"at step {step} of the {model}, which it was too late for"


def _kill(home: Home, rng: random.Random) -> str:
    alive = home.processes()
    victims = [pid for pid in alive if rng.random() < 0.5] or alive[:1]
    names = []
    for pid in victims:
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            names.append(next((w for w in (b"supervise", b"run", b"go") if w in words), b"agent").decode())
            os.kill(pid, signal.SIGKILL)
    return f"{len(victims)} of {len(alive)} ({', '.join(names)})"


def test_killed_anywhere_at_random_it_tells_the_truth_and_resumes_with_the_same_losses_bit_for_bit(
    undisturbed: tuple[Home, dict[Any, str], str, float], checkout: Path, tmp_path: Path
) -> None:
    reference, losses, student, seconds = undisturbed
    for number in range(ROUNDS):
        rng = random.Random(SEED + number)
        home = Home(tmp_path / f"home{number}", checkout)
        shortcut = rng.random() < 0.6
        if shortcut:  # straight to the final run
            for run in (one for kind in ("data", "teacher", "score") for one in reference.runs(kind)):
                shutil.copytree(run, home.state / "runs" / run.name)
            for folder in (home.state, home.state / "runs"):
                folder.chmod(0o700)
        story = [f"round {number}, seed {SEED + number}"]
        process = home.start()
        story.append(f"killed {_moment(home, rng, seconds / 3 if shortcut else seconds)}")
        story.append(_kill(home, rng))
        first, _ = process.communicate(timeout=300)
        story.append(f"the command ended with {process.returncode}")
        code, said = home.go()
        for _ in range(8):
            told = "\n".join([*story, f"then {code}", first[-1500:], said[-3000:]])
            assert "Traceback" not in said, told
            assert (code == 0) == ("manifest.json  verified, unsigned" in said and "SMOKE-002 PASS" in said), told
            assert code in (0, 3, 5), told
            if code == 0:
                break
            # An ended run is reported again, with the same code, and nothing is started by that.
            starts = home.starts()
            assert home.go()[0] == code, told
            assert home.starts() == starts, told
            story.append(f"then {code}")
            code, said = home.go("--attempt", "next")
        told = "\n".join([*story, said[-3000:]])
        assert code == 0, told
        assert max(home.starts().values()) == 1, told
        resumed, weights = home.result(said)
        different = {key: (losses.get(key), resumed.get(key)) for key in losses if losses[key] != resumed.get(key)}
        assert not different, told
        assert resumed == losses, told
        assert weights == student, told
        again, _said = home.go()
        assert again == 0, told
        assert home.processes() == [], told
        print("; ".join([*story, f"then 0, {len(home.runs('distill'))} attempts"]), flush=True)
        shutil.rmtree(home.folder)


def test_however_many_start_at_once_and_are_killed_there_is_one_run_and_each_tells_the_truth(
    undisturbed: tuple[Home, dict[Any, str], str, float], checkout: Path, tmp_path: Path
) -> None:
    _reference, losses, student, seconds = undisturbed
    for number in range(max(1, ROUNDS // 4)):
        rng = random.Random(SEED - 1 - number)
        home = Home(tmp_path / f"home{number}", checkout)
        racing = []
        for _ in range(rng.choice((2, 5))):
            racing.append(home.start())
            time.sleep(rng.choice((0.0, rng.uniform(0, 0.4))))
        killed = rng.sample(racing, rng.randint(0, len(racing) - 1))
        for victim in killed:
            time.sleep(rng.uniform(0, seconds / 4))
            victim.kill()
        ends = [(one, one.communicate(timeout=300)[0]) for one in racing]
        told = f"seed {SEED - 1 - number}\n" + "\n----\n".join(f"{one.returncode} {said[-1500:]}" for one, said in ends)
        for one, said in ends:
            assert one in killed or one.returncode == 0, told
            assert (one.returncode == 0) == ("manifest.json  verified, unsigned" in said), told
        code, said = home.go()
        assert code == 0, told + said
        assert [path.name.partition("-")[0] for path in sorted((home.state / "runs").iterdir())] == [
            *("data", "distill", "score", "teacher")
        ]
        assert set(home.starts().values()) == {1}, told
        assert home.result(said) == (losses, student)
        assert home.processes() == []
        print(f"{len(racing)} at once, {len(killed)} killed: one run, seed {SEED - 1 - number}", flush=True)
        shutil.rmtree(home.folder)
