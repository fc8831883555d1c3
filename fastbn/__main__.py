"""``python -m fastbn`` is the command ``fastbn``."""

import sys

from fastbn.cli import main

sys.exit(main())
