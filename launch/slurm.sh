#!/usr/bin/env bash
#SBATCH --job-name=ddt-jax
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@180
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
# One process per node, which takes all its accelerators. Three minutes before the time is up every process is asked to stop;
# the run saves and leaves with code 75, upon which the job queues again and goes on. So it does when a process was killed
# (76 of the others), was stopped before there was anything to save (143), stood still (77, train.silence_limit), or when data
# or storage is away (76), at most RESTARTS times.
#
#   sbatch --nodes=4 --gres=gpu:8 launch/slurm.sh CONFIG WORKDIR [--config.a.b=value ...]
#
# WORKDIR must be the same storage on all nodes. `ddt-jax` must be on PATH: activate its environment before sbatch.
# CHIP=h100 in front sets the compiler's flags for that chip (`ddt-jax flags --chip h100 --explain`).
set -euo pipefail
[ $# -ge 2 ] || { sed -n '10,18p' "$0"; exit 2; }

if [ -n "${CHIP:-}" ]; then
    flags=$(ddt-jax flags --chip "$CHIP")
    eval "$flags"
fi

status=0
srun --kill-on-bad-exit=0 ddt-jax train --config "$1" --workdir "$2" --coordinator slurm "${@:3}" || status=$?
case $status in
75) again=1 ;;
76 | 77 | 137 | 143) again=$((${SLURM_RESTART_COUNT:-0} < ${RESTARTS:-10})) ;;
*) again=0 ;;
esac
if ((again)); then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$status"
