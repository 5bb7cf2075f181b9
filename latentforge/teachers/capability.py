"""What a run needs of an open teacher against what it has: refused before anything is asked of it.

The same needs as :mod:`latentforge.spec.abilities` judges by the backend's name alone, held here against what the
teacher itself declares.
"""

from __future__ import annotations

from latentforge.errors import RefusedError
from latentforge.spec.abilities import MEANING, Ability
from latentforge.teachers.protocol import Teacher

TRAIN_ON_ANSWERS = "set data.documents = 'chat' to train on its answers, or use a backend that scores (vllm-remote, hf)"


def require(teacher: Teacher, ability: Ability, what: str, *, instead: str) -> None:
    """Refuse a teacher without ``ability``; ``what`` is the field that asks for it, ``instead`` what to do."""
    able = teacher.capabilities
    if ability not in able:
        can = ", ".join(MEANING[one] for one in sorted(able)) or "nothing"
        raise RefusedError(
            f"{what} needs a teacher that can {MEANING[ability]}; this one can {can} alone", next=instead
        )
