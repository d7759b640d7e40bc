"""`python -m twotower_kernels` is the command `twotower`."""

import sys

from twotower_kernels.cli.command import main

sys.exit(main())
