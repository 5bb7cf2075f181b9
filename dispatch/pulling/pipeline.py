"""The models that a pipeline names by ``repo@commit``: looked for on the host, listed at the hub where they are not."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from dispatch.hosts.facts import HostFacts, PathFact
from dispatch.hosts.inventory import Host
from dispatch.preflight.facts import Model
from dispatch.pulling.listing import Catalogue, endpoint_of
from dispatch.pulling.pull import PullChoice, Source, choose_pull, keep, probe_models
from dispatch.pulling.refs import ModelRef, model_ref
from dispatch.transport.call import Transport
from latentforge.errors import LatentForgeError, RefusedError
from latentforge.spec.pipeline import ExternalPath


@dataclass
class PipelineModels:
    """The pinned models of one pipeline, what the host has of them, and where the others come from."""

    refs: dict[str, ModelRef] = field(default_factory=dict)
    """By the word of the pipeline."""
    sources: dict[str, Source] = field(default_factory=dict)
    facts: HostFacts | None = None

    @classmethod
    def of(cls, wanted: Sequence[ExternalPath]) -> PipelineModels:
        """The models among the paths that a pipeline names."""
        found = {one.path: model_ref(one.path) for one in wanted if one.purpose in ("model", "tokenizer")}
        return cls({path: ref for path, ref in found.items() if ref is not None and ref.pinned})

    def question(self, row: Mapping[str, str]) -> dict[str, str]:
        """What the host is asked about a path of the pipeline, wherever it lies."""
        asked = dict(row)
        if (ref := self.refs.get(asked["path"])) is not None:
            asked["model"] = ref.folder
        if (like := self.refs.get(asked.get("like", ""))) is not None:
            asked["like_model"] = like.folder
            del asked["like"]
        return asked

    @property
    def folders(self) -> list[str]:
        """The names of their folders on the host."""
        return [ref.folder for ref in self.refs.values()]

    def take(self, facts: HostFacts) -> dict[str, PathFact]:
        """The facts of every path: of a model that is not there, as far as its list at the hub tells them."""
        self.facts = facts
        paths = dict(facts.paths)
        for word, ref in self.refs.items():
            if word in paths and paths[word].absent:
                self.sources[word] = source = self._listed(ref)
                listing = source.listing
                paths[word] = PathFact(
                    ok=True,
                    absent=True,
                    sha256=listing.tree_sha256,
                    files=len(listing.files),
                    bytes=listing.size,
                    vocab_size=listing.vocab_size,
                    tokenizer=any(file.path == "tokenizer.json" for file in listing.files),
                )
        return paths

    def with_shapes(self, facts: HostFacts) -> HostFacts:
        """The facts with what the hub says of models that are not there yet: memory is judged before a byte moves."""
        if facts.preflight is None or not self.sources:
            return facts
        listed = {word: source.listing for word, source in self.sources.items()}
        known = {word: Model(config=one.config, bytes=one.weights) for word, one in listed.items() if one.config}
        preflight = facts.preflight.model_copy(update={"models": {**facts.preflight.models, **known}})
        return facts.model_copy(update={"preflight": preflight})

    def _listed(self, ref: ModelRef) -> Source:
        endpoint = endpoint_of(os.environ)
        try:
            return Source(Catalogue(endpoint).files_of(ref), endpoint=endpoint)
        except RefusedError as error:
            if "/" in ref.repo:
                raise
            sent = f"latentforge dispatch pull ./FOLDER --name {ref.repo}"
            raise RefusedError(f"{ref} is neither on the host nor at the hub: {error}", next=sent) from None

    def choices(self, transport: Transport, *, needed: bool) -> tuple[PullChoice, ...]:
        """What is to be done about each model; one more question where one is not there."""
        if not self.refs:
            return ()
        assert self.facts is not None
        facts = self.facts
        if self.sources:
            facts = probe_models(transport, list(self.refs.values()), list(self.sources.values()))
        chosen: dict[str, PullChoice] = {}
        for word, ref in self.refs.items():
            if word in self.sources:
                chosen[word] = choose_pull(self.sources[word], facts, needed=needed)
            else:
                chosen[word] = keep(ref, facts.models[ref.folder])
        return tuple(chosen.values())


def shapes_at_hub(wanted: Iterable[ExternalPath], facts: HostFacts) -> HostFacts:
    """The facts of a preflight with the shapes of pinned models that the host has not; unknown where no hub answers."""
    models, known = PipelineModels.of(tuple(wanted)), facts.preflight.models if facts.preflight is not None else {}
    for word, ref in models.refs.items():
        if word in known and known[word].config is None:
            endpoint = endpoint_of(os.environ)
            try:
                models.sources[word] = Source(Catalogue(endpoint, wait=0.1).files_of(ref), endpoint=endpoint)
            except LatentForgeError:
                continue
    return models.with_shapes(facts)


def check_pinned(name: str, path: str, host: Host) -> bool:
    """Whether a field names a pinned model rather than a path; refused where it names one by a branch.

    What a branch means may change between two runs, so a pipeline names a commit.
    """
    ref = model_ref(path)
    if ref is None or (host.is_local and os.path.exists(path)):
        return False
    if ref.pinned:
        return True
    try:
        pinned: ModelRef | None = Catalogue(endpoint_of(os.environ), wait=0.1).pinned(ref)
    except LatentForgeError:
        pinned = None
    now = f"; it is commit {pinned.revision} now" if pinned is not None else ""
    raise RefusedError(
        f"{name} = {path!r} is not pinned to a commit{now}",
        next=f"--set {name}={pinned}" if pinned is not None else f"name its commit:  {ref.repo}@<40 hex digits>",
    )
