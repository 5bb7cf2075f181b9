"""The codec: what it reads, what it writes, what it is trained on, and which files it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from latentforge.errors import RefusedError
from latentforge.students.latent.chunks import valid
from latentforge.students.latent.codec import Codec, CodecShape, Posterior, new_codec
from latentforge.students.latent.codec_loss import CodecObjective, codec_loss, kl_by_dimension, noise_of
from latentforge.students.latent.codec_report import NOISE_LEVELS, report_codec

EOS = 0
PLAIN = CodecObjective(token_dropout=0.0, latent_dropout=0.0, kl_weight=0.001, kl_floor=0.5)
NOISY = CodecObjective(token_dropout=0.15, latent_dropout=0.15, kl_weight=0.001, kl_floor=0.5)


def small(chunk: int = 4, latent: int = 24, seed: int = 1) -> Codec:
    return new_codec(CodecShape(vocab_size=40, chunk=chunk, latent=latent, width=32, inner=48), seed=seed)


def text(rows: int = 64, chunk: int = 4, seed: int = 3) -> tuple[Tensor, Tensor]:
    """Chunks with and without padding."""
    drawn = torch.randint(1, 40, (rows, chunk), generator=torch.Generator().manual_seed(seed))
    for row in range(0, rows, 4):
        drawn[row, row % chunk :] = EOS
    return drawn, valid(drawn, EOS)


def trained(chunk: int = 4, *, steps: int, latent: int = 24, objective: CodecObjective = NOISY) -> Codec:
    codec = small(chunk, latent)
    optimiser = torch.optim.AdamW(codec.parameters(), lr=5e-3)
    for step in range(steps):
        chunks, places = text(256, chunk, seed=step)
        codec_loss(codec, chunks, places, objective, noise_of(1, step)).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return codec


@pytest.mark.parametrize("chunk", [1, 2, 4, 8, 16])
def test_any_number_of_tokens_a_chunk_is_encoded_and_decoded(chunk: int) -> None:
    codec = small(chunk)
    chunks, places = text(chunk=chunk)
    posterior = codec.encode(chunks, places)
    assert posterior.mean.shape == posterior.log_std.shape == (64, 24)
    assert codec.hidden(posterior.mean).shape == (64, chunk, 32)
    found = codec.decode(posterior.mean)
    assert torch.equal(found, codec.logits(posterior.mean).argmax(-1))
    assert codec_loss(codec, chunks, places, NOISY, noise_of(1, 1)).loss.isfinite()


@pytest.mark.parametrize("chunk", [1, 2, 4, 8, 16])
def test_any_number_of_tokens_a_chunk_is_learnt(chunk: int) -> None:
    held_out = text(256, chunk, seed=10**6)
    codec = trained(chunk, latent=16 * chunk, steps=120)
    assert report_codec(codec, lambda: [held_out]).token_accuracy > (0.9 if chunk <= 4 else 0.3)


def test_what_it_learns_holds_for_chunks_that_it_has_not_seen() -> None:
    held_out = text(512, seed=10**6)
    before, after = (report_codec(one, lambda: [held_out]) for one in (small(), trained(steps=400)))
    assert before.token_accuracy < 0.2
    assert after.token_accuracy > 0.97
    assert after.chunk_accuracy > 0.9
    assert list(after.noisy_accuracy) == list(NOISE_LEVELS)
    assert after.noisy_accuracy[0.1] > after.noisy_accuracy[0.7]
    assert after.collapsed == ()


def test_a_codec_whose_latents_tell_nothing_is_reported_as_collapsed() -> None:
    codec = trained(steps=60)
    with torch.no_grad():
        codec.encoder_out.weight.zero_()
        codec.encoder_out.bias.zero_()
    found = report_codec(codec, lambda: [text(256)])
    assert found.collapsed == tuple(range(24))
    assert found.token_accuracy < 0.5


def test_a_report_in_small_passes_is_that_of_a_whole_one_and_none_is_larger(monkeypatch: pytest.MonkeyPatch) -> None:
    codec, seen = trained(steps=60), list[int]()
    real = {name: getattr(codec, name) for name in ("encode", "decode")}

    def watched(name: str) -> Callable[..., Any]:
        def call(*values: Any, **settings: Any) -> Any:
            seen.append(len(values[0]))
            return real[name](*values, **settings)

        return call

    for name in real:
        monkeypatch.setattr(codec, name, watched(name))
    whole = report_codec(codec, lambda: [text(100), text(37)])
    assert max(seen) == 100
    seen.clear()
    small_passes = report_codec(codec, lambda: [text(100), text(37)], at_most=7)
    assert max(seen) == 7
    # What is counted is the same to the bit, under noise as well; means are sums in another order.
    counted = ("tokens", "chunks", "token_accuracy", "chunk_accuracy", "noisy_accuracy", "collapsed")
    assert [getattr(whole, name) for name in counted] == [getattr(small_passes, name) for name in counted]
    for name in ("loss", "latent_std", "posterior_std", "kl"):
        assert getattr(small_passes, name) == pytest.approx(getattr(whole, name), rel=1e-6)


def test_each_chunk_is_encoded_by_itself() -> None:
    codec = small()
    chunks, places = text()
    together = codec.encode(chunks, places).mean
    alone = torch.cat([codec.encode(chunks[n : n + 1], places[n : n + 1]).mean for n in range(len(chunks))])
    assert torch.allclose(together, alone, atol=1e-6)


def test_what_stands_in_padding_is_not_read() -> None:
    codec = small()
    chunks, places = text()
    other = torch.where(places, chunks, torch.randint(1, 40, chunks.shape))
    assert not torch.equal(chunks, other)
    assert torch.equal(codec.encode(chunks, places).mean, codec.encode(other, places).mean)


def test_rows_of_padding_change_neither_loss_nor_gradient_nor_report() -> None:
    codec = small()
    with torch.no_grad():  # the noise of one row depends on how many there are: take it away
        codec.encoder_out.weight[24:].zero_()
        codec.encoder_out.bias[24:].fill_(-20.0)
    chunks, places = text()
    more = torch.cat([chunks, torch.zeros(32, 4, dtype=torch.int64)])
    more_places = torch.cat([places, torch.zeros(32, 4, dtype=torch.bool)])
    quiet = CodecObjective(0.0, 0.0, 0.001, 0.0)
    found = []
    for ids, where in ((chunks, places), (more, more_places)):
        codec.zero_grad()
        # The posterior's own noise is drawn for each row in turn: the first rows have the same in both.
        loss = codec_loss(codec, ids, where, quiet, noise_of(1, 1))
        loss.loss.backward()
        gradient = codec.decoder_in.weight.grad
        assert gradient is not None
        found.append((loss.ce, loss.kl, loss.rows, loss.chunks, gradient.clone()))
    assert found[0][2:4] == found[1][2:4] == (int(places.sum()), 64)
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-5)
    assert torch.allclose(found[0][1], found[1][1], rtol=1e-6)
    assert torch.allclose(found[0][4], found[1][4], atol=1e-6)
    reports = [report_codec(codec, lambda pair=pair: [pair]) for pair in ((chunks, places), (more, more_places))]
    assert reports[0] == reports[1]


def test_the_loss_is_k_times_the_mean_cross_entropy_and_the_clipped_kl() -> None:
    codec = small()
    chunks, places = text()
    with torch.no_grad():
        codec.encoder_out.bias[:12].fill_(1.5)  # some dimensions above the floor, some below
        mean, log_std = codec.encode(chunks, places)
        found = codec_loss(codec, chunks, places, PLAIN, noise_of(5, 9))
        draws = noise_of(5, 9)
        torch.rand(chunks.shape, generator=draws)
        latents = mean + torch.randn(mean.shape, generator=draws) * log_std.exp()
        ce = F.cross_entropy(codec.logits(latents)[places], chunks[places])
        normal = torch.distributions.Normal(mean, log_std.exp())
        kl = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0))
        assert 0 < int((kl < 0.5).sum()) < kl.numel()
    assert torch.allclose(kl_by_dimension(Posterior(mean, log_std)), kl, atol=1e-5)
    assert torch.allclose(found.ce, ce, rtol=1e-5)
    assert torch.allclose(found.kl, kl.clamp_min(0.5).sum(-1).mean(), rtol=1e-5)
    assert torch.allclose(found.loss, 4 * ce + 0.001 * kl.clamp_min(0.5).sum(-1).mean(), rtol=1e-5)


def test_a_dimension_below_the_floor_is_not_pushed_further_down() -> None:
    codec = small()
    with torch.no_grad():  # every dimension near a standard normal
        codec.encoder_out.weight.mul_(0.01)
    chunks, places = text()
    objective = CodecObjective(0.0, 0.0, kl_weight=1e6, kl_floor=0.5)
    codec_loss(codec, chunks, places, objective, noise_of(1, 1)).loss.backward()
    gradient = codec.encoder_out.bias.grad
    assert gradient is not None
    assert gradient.abs().max() < 1.0, "every dimension is below the floor"


def test_tokens_that_are_dropped_are_masked_and_not_another_token() -> None:
    codec = small()
    chunks, places = text()
    objective = CodecObjective(token_dropout=0.99, latent_dropout=0.0, kl_weight=0.0, kl_floor=0.0)
    seen: list[Tensor] = []
    codec.embedding.register_forward_hook(lambda module, given, made: seen.append(given[0]))
    codec_loss(codec, chunks, places, objective, noise_of(1, 1))
    masked = seen[0] == codec.mask_id
    assert masked.float().mean() > 0.9
    assert torch.equal(seen[0][~masked], chunks[~masked])


def test_numbers_of_a_latent_that_are_dropped_are_zero_and_the_others_make_up_for_them() -> None:
    """Control: without the dropout the decoder is shown all of them, as they are."""
    codec = small()
    chunks, places = text()
    shown: list[Tensor] = []
    codec.decoder_in.register_forward_hook(lambda module, given, made: shown.append(given[0].detach()))
    for share in (0.0, 0.6):
        codec_loss(codec, chunks, places, CodecObjective(0.0, share, 0.0, 0.0), noise_of(1, 1))
    whole, some = shown
    kept = some != 0
    assert bool((whole != 0).all())
    assert 0.35 < float(kept.float().mean()) < 0.45
    assert torch.allclose(some[kept], whole[kept] / 0.4)


def test_the_noise_of_a_step_is_a_function_of_seed_and_step() -> None:
    first = torch.rand(8, generator=noise_of(3, 4))
    torch.rand(5)
    assert torch.equal(first, torch.rand(8, generator=noise_of(3, 4)))
    assert not torch.equal(first, torch.rand(8, generator=noise_of(3, 5)))
    assert not torch.equal(first, torch.rand(8, generator=noise_of(4, 4)))


def test_the_mask_is_never_decoded() -> None:
    codec = small()
    with torch.no_grad():
        codec.embedding.weight[codec.mask_id] *= 1e3
    assert codec.decode(torch.randn(200, 24)).max() < codec.mask_id


def saved(folder: Path) -> Codec:
    codec = small()
    codec.save(folder, eos_id=EOS, tokenizer_sha256="a" * 64, latent_std=1.25)
    return codec


def test_an_opened_codec_is_the_saved_one_and_frozen(tmp_path: Path) -> None:
    codec, opened = saved(tmp_path / "codec"), Codec.open(tmp_path / "codec", tokenizer_sha256="a" * 64)
    chunks, places = text()
    assert torch.equal(codec.encode(chunks, places).mean, opened.encode(chunks, places).mean)
    assert not opened.training
    assert not any(parameter.requires_grad for parameter in opened.parameters())
    assert opened.record is not None
    assert (opened.record.eos_id, opened.record.latent_std) == (EOS, 1.25)
    assert opened.shape == codec.shape


def test_a_codec_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "codec")
    with pytest.raises(RefusedError, match="a codec of tokenizer aaaaaaaaaaaa…, the data's is bbbbbbbbbbbb…"):
        Codec.open(tmp_path / "codec", tokenizer_sha256="b" * 64)


def test_weights_that_are_not_those_written_are_refused(tmp_path: Path) -> None:
    saved(tmp_path / "codec")
    weights = tmp_path / "codec" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(RefusedError, match=r"model\.safetensors is sha256"):
        Codec.open(tmp_path / "codec")
    weights.unlink()
    with pytest.raises(RefusedError, match=r"model\.safetensors cannot be read"):
        Codec.open(tmp_path / "codec")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema": 2}, "has schema 2; 1 is read here"),
        ({"shape": {"vocab_size": 40}}, "describes no codec"),
        ({"shape": {"vocab_size": 40, "chunk": 0, "latent": 24, "width": 32, "inner": 48}}, "a codec of chunk = 0"),
        (
            {"shape": {"vocab_size": 40, "chunk": 4, "latent": 25, "width": 32, "inner": 48}},
            "does not hold the tensors",
        ),
    ],
)
def test_a_description_that_is_not_of_this_codec_is_refused(
    tmp_path: Path, change: dict[str, object], words: str
) -> None:
    saved(tmp_path / "codec")
    path = tmp_path / "codec" / "codec.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(RefusedError, match=words):
        Codec.open(tmp_path / "codec")


def test_a_folder_without_a_codec_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="holds no codec"):
        Codec.open(tmp_path)


def test_chunks_and_latents_of_another_size_are_refused() -> None:
    codec = small()
    chunks, places = text(chunk=5)
    with pytest.raises(RefusedError, match=r"this codec reads \[N, 4\]"):
        codec.encode(chunks, places)
    with pytest.raises(RefusedError, match=r"this codec decodes \[N, 24\]"):
        codec.decode(torch.randn(3, 23))
