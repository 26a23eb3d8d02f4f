#!/bin/bash
# Runs the core of the suite with the oldest versions that pyproject.toml allows, in an environment of its own.
#
#   scripts/lower_bounds.sh [FOLDER]                the environment is made in FOLDER (build/lower-bounds)
#   TORCH=2.13.0+cpu scripts/lower_bounds.sh        with this torch, if the oldest has no wheel for this machine
#   WHEELS=/some/folder scripts/lower_bounds.sh     with wheels from a folder too
#
# It runs the private names of other libraries, kernels, models, adapters, checkpoints, data and short runs.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-build/lower-bounds}
wheels=${WHEELS:+--find-links $WHEELS}

[ -x "$folder/bin/python" ] || python -m venv "$folder"
"$folder/bin/python" -m pip install -q uv
python - "${TORCH:-}" > "$folder/direct.txt" <<'P'
import sys, tomllib

project = tomllib.load(open("pyproject.toml", "rb"))["project"]
wanted = [*project["dependencies"], *project["optional-dependencies"]["quant"]]
if sys.argv[1]:
    wanted = [f"torch=={sys.argv[1]}", *(each for each in wanted if not each.startswith("torch>"))]
print("\n".join(wanted))
P
"$folder/bin/uv" pip compile -q --resolution lowest-direct $wheels --python "$folder/bin/python" \
    "$folder/direct.txt" -o "$folder/lowest.txt"
"$folder/bin/uv" pip install -q $wheels --python "$folder/bin/python" -r "$folder/lowest.txt" \
    pytest pytest-timeout pytest-xdist hypothesis openpyxl odfpy xlwt zstandard aiohttp sqlalchemy 'psycopg[binary]' loguru
# trl's templates and compressed-tensors' codes are read by tests; their requirements are newer versions of the others
"$folder/bin/uv" pip install -q --no-deps --python "$folder/bin/python" trl compressed-tensors -e .
grep -iE "^(torch|transformers|peft|datasets|accelerate|bitsandbytes|huggingface-hub|safetensors|numpy|pydantic)==" \
    "$folder/lowest.txt"
PYTHONPATH=src "$folder/bin/python" -m pytest -q -p no:cacheprovider -m "not real and not gpu and not slow" \
    tests/test_private_apis.py tests/kernels tests/model tests/data tests/losses tests/batch \
    tests/train/test_checkpoint.py tests/train/test_trainer.py tests/export/test_merge.py
