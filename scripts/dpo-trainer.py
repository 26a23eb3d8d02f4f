"""The tutorial's preference training: `python dpo-trainer.py --base_model ... --data-path ...`."""

import sys

from byeori.cli import main

sys.exit(main(command="dpo"))
