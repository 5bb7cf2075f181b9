"""``python -m latentforge``: the same as the ``latentforge`` command."""

import sys

from latentforge.cli import main

sys.exit(main())
