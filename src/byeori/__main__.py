"""`python -m byeori` is the command line."""

import sys

from byeori.cli import main

sys.exit(main())
