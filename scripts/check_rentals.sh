#!/bin/sh
# Have SkyPilot's and dstack's own parsers read what `byeori rent` writes, each in an environment of its own:
#     scripts/check_rentals.sh MODEL ROWS [SETTINGS ...]
set -e
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
${PYTHON:-python3} -m byeori rent "$@" --rent_dir "$work/rent" > /dev/null
export HOME="$work"  # both write into it
for package in skypilot dstack; do
    python3 -m venv "$work/$package"
    "$work/$package/bin/pip" install -q "$package"
done
"$work/skypilot/bin/python" - "$work/rent/sky.yaml" << 'END'
import sys, sky
print("SkyPilot", sky.__version__, sky.Task.from_yaml(sys.argv[1]).resources)
END
"$work/dstack/bin/python" - "$work/rent/.dstack.yml" << 'END'
import sys, yaml
from dstack._internal.core.models.configurations import parse_apply_configuration
from dstack.version import __version__
from gpuhunt import KNOWN_ACCELERATORS
with open(sys.argv[1]) as file:
    task = parse_apply_configuration(yaml.safe_load(file))
gpu = task.resources.gpu
assert set(gpu.name) <= {known.name for known in KNOWN_ACCELERATORS}, gpu.name
print("dstack", __version__, type(task).__name__, gpu.name, gpu.count)
END
