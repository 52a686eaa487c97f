#!/usr/bin/env bash
# What Slurm runs before each task of a sweep (conf/hydra/launcher/slurm.yaml): every line that it
# prints and that starts with `export` goes into the task's environment.
set -euo pipefail

if [[ ${1:-} == --help || ${1:-} == -h ]]; then
    cat <<'TEXT'
Usage: SLURM_TASK_PROLOG=$PWD/launch/ranks.sh srun COMMAND...

Gives each task the variables of torchrun that differ among them: RANK, LOCAL_RANK, LOCAL_WORLD_SIZE.
WORLD_SIZE, MASTER_ADDR and MASTER_PORT are the same for all: export them before srun.
TEXT
    exit
fi
echo "export RANK=$SLURM_PROCID"
echo "export LOCAL_RANK=$SLURM_LOCALID"
echo "export LOCAL_WORLD_SIZE=${SLURM_TASKS_PER_NODE%%[!0-9]*}"
