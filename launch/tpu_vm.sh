#!/usr/bin/env bash
# Runs on every worker of a TPU VM slice. Each worker needs this checkout with `pip install -e .[tpu]` done, and WORKDIR must be
# a bucket (gs://..., `pip install -e .[tpu,gcs]`) that all of them can write to. From your own machine:
#
#   gcloud compute tpus tpu-vm ssh NAME --zone ZONE --worker=all \
#       --command 'cd ddt_jax && . .venv/bin/activate && launch/tpu_vm.sh CONFIG gs://BUCKET/RUN [--config.a.b=value ...]'
#
# Code 75 means that the run was asked to stop and has saved; the same command goes on. --config.train.maintenance=gce also
# asks the cloud whether the worker will be taken away: for those that it takes without a signal.
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,9p' "$0"; exit 2; }
config=$1 workdir=$2
shift 2

attribute() { # a value that the cloud keeps about this worker
    curl -sf -H 'Metadata-Flavor: Google' "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1"
}

worker=$(attribute agent-worker-number)
IFS=, read -r -a endpoints <<<"$(attribute worker-network-endpoints)" # entries are like uid:port:address

exec ddt-jax train --config "$config" --workdir "$workdir" \
    --coordinator "${endpoints[0]##*:}:8476" --num-processes "${#endpoints[@]}" --process-id "$worker" "$@"
