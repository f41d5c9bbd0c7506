"""`python -m gft_lite`."""

from __future__ import annotations

import sys

from gft_lite.cli import main

sys.exit(main())
