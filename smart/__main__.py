"""``python -m smart`` is the command ``smart``."""

import sys

from smart.cli import main

sys.exit(main())
