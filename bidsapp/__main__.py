"""`python -m bidsapp` is the same program as `qsphere`."""

import sys

from bidsapp.cli import main

sys.exit(main())
