#!/usr/bin/env bash
# One machine without accelerators that behaves like several devices, or like several hosts. To try a mesh before renting it.
#
#   launch/local.sh CONFIG WORKDIR [--config.a.b=value ...]
#   DEVICES=8 launch/local.sh configs/smoke.py runs/mesh --config.mesh.fsdp=4 --config.mesh.tensor=2
#   PROCESSES=2 DEVICES=4 launch/local.sh configs/smoke.py runs/hosts
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,6p' "$0"; exit 2; }
config=$1 workdir=$2
shift 2

processes=${PROCESSES:-1}
export JAX_PLATFORMS=cpu
export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=${DEVICES:-8}"

if [ "$processes" = 1 ]; then
    exec ddt-jax train --config "$config" --workdir "$workdir" "$@"
fi

pids=()
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' INT TERM HUP # each process saves; none is left behind
# Each in a process group of its own: what the terminal sends to this one would be a first signal, and ours a second,
# which ends a process before it has saved.
set -m
for ((i = 0; i < processes; i++)); do
    ddt-jax train --config "$config" --workdir "$workdir" \
        --coordinator "127.0.0.1:${PORT:-8476}" --num-processes "$processes" --process-id "$i" "$@" &
    pids+=($!)
done
set +m # else a wait ends when a process is stopped
status=0
for pid in "${pids[@]}"; do
    code=0
    wait "$pid" || code=$?
    while kill -0 "$pid" 2>/dev/null; do # a signal ended the wait, not the process
        code=0
        wait "$pid" || code=$?
    done
    if ((code != 0)); then status=$code; fi
done
exit "$status"
