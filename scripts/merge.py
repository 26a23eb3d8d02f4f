"""The tutorial's merge script: `python merge.py --base_model_name_or_path ... --peft_model_path ...`."""

import sys

from byeori.cli import main

sys.exit(main(command="merge"))
