"""What a pipeline needs: memory by the closed form and its terms, disk and inodes, and abilities by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dispatch.hosts.facts import HostFacts
from dispatch.hosts.inventory import Host
from dispatch.planning.ask import Ask, asked
from dispatch.planning.memory import judge_memory
from dispatch.preflight.asking import check_ids, check_waivers, question
from dispatch.preflight.facts import Capabilities, Model
from dispatch.preflight.judge import judge
from dispatch.preflight.need import attention_note, need_of
from latentforge.errors import RefusedError
from latentforge.memory import ModelShape, kv_bytes
from latentforge.spec.capabilities import missing, wanted_of

Facts = Callable[..., HostFacts]
CHECKOUT = Path(__file__).resolve().parents[2]
GIB = 2**30
# 14 heads, 24 layers, 32768 positions: the model whose scratch was sized by its positions (60 GB a block).
CONFIG = {
    "model_type": "qwen2", "vocab_size": 151_936, "num_hidden_layers": 24, "hidden_size": 896,
    "num_attention_heads": 14, "num_key_value_heads": 2, "intermediate_size": 4864, "tie_word_embeddings": True,
    "max_position_embeddings": 32_768,
}  # fmt: skip


def ask_for(*overrides: str, host: Host | None = None, recipe: str = "tiny") -> Ask:
    made = asked(recipe, host or Host(name="local"), env={}, overrides=overrides, folder=CHECKOUT)
    return replace(made, unfit=None)


def with_model(facts: HostFacts, config: dict[str, Any] | None, **more: Any) -> HostFacts:
    assert facts.preflight is not None
    models = {
        "/m/teacher": Model(config=config, bytes=1 << 30, **more),
        "/m/student": Model(config=config, bytes=1 << 30),
    }
    return facts.model_copy(update={"preflight": facts.preflight.model_copy(update={"models": models})})


def long_context(length: int) -> Ask:
    return ask_for(
        "teacher.model=/m/teacher", "distill.student.init=/m/student", f"data.sequence_length={length}",
        "data.train_sequences=64", "data.heldout_sequences=4", "score.batch_size=1", "distill.batch_size=1",
    )  # fmt: skip


def test_attention_over_all_positions_is_refused_at_128_gb_with_each_term_and_a_cap_is_accepted(
    facts_with: Facts,
) -> None:
    machine = {"mem_total": 128 * 10**9, "mem_available": 120 * 10**9}
    facts = with_model(facts_with(machine=machine), CONFIG)
    report = judge(facts, long_context(32_768))
    found = report["memory"]
    assert found.outcome == "fail"
    assert found.stops
    assert "attention 14 heads x 32768^2 x 4 B = 60.1 GB a sequence and block, 24 blocks" in found.measured
    for term in ("teacher", "student", "states", "activations", "logits", "attention", "runtime", "margin"):
        assert f"{term} " in found.measured, term
    assert judge(facts, long_context(2048))["memory"].outcome == "pass"
    assert judge_memory(long_context(32_768), facts).ok is False
    assert judge_memory(long_context(2048), facts).ok is True


def test_the_60_gb_of_one_block_and_the_keys_and_values_of_a_token_are_as_counted_by_hand() -> None:
    shape = ModelShape.from_config(CONFIG)
    assert "= 60.1 GB a sequence and block" in attention_note(shape, 32_768)
    assert "= 0.2 GB a sequence and block" in attention_note(shape, 2048)
    # 12 attention layers x 2 heads x 256 x 2 x 2 B = 24 KiB a token.
    next_80b = ModelShape(151_936, layers=12, hidden=2048, heads=16, kv_heads=2, intermediate=512, head_dim=256)
    assert kv_bytes(next_80b, 1) == 24 * 1024
    assert kv_bytes(next_80b, 32_768) == int(0.75 * GIB)


@pytest.mark.parametrize(
    ("config", "reason", "told"),
    [
        (None, "/m/teacher/config.json: No such file or directory", "No such file"),
        ({**CONFIG, "model_type": "mamba"}, None, "model_type 'mamba' is not one whose memory is estimated"),
        ({"model_type": "qwen2"}, None, "config.json of a qwen2 model lacks vocab_size"),
    ],
)
def test_a_model_that_cannot_be_counted_is_unknown_with_the_reason_and_never_enough(
    facts_with: Facts, config: Any, reason: str | None, told: str
) -> None:
    found = judge(with_model(facts_with(), config, reason=reason), long_context(2048))["memory"]
    assert found.outcome == "unknown"
    assert told in found.measured


def test_the_disk_that_is_needed_counts_what_is_not_there_yet_and_both_numbers_are_told(
    facts_with: Facts, box: Host
) -> None:
    from dispatch.building.build import BuildNames

    ask = ask_for(host=box.model_copy(update={"gb10": False}))
    empty = need_of(ask, facts_with())
    assert {term.name for term in empty.disk} >= {"environment", "build", "data", "teacher", "targets", "student"}
    assert empty.compiles
    names = BuildNames.of(ask)
    there = facts_with().model_copy(update={"venvs": {names.venv: True}, "builds": {names.build: True}})
    built = need_of(ask, there)
    assert built.disk_bytes < empty.disk_bytes - 1.2 * GIB
    assert built.inodes < 10_000 < 30_000 < empty.inodes
    assert not built.compiles
    tight = facts_with(storage={"bytes_free": 2 * GIB + 1, "inodes_free": 20_000})
    report = judge(tight, ask)
    assert report["disk"].outcome == report["inodes"].outcome == "fail"
    assert "2.0 GiB free in /r on box, 2.5 GiB needed (1.5 x (environment 1.20" in report["disk"].measured
    assert "20000 inodes free in /r, 47700 needed" in report["inodes"].measured
    assert judge(tight.model_copy(update=there.model_dump(include={"venvs", "builds"})), ask)["disk"].outcome == "pass"


def test_a_corpus_of_the_users_is_counted_by_its_text_as_the_plan_saw_it(host: Host, tmp_path: Path) -> None:
    from dispatch.places import Places
    from dispatch.planning.survey import survey
    from dispatch.transport.open import open_transport

    (tmp_path / "corpus.txt").write_text("a line of text\n" * 20_000)
    ask = replace(ask_for(f"data.corpus={tmp_path / 'corpus.txt'}", host=host), unfit=None)
    spec = ask.spec.model_copy(update={"data": ask.spec.data.model_copy(update={"train_sequences": None})})
    ask = replace(ask, spec=spec)
    places = Places.from_environment({"HOME": str(tmp_path), "XDG_STATE_HOME": str(tmp_path / "laptop")})
    _plan, facts = survey(open_transport(host, places, readonly=True), ask, places)
    data = next(term for term in need_of(ask, facts).disk if term.name == "data")
    assert data.bytes == 4 * 15 * 20_000


def test_more_targets_need_more_disk(facts_with: Facts) -> None:
    small, large = (need_of(ask_for(f"score.k={k}"), facts_with()) for k in (16, 128))
    assert large.disk_bytes > small.disk_bytes


@pytest.mark.parametrize("asked", ["endurance.keep_newest=9", "endurance.keep_nth=1", "distill.keep='best'"])
def test_checkpoints_that_stay_need_disk(facts_with: Facts, asked: str) -> None:
    usual = ("distill.checkpoint_every=10", "distill.validate_every=10")
    few, more = (
        {term.name: term.bytes for term in need_of(ask, facts_with()).disk}
        for ask in (ask_for(*usual), ask_for(*usual, asked))
    )
    assert more["student"] > few["student"]


def test_the_canaries_of_a_full_pipeline_need_the_disk_of_their_students_and_are_judged_by_falsifiers_of_their_own(
    facts_with: Facts,
) -> None:
    both = ["latent.beside=true", "data.corpus=/c"]
    smoke, full = (ask_for(*both, f"profile={one}", recipe="tiny-latent") for one in ("smoke", "full"))
    short, long = ({term.name: term.bytes for term in need_of(ask, facts_with()).disk} for ask in (smoke, full))
    assert long.pop("canaries") == short["student"] + short["latent student"] > 0
    assert long.pop("logs") == short.pop("logs") + 2 * (64 << 20)
    assert long == short
    of_canaries = {"F-DISTILL-CANARY-001", "F-LATENT-CANARY-001"}
    assert not of_canaries & set(wanted_of(smoke.spec)["falsifiers"])
    assert of_canaries < set(wanted_of(full.spec)["falsifiers"])
    codec = need_of(ask_for("data.corpus=/c", "profile=full", recipe="tiny-autoencoder"), facts_with())
    assert "canaries" not in {term.name for term in codec.disk}
    assert not of_canaries & set(codec.wanted["falsifiers"])


def test_a_build_that_lacks_a_field_a_falsifier_or_a_command_is_refused_by_its_name(
    facts_with: Facts, box: Host
) -> None:
    ask = ask_for(host=box)
    wanted = wanted_of(ask.spec)
    full = {name: list(names) for name, names in wanted.items()}

    def found(**changes: list[str]) -> Any:
        facts = facts_with()
        assert facts.preflight is not None
        said = Capabilities(source="build", offered={"version": "0.0.9", **full, **changes})
        facts = facts.model_copy(update={"preflight": facts.preflight.model_copy(update={"capabilities": said})})
        return judge(facts, ask)["capabilities"]

    assert found().outcome == "pass"
    for group, name, told in (
        ("fields", "distill.micro_batch_size", "lacks field distill.micro_batch_size"),
        ("falsifiers", "F-DISTILL-SMOKE-001", "lacks falsifier F-DISTILL-SMOKE-001"),
        ("commands", "run RUN_DIR", "lacks command run RUN_DIR"),
        ("kinds", "score", "lacks kind score"),
    ):
        answer = found(**{group: [one for one in full[group] if one != name]})
        assert (answer.outcome, answer.stops) == ("fail", True)
        assert told in answer.measured
        assert "0.0.9" in answer.measured


def test_this_package_offers_what_its_own_recipes_want() -> None:
    import json
    import subprocess
    import sys

    argv = [sys.executable, "-P", "-m", "latentforge", "capabilities"]
    offer = json.loads(subprocess.run(argv, capture_output=True, check=True).stdout)
    for recipe in ("tiny", "smoke"):
        assert missing(wanted_of(ask_for(recipe=recipe).spec), offer) == []
    assert "dispatch preflight --only" in offer["commands"]
    assert missing({"commands": ("run --turbo",)}, offer) == ["command run --turbo"]


def test_an_unknown_check_or_a_waiver_without_a_reason_is_refused_with_the_nearest() -> None:
    with pytest.raises(RefusedError, match="there is no check 'tenant'") as refused:
        check_ids(["tenant"])
    assert refused.value.next == "did you mean 'tenants'?"
    with pytest.raises(RefusedError, match="gives no reason"):
        check_waivers(["tenants="])
    assert check_waivers(["tenants=alice knows=yes"]) == (("tenants", "alice knows=yes"),)


def test_a_plan_asks_for_facts_only_and_the_command_for_the_write_too() -> None:
    ask = ask_for()
    assert "actions" not in question(ask.host, ask)
    assert question(ask.host, act=True)["actions"] == ["write"]
    assert question(ask.host, only=frozenset({"power"}), act=True)["actions"] == ["power"]
    assert question(ask.host, also=frozenset({"power"}), act=True)["actions"] == ["power", "write"]
