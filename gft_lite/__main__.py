"""`python -m gft_lite`."""

import sys

from gft_lite.cli import main

sys.exit(main())
