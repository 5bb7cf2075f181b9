"""What cannot be trained together is refused where it is planned, and never left out in silence."""

from __future__ import annotations

from typing import Any

import pytest

from latentforge.errors import RefusedError
from latentforge.spec.pipeline import effective_pipeline
from latentforge.spec.sections import DistillSpec, PipelineSpec
from latentforge.spec.spread import processes_of, without_spread


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({"processes": 2}, "processes = 2 with distributed = 'none': they would not train together"),
        ({"distributed": "ddp", "processes": 5, "batch_size": 4}, "some would never have a row"),
        (
            {"distributed": "ddp", "processes": 2, "batch_size": 5, "micro_batch_size": 4},
            "micro_batch_size = 4 is more than the 3 rows that each of 2 processes has of batch_size = 5",
        ),
        ({"distributed": "fsdp2", "student": {"frozen": True}}, "there is nothing to train together"),
        ({"distributed": "ddp", "targets": "live"}, "each process would hold or ask a teacher of its own"),
        ({"distributed": "ddp", "on_policy": 0.5}, "the processes do not write text together"),
        ({"distributed": "deepspeed-zero1"}, "Input should be 'none', 'ddp', 'fsdp2'"),
        ({"distributed": "ddp", "processes": 0}, "greater than or equal to 1"),
    ],
)
def test_what_cannot_be_combined_is_refused(asked: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=".*".join(map(str, [why]))):
        DistillSpec.model_validate(asked)


def test_a_temperature_that_would_make_targets_live_is_refused_for_several_processes() -> None:
    spec = PipelineSpec.model_validate({"distill": {"temperature": 2.0, "distributed": "ddp", "processes": 2}})
    with pytest.raises(RefusedError, match="distributed = 'ddp' takes stored targets alone") as refused:
        effective_pipeline(spec)
    assert refused.value.next == "add 2 to score.temperatures, or set distill.distributed = 'none'"


def test_how_training_is_spread_is_no_part_of_what_is_trained() -> None:
    one, two = ({"distill": {"steps": 3, "distributed": name, "processes": n}} for name, n in (("ddp", 2), ("none", 1)))
    assert (
        without_spread(one | {"seed": 7}) == without_spread(two | {"seed": 7}) == {"distill": {"steps": 3}, "seed": 7}
    )
    assert (processes_of("distill", one), processes_of("distill", two), processes_of("data", {})) == (2, None, None)
