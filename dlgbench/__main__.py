"""``python -m dlgbench``."""

import sys

from dlgbench.cli import main

sys.exit(main())
