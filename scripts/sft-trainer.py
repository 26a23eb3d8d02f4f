"""The tutorial's training script: `torchrun --nproc_per_node=4 sft-trainer.py --base_model ... --data-path ...`."""

import sys

from byeori.cli import main

sys.exit(main(command="sft"))
