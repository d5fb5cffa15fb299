"""A sweep for a cluster: one job for each run that is not done, as a SLURM array or a JobSet on GKE.

A job is `ddt-jax sweep ... --only NAME`, so what is recorded, skipped and shown is the same wherever runs go. A machine
that is taken away gets SIGTERM: the run saves and leaves with code 75, and its job starts again.
"""

import re
import shlex
from collections.abc import Sequence

from ddt_jax.scaling.sweep import Run

_SLURM = """#!/usr/bin/env bash
#SBATCH --job-name={name}
#SBATCH --array=0-{last}
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@180
#SBATCH --output={logs}/slurm-%a.log
#SBATCH --open-mode=append
# {count} runs of the sweep {name}, one in each job: sbatch --gres=gpu:1 {file}
# Afterwards, or in between: {collect}
set -euo pipefail
names=({names})

status=0
srun --kill-on-bad-exit=0 {command} --only "${{names[$SLURM_ARRAY_TASK_ID]}}" || status=$?
if ((status == 75)); then scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_${{SLURM_ARRAY_TASK_ID}}"; fi
exit "$status"
"""

_JOBSET = """# {count} runs of the sweep {name}, one in each pod. Change what is in capitals, then:
#     kubectl apply -f {file}
# IMAGE holds this checkout in its working directory, installed with `pip install -e .[tpu,gcs]`.
# Afterwards, or in between: {collect}
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: "{label}"
spec:
  failurePolicy:
    maxRestarts: 0  # runs that fail are recorded; what ends a job is a mistake in the sweep
  replicatedJobs:
    - name: runs
      replicas: 1
      template:
        spec:
          completionMode: Indexed
          completions: {count}
          parallelism: {count}
          backoffLimitPerIndex: 100  # a preempted run starts again alone, the others go on
          podFailurePolicy:
            rules:
              - action: FailIndex  # a run that failed by itself would fail again
                onExitCodes: {{containerName: train, operator: In, values: [1, 2]}}
          template:
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: 180
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: tpu-v5-lite-podslice
                cloud.google.com/gke-tpu-topology: 1x1
              containers:
                - name: train
                  image: IMAGE
                  resources:
                    limits:
                      google.com/tpu: 1
                  command:
                    - bash
                    - -euc
                    - |
                      names=({names})
                      exec {command} --only "${{names[$JOB_COMPLETION_INDEX]}}"
"""


def slurm(name: str, runs: Sequence[Run], command: Sequence[str], logs: str, file: str) -> str:
    """The script for `sbatch`.

    Args:
      command: `ddt-jax sweep` with what every job is given.
      logs: where what SLURM prints goes.
      file: where the script is written, for what it says of itself.
    """
    return _SLURM.format(last=len(runs) - 1, logs=logs, **_shared(name, runs, command, file))


def jobset(name: str, runs: Sequence[Run], command: Sequence[str], file: str) -> str:
    """The manifest for `kubectl`. As `slurm`."""
    # A part of the names of pods: it begins with a letter, and leaves room for their numbers below 64 characters.
    label = re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")
    label = label if label[:1].isalpha() else f"sweep-{label}"
    return _JOBSET.format(label=label[:40].strip("-"), **_shared(name, runs, command, file))


def _shared(name, runs, command, file):
    line = shlex.join(command)
    names = shlex.join(run.name for run in runs)
    return {
        "name": name,
        "count": len(runs),
        "names": names,
        "command": line,
        "collect": f"{line} --collect",
        "file": file,
    }
