"""``bench quality``: the same rows and prompts for each model, figures that are right, costs that are said."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from latentforge.cli.bench import app
from latentforge.data.shards import ShardSet
from latentforge.data.tokenizer import copy_tokenizer
from latentforge.errors import RefusedError
from latentforge.evidence.digests import file_sha256
from latentforge.students.latent.chunks import valid
from latentforge.students.latent.flops import latent_inference
from latentforge.students.latent.requests import Sampling
from latentforge.students.likelihood import row_logprobs
from latentforge.students.token_session import TokenModel
from latentforge.writers.opening import open_writer
from latentforge.writers.quality import Protocol, Report, _prompts, held_out, measure, teacher_folder
from latentforge.writers.quality_cost import cost_of
from latentforge.writers.quality_report import as_json, lines
from latentforge.writers.rollout import Written, binned, places, write_in_window

from ..latent_folders import CHUNK, VOCABULARY, Folders
from ..students.known_model import markov_model
from ..students.latent.conftest import MarkovSource

SMALL = Protocol(rows=6, draws=6, texts=3, chunks=8, prompt=2)


def data_of(folders: Folders, folder: Path, rows: Tensor | None = None) -> ShardSet:
    """A data run's product that holds the last rows of the text out."""
    rows = folders.rows[-32:] if rows is None else rows
    folder.mkdir()
    tokenizer = copy_tokenizer(folders.token / "out" / "student", folder / "tokenizer")
    shards = {"train.bin": rows[:1], "heldout.bin": rows}
    for name, held in shards.items():
        (folder / name).write_bytes(held.numpy().astype("<u2").tobytes())
    record = {
        "vocab_size": VOCABULARY,
        "sequence_length": rows.shape[1],
        "dtype": "uint16",
        "chunk": CHUNK,
        "eos_id": tokenizer.eos_id,
        "tokenizer_sha256": tokenizer.sha256,
        "shards": {name: file_sha256(folder / name) for name in shards},
        "train_sequences": 1,
        "heldout_sequences": len(rows),
    }
    (folder / "data.json").write_text(json.dumps(record))
    return ShardSet.open(folder)


@pytest.fixture(scope="module")
def data(folders: Folders, tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return data_of(folders, tmp_path_factory.mktemp("quality") / "data")


@pytest.fixture(scope="module")
def report(folders: Folders, data: ShardSet) -> Report:
    """Both students, the token-level one being its own teacher."""
    students = [("student", open_writer(folders.latent)), ("beside", open_writer(folders.token))]
    return measure(students, open_writer(folders.token), data, SMALL, tell=lambda _: None)


def test_each_model_is_measured_after_the_same_contexts(report: Report) -> None:
    assert [one.name for one in report.models] == ["student", "beside", "teacher"]
    assert {one.brier_lm.contexts for one in report.models} == {report.contexts} == {6 * 15}


def test_a_student_that_is_its_teacher_agrees_and_another_does_not(report: Report) -> None:
    latent, beside, teacher = (one.agreement for one in report.models)
    assert latent is not None
    assert beside is not None
    assert teacher is not None
    for one in (beside, teacher):
        assert abs(one.value) <= 3 * one.error
    assert latent.low > beside.high


def test_bits_a_byte_count_the_same_tokens_and_bytes_for_both(folders: Folders, data: ShardSet, report: Report) -> None:
    text = held_out(data, SMALL)
    counted = valid(text.chunks, data.eos_id)
    ids = text.chunks[:, 1:][counted[:, 1:]]
    said = data.tokenizer().backend.decode([one for one in ids.tolist() if one != data.eos_id])
    assert abs(int(text.widths[:, 1:].sum()) - len(said.encode())) <= 3 * 2 * len(text.chunks)  # characters cut at ends
    teacher = open_writer(folders.token).model
    assert isinstance(teacher, TokenModel)
    row = teacher.student.logits(text.chunks.flatten(1)).log_softmax(-1).unflatten(0, (6, -1))
    at = row.gather(2, text.chunks.flatten(1)[:, 1:, None]).squeeze(2)[:, CHUNK - 1 :]
    bits = -float(at[counted[:, 1:].flatten(1)].sum()) / math.log(2)
    found = report.models[1].bits_per_byte
    assert found is not None
    assert found.value == pytest.approx(bits / int(text.widths[:, 1:].sum()), rel=1e-4)
    latent = report.models[0].bits_per_byte
    assert latent is not None
    assert found.value < latent.value < 8


def test_padding_counts_in_no_figure(folders: Folders, data: ShardSet, report: Report, tmp_path: Path) -> None:
    """The planted fault of padding that is counted: another document behind it would change what stands before."""
    rows = folders.rows[-32:].clone()
    rows[:, -2 * CHUNK :] = data.eos_id  # an end of text, then a chunk of padding, and one more
    more = data_of(folders, tmp_path / "padded", rows)
    text = held_out(more, SMALL)
    assert int(text.widths[~valid(text.chunks, data.eos_id)].sum()) == 0
    assert int(text.widths[text.chunks == data.eos_id].sum()) == 0
    writer = open_writer(folders.token)
    found = measure([("student", writer)], None, more, SMALL, tell=lambda _: None).models[0].bits_per_byte
    model = writer.model
    assert isinstance(model, TokenModel)
    flat, counted = text.chunks.flatten(1), valid(text.chunks, data.eos_id)[:, 1:].flatten(1)
    said = row_logprobs(model.student, flat)[:, CHUNK - 1 :]
    wanted = float((-said * counted).sum()) / math.log(2) / int(text.widths[:, 1:].sum())
    assert found is not None
    assert found.value == pytest.approx(wanted, rel=1e-4)
    assert float(-said.sum()) / math.log(2) / int(text.widths[:, 1:].sum()) > wanted + 0.01


def test_inference_costs_count_the_draws_that_were_made(folders: Folders, data: ShardSet) -> None:
    writer = open_writer(folders.latent)
    asked = Protocol(rows=2, draws=2, texts=2, chunks=4, prompt=2, sampling=Sampling("vote", 0.5, 20))
    found = measure([("student", writer)], None, data, asked, tell=lambda _: None)
    cost = found.models[0].cost
    assert cost.draws == 20
    model = writer.model
    wanted = latent_inference(model.student.shape, model.codec.shape, positions=16, draws=20).total
    assert cost.inference == pytest.approx(wanted)
    assert cost.inference > 5 * cost_of(writer, positions=64, draws=1).inference
    assert found.models[0].agreement is None
    assert found.real == found.models[0].rollout == ()


def test_a_comparison_at_unequal_cost_is_said_to_be_none_and_the_size_of_an_equal_one_is_named(report: Report) -> None:
    content, text = as_json(report), "\n".join(lines(report))
    equal = content["equal_compute"]
    latent, token = (one["inference_flops_per_token"] for one in content["models"][:2])
    assert equal["difference"] == pytest.approx(token / latent - 1)
    assert equal["equal"] is (abs(token / latent - 1) <= 0.05) is False
    assert "NOT equal" in text
    assert abs(equal["matched"]["difference"]) <= 0.05
    assert f"hidden = {equal['matched']['shape']['hidden']}" in text


def test_training_costs_are_those_of_the_run(folders: Folders, data: ShardSet, tmp_path: Path) -> None:
    import shutil

    for number, (folder, told) in enumerate(((folders.token, "student"), (folders.latent, "latent"))):
        run = tmp_path / told
        shutil.copytree(folder, run)
        (run / "effective.json").write_text(json.dumps({"flops": {told: 1.5e9 + number, "twin": 3e9}}))
        assert cost_of(open_writer(run), positions=64, draws=1).training == 1.5e9 + number
    assert cost_of(open_writer(folders.token), positions=64, draws=1).training is None


def test_prompts_are_from_all_over_the_text_and_hold_no_end_of_one(folders: Folders, data: ShardSet) -> None:
    prompts, real = _prompts(data, SMALL)
    begin, more = SMALL.prompt * CHUNK, SMALL.chunks * CHUNK
    rows = [one[:begin] for one in data.heldout.rows(list(range(32))).tolist()]
    assert rows.index(list(prompts[-1])) - rows.index(list(prompts[0])) >= 16
    for prompt, text in zip(prompts, real, strict=True):
        whole = data.heldout.rows([rows.index(list(prompt))]).flatten().tolist()
        assert data.eos_id not in prompt
        assert list(text) == whole[begin : begin + len(text)]
        assert len(text) == more or text[-1] == data.eos_id


def test_the_rollout_tells_each_place_and_real_text_is_beside_it(report: Report) -> None:
    for found in (report.real, *(one.rollout for one in report.models)):
        assert [one.chunk for one in found] == list(range(len(found)))
        assert len(found) <= 8
        assert found[0].texts == 3
        assert all(math.isfinite(one.bits) and one.bits >= 0 for one in found)
    text = "\n".join(lines(report))
    assert "real text" in text
    assert "BrierLM" in text
    assert "bits/byte" in text


def known(model: MarkovSource, positions: int) -> TokenModel:
    return TokenModel(markov_model(model.rows, positions=positions), len(model.rows), 0)


def test_a_teachers_own_text_of_any_length_surprises_it_by_its_entropy_at_each_place() -> None:
    """Longer than its window, by pieces; a text of another source surprises it more, at each place."""
    rows = torch.full((6, 6), 1e-9).double()
    rows[:, 1:] = MarkovSource.peaked(vocabulary=5, sharpness=1.3, seed=3).rows[[0, 0, 1, 2, 3, 4]]
    source = MarkovSource(rows / rows.sum(-1, keepdim=True))  # never says 0, the end
    teacher = known(source, 32)
    prompts = tuple((1 + number % 5, 2) for number in range(48))
    own = write_in_window(teacher, prompts, new_tokens=96, seed=1, window=32)
    assert {len(one) for one in own.texts} == {96}
    found = places(teacher, 32, own, chunk=8)
    stationary = torch.linalg.matrix_power(source.rows, 4096)[1]
    entropy = float(-(stationary[:, None] * source.rows * source.rows.log2())[:, 1:].sum())
    assert len(found) == 12
    for one in found:
        assert one.error is not None
        assert one.texts == 48
        assert abs(one.bits - entropy) <= 4.5 * one.error
    joined = binned(found)
    assert [one.chunk for one in joined] == [0, 1, 2, 4, 8]
    generator = torch.Generator().manual_seed(1)
    noise = tuple(tuple((1 + torch.randint(0, 5, (96,), generator=generator)).tolist()) for _ in prompts)
    other = places(teacher, 32, Written(prompts, noise, 1.0), chunk=8)
    assert all(b.bits > a.bits + 0.3 for a, b in zip(found, other, strict=True))


def test_a_text_that_ends_is_counted_as_far_as_it_goes() -> None:
    source = MarkovSource.peaked(vocabulary=6, sharpness=1.3, seed=3)
    teacher = known(source, 32)
    written = Written(((1,), (2,)), ((3, 4, 5, 0), (1, 2, 3, 4, 5, 1, 2, 3)), 1.0)
    found = places(teacher, 32, written, chunk=4)
    assert [one.texts for one in found] == [2, 1]
    wanted = -source.rows[[4, 5, 1, 2], [5, 1, 2, 3]].log2().mean()
    assert found[1].bits == pytest.approx(float(wanted), rel=1e-4)
    assert found[1].error is None


def test_what_does_not_belong_together_is_refused(folders: Folders, data: ShardSet, tmp_path: Path) -> None:
    latent = open_writer(folders.latent)
    students = [("student", latent)]
    with pytest.raises(RefusedError, match="is no token-level model"):
        measure(students, latent, data, SMALL, tell=lambda _: None)
    record = json.loads((data.folder / "data.json").read_text())

    def changed(name: str, **values: object) -> ShardSet:
        found = data_of(folders, tmp_path / name)
        (found.folder / "data.json").write_text(json.dumps({**record, **values}))
        return ShardSet.open(found.folder)

    with pytest.raises(RefusedError, match=r"writes chunks of 4, the data is cut into chunks of 2"):
        measure(students, None, changed("chunk", chunk=2), SMALL, tell=lambda _: None)
    with pytest.raises(RefusedError, match=r"has tokenizer .*, the data has ab"):
        measure(students, None, changed("other", tokenizer_sha256="ab" * 32), SMALL, tell=lambda _: None)
    with pytest.raises(RefusedError, match=r"rows = 99: .* holds 32 rows out"):
        measure(students, None, data, Protocol(rows=99), tell=lambda _: None)
    with pytest.raises(RefusedError, match=r"texts = 8 of 2 \+ 900 chunks"):
        measure(students, None, data, Protocol(rows=2, chunks=900, prompt=2), tell=lambda _: None)
    with pytest.raises(RefusedError, match="draws = 1 is less than 2"):
        Protocol(draws=1)


def test_the_command_prints_and_writes_what_bench_generate_reads(
    folders: Folders, data: ShardSet, tmp_path: Path
) -> None:
    from latentforge.writers.bench.quality import read_quality

    out = tmp_path / "quality.json"
    asked = ["--rows", "6", "--draws", "6", "--texts", "2", "--chunks", "3", "--prompt", "2", "--out", str(out)]
    where = ["--data", str(data.folder), "--beside", str(folders.token), "--teacher", str(folders.token)]
    found = CliRunner().invoke(app, ["quality", str(folders.latent), *where, *asked, "--json"])
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout) == json.loads(out.read_text())
    read = read_quality(out)
    for folder in (folders.latent, folders.token):
        one = read[open_writer(folder).digests["student"]]
        assert one.brier_lm is not None
        assert one.bits_per_byte is not None


def test_held_out_text_that_was_altered_is_not_measured_on(folders: Folders, tmp_path: Path) -> None:
    data = data_of(folders, tmp_path / "data")
    content = bytearray((data.folder / "heldout.bin").read_bytes())
    content[-2] ^= 1
    (data.folder / "heldout.bin").write_bytes(content)
    found = CliRunner().invoke(app, ["quality", str(folders.latent), "--data", str(data.folder)])
    assert isinstance(found.exception, RefusedError)
    assert "heldout.bin: sha256" in str(found.exception)


def test_a_teachers_run_names_its_model(tmp_path: Path) -> None:
    (tmp_path / "out" / "model").mkdir(parents=True)
    (tmp_path / "out" / "model" / "config.json").write_text("{}")
    for path in (tmp_path, tmp_path / "out", tmp_path / "out" / "model"):
        assert teacher_folder(path) == tmp_path / "out" / "model"


def test_a_student_that_writes_by_tokens_is_measured_and_its_cost_is_not_counted(
    folders: Folders, data: ShardSet
) -> None:
    asked = Protocol(rows=2, draws=2, texts=2, chunks=2, prompt=2, sampling=Sampling("tokens", 1.0, top_k=5))
    students = [("student", open_writer(folders.latent)), ("beside", open_writer(folders.token))]
    found = measure(students, None, data, asked, tell=lambda _: None)
    assert found.models[0].cost.inference is None
    assert found.models[1].cost.inference is not None
    assert as_json(found)["equal_compute"] is None


def test_a_report_of_one_student_holds_no_number_that_json_lacks(folders: Folders, data: ShardSet) -> None:
    asked = Protocol(rows=2, draws=2, texts=2, chunks=2, prompt=2)
    found = measure([("student", open_writer(folders.latent))], None, data, asked, tell=lambda _: None)
    equal = json.loads(json.dumps(as_json(found), allow_nan=False))["equal_compute"]
    assert (equal["difference"], equal["equal"]) == (None, None)
    assert f"hidden = {equal['matched']['shape']['hidden']}" in "\n".join(lines(found))


def test_what_cannot_be_written_is_refused_before_anything_is_measured(folders: Folders, data: ShardSet) -> None:
    told: list[str] = []
    asked = Protocol(rows=2, draws=2, texts=2, chunks=2, prompt=2, sampling=Sampling("head", 0.0))
    with pytest.raises(RefusedError, match=r"temperature = 0.0: one draw of this head knows temperatures above 0"):
        measure([("student", open_writer(folders.latent))], None, data, asked, tell=told.append)
    assert told == []
    with pytest.raises(RefusedError, match=f"seed = {2**63 - 1}"):
        Protocol(seed=2**63 - 1)
