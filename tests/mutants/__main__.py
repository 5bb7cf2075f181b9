"""``python -m tests.mutants [-v]``: plant every mutant and print docs/mutants.md; ``-v`` also what was said of each.

Exit code 1 where one survives that was not declared to, or where something is caught with nothing planted.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from .frame import Mutant, mutants, table


def run(one: Mutant, planted: bool) -> str | None:
    """What caught it, in a folder that is removed."""
    with tempfile.TemporaryDirectory() as folder:
        return one.run(Path(folder), planted)


def main() -> int:
    found = []
    wrong = 0
    for one in mutants():
        alarm, said = run(one, False), run(one, True)
        found.append((one, said))
        if alarm is not None:
            print(f"{one}: caught with nothing planted: {alarm}", file=sys.stderr)
        if "-v" in sys.argv[1:]:
            print(f"{one}: {said}", file=sys.stderr)
        wrong += alarm is not None or (said is None) != (one.survives is not None)
    print("\n".join(table(found)))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
