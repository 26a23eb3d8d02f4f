"""Several runs, one after the other, in the processes of one group: `torchrun many.py runs.json`.

runs.json holds [command, settings] pairs; starting Python and its libraries anew for each would take longer.
"""

import json
import sys
from pathlib import Path

import torch

import byeori
from byeori.model import parallel

torch.set_num_threads(1)
leave, parallel.finish = parallel.finish, lambda: None
for command, settings in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
    getattr(byeori, command)(**settings)
leave()
