#!/usr/bin/env bash
# Runs on every worker of a TPU VM slice, or of several. Each worker needs this checkout with `pip install -e .[tpu]` done, and
# WORKDIR must be a bucket (gs://..., `pip install -e .[tpu,gcs]`) that all of them can write to. From your own machine:
#
#   gcloud compute tpus tpu-vm ssh NAME --zone ZONE --worker=all \
#       --command 'cd ddt_jax && . .venv/bin/activate && launch/tpu_vm.sh CONFIG gs://BUCKET/RUN [--config.a.b=value ...]'
#
# Code 75 means that the run was asked to stop and has saved; the same command goes on. CHIP=v5p in front of launch/tpu_vm.sh
# sets the compiler's flags for that chip (`ddt-jax flags --chip v5p --explain`). --config.train.maintenance=gce also asks the
# cloud whether the worker will be taken away: for those that it takes without a signal.
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,10p' "$0"; exit 2; }

if [ -n "${CHIP:-}" ]; then
    flags=$(ddt-jax flags --chip "$CHIP")
    eval "$flags"
fi

exec ddt-jax train --config "$1" --workdir "$2" --coordinator tpu "${@:3}"
