"""What would show that a codec is unfit for a latent student: pure functions over its run's events."""

from __future__ import annotations

from latentforge.students.latent.codec_report import COLLAPSED
from latentforge.train.reading import Events, kept_metric, verdict_of
from latentforge.verdicts import Verdict

MODEL = "autoencoder"
LEAST_ACCURACY = 0.995
"""Share of the held-out tokens that a codec must give back: what it loses, no student can write."""


def latent_ae_001(events: Events) -> Verdict:
    """F-LATENT-AE-001: at least 99.5 % of the held-out tokens come back from their latents, padding not counted."""
    name = "F-LATENT-AE-001"
    found = kept_metric(events, "token_accuracy", MODEL)
    if found is None:
        return verdict_of(events, name, None, "token_accuracy of the codec that was kept is not in the events")
    accuracy, tokens, padding = float(found["value"]), found["tokens"], found["padding"]
    measured = {"token_accuracy": accuracy, "tokens": tokens, "padding": padding, "step": found["step"]}
    text = (
        f"{accuracy:.4%} {'>=' if accuracy >= LEAST_ACCURACY else '<'} {LEAST_ACCURACY:.1%} of {tokens} held-out tokens"
    )
    # Every place of the held-out rows is a token or padding: a share of anything else is no share of the tokens.
    if tokens < 1 or tokens + padding != found["places"]:
        text = (
            f"{text}, which with {padding} places of padding are not the {found['places']} places of the held-out rows"
        )
        return verdict_of(events, name, False, text, measured)
    return verdict_of(events, name, accuracy >= LEAST_ACCURACY, text, measured)


def latent_ae_002(events: Events) -> Verdict:
    """F-LATENT-AE-002: every dimension of the latent tells something of its chunk, on held-out text."""
    name = "F-LATENT-AE-002"
    found = kept_metric(events, "latent_kl", MODEL)
    if found is None:
        return verdict_of(events, name, None, "latent_kl of the codec that was kept is not in the events")
    kl = [float(value) for value in found["by_dimension"]]
    collapsed = [number for number, value in enumerate(kl) if not value >= COLLAPSED]
    measured = {"collapsed": len(collapsed), "dimensions": len(kl), "least_kl": min(kl)}
    text = f"{len(collapsed)} of {len(kl)} dimensions collapsed, the least KL is {min(kl):.3f} nats"
    return verdict_of(events, name, not collapsed, text, measured)
