#!/usr/bin/env bash
# Two machines on one: two network namespaces joined by a cable, torchrun in each, two processes a machine.
#
#   benchmarks/two_machines.sh OUTPUT byeori-flags...      (as root; needs iproute2)
#
# Runs the same job whole (ddp), sharded over all (fsdp) and over each machine (hsdp), and compares their losses; then
# kills a process of the second machine in the middle of a run, which both machines must go on from by themselves.
set -euo pipefail
output=$1; shift
python=${PYTHON:-python}
clean() { ip netns del byeori-a 2>/dev/null || true; ip netns del byeori-b 2>/dev/null || true; }
trap clean EXIT
clean
ip netns add byeori-a; ip netns add byeori-b
ip link add cable-a netns byeori-a type veth peer name cable-b netns byeori-b
for side in a b; do
    number=$([ $side = a ] && echo 1 || echo 2)
    ip -n byeori-$side addr add 10.77.0.$number/24 dev cable-$side
    ip -n byeori-$side link set cable-$side up
    ip -n byeori-$side link set lo up
done

machine() { # side, restarts, flags...
    local side=$1 restarts=$2; shift 2
    # --local-addr: both namespaces share this machine's name, which a real second machine does not
    GLOO_SOCKET_IFNAME=cable-$side OMP_NUM_THREADS=1 ip netns exec byeori-$side "$python" -m torch.distributed.run \
        --nnodes=2 --nproc-per-node=2 --max-restarts="$restarts" --rdzv-backend=c10d \
        --rdzv-endpoint=10.77.0.1:29400 --rdzv-id=two-machines --rdzv-conf=is_host=$([ $side = a ] && echo 1 || echo 0) \
        --local-addr=10.77.0.$([ $side = a ] && echo 1 || echo 2) -m byeori "$@"
}

compare() { # a run's losses with those of ddp
    "$python" - "$output" "$1" <<'PY'
import json, sys
from pathlib import Path
one, other = (
    [json.loads(line)["loss"] for line in (Path(sys.argv[1]) / way / "train_log.jsonl").read_text().splitlines()]
    for way in ("ddp", sys.argv[2])
)
worst = max(abs(a - b) / abs(b) for a, b in zip(one, other, strict=True))
print(f"{sys.argv[2]} and ddp: {len(one)} steps on two machines, losses differ by at most {worst:.1e}")
sys.exit(worst > 1e-5)
PY
}

for way in ddp fsdp hsdp; do
    machine a 0 "$@" --parallel $way --output_dir "$output/$way" &
    first=$!
    machine b 0 "$@" --parallel $way --output_dir "$output/$way"
    wait $first
done
compare fsdp; compare hsdp

machine a 2 "$@" --parallel fsdp --save_steps 2 --output_dir "$output/killed" &
first=$!
machine b 2 "$@" --parallel fsdp --save_steps 2 --output_dir "$output/killed" &
second=$!
until [ "$(grep -c loss "$output/killed/train_log.jsonl" 2>/dev/null)" -ge 3 ] 2>/dev/null; do sleep 0.1; done
for process in $(ip netns pids byeori-b); do
    if tr '\0' ' ' < /proc/$process/cmdline | grep -q -- '-m byeori' && grep -qz '^LOCAL_RANK=1$' /proc/$process/environ
    then kill -9 $process; fi
done
wait $first; wait $second
compare killed
