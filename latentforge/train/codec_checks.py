"""Executable checks of what codecs claim; the contract ``latent`` names these functions and plants their faults."""

from __future__ import annotations

import torch
from torch import Tensor

from latentforge.contracts.finding import Finding
from latentforge.students.latent.chunks import valid
from latentforge.students.latent.codec import CodecShape, new_codec
from latentforge.students.latent.codec_loss import CodecObjective, codec_loss, noise_of
from latentforge.students.latent.codec_report import report_codec
from latentforge.train.checks import finding_of
from latentforge.train.codec_falsifiers import latent_ae_001, latent_ae_002
from latentforge.train.rehearsal import tiny_codec_events

EOS = 0


def text_comes_back(*, mutant: str | None = None) -> Finding:
    """The recipe ``tiny-autoencoder`` gives 99.5 % of held-out tokens back. ``mutant`` "collapsed" has no free bits."""
    return finding_of(latent_ae_001(tiny_codec_events(collapsed=mutant == "collapsed")))


def no_dimension_collapses(*, mutant: str | None = None) -> Finding:
    """Each dimension of that codec tells something of its chunk. ``mutant`` "collapsed" has no free bits."""
    return finding_of(latent_ae_002(tiny_codec_events(collapsed=mutant == "collapsed")))


def padding_counts_nowhere(*, mutant: str | None = None) -> Finding:
    """Chunks of padding change neither loss nor gradient nor report. ``mutant`` "counted" takes them for text."""
    codec = new_codec(CodecShape(vocab_size=40, chunk=4, latent=24, width=32, inner=48), seed=1)
    with torch.no_grad():  # the noise of one row depends on how many there are: take it away
        codec.encoder_out.weight[24:].zero_()
        codec.encoder_out.bias[24:].fill_(-20.0)
    chunks = torch.randint(1, 40, (64, 4), generator=torch.Generator().manual_seed(3))
    chunks[::4, 2:] = EOS
    places = valid(chunks, EOS)
    more = torch.cat([chunks, torch.full((64, 4), EOS)])
    more_places = torch.cat([places, torch.full((64, 4), mutant == "counted")])
    found: list[tuple[Tensor, ...]] = []
    for ids, where in ((chunks, places), (more, more_places)):
        codec.zero_grad()
        loss = codec_loss(codec, ids, where, CodecObjective(0.0, 0.0, 0.001, 0.5), noise_of(1, 1))
        loss.loss.backward()
        report = report_codec(codec, lambda pair=(ids, where): [pair])
        gradient = codec.decoder_in.weight.grad
        assert gradient is not None
        found.append(
            (loss.loss.detach(), gradient.norm(), torch.tensor([report.loss, report.chunk_accuracy, *report.kl]))
        )
    worst = max(float(((b - a).abs() / a.abs().clamp_min(1e-6)).max()) for a, b in zip(*found, strict=True))
    text = f"64 chunks of padding beside 64 of text change loss, gradient or report by {worst:.1e} at most"
    return Finding(worst < 1e-5, text, {"relative": worst})
