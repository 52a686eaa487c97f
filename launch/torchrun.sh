#!/usr/bin/env bash
# Start a job on one node, or this node's share of a job on many, through torchrun.
set -euo pipefail

usage() {
    cat <<'TEXT'
Usage: launch/torchrun.sh [OPTIONS] [OVERRIDES...]

Starts python -m twinflow_train.train with one process a GPU. The first word that is not an option
below, and all after it, go to the trainer unchanged (`--` ends the options explicitly).

  --gpus N          processes on this node (default: its GPUs, or 1 where there are none)
  --nodes N         nodes of the job (default: 1); run the same command on every node
  --head HOST:PORT  where the nodes meet: any one of them and a free port (needed for 2 or more)
  --id TEXT         name of the meeting, the same on all nodes (default: twinflow)
  --entry NAME      another module of twinflow_train to start (default: train)
  --dry-run         print the command and do not start it
  --help            show this text

  PYTHON            interpreter (default: .venv/bin/python here, else python3)

One node with 8 GPUs:   launch/torchrun.sh experiment=digits_twinflow micro_batch=8
Two nodes, on each:     launch/torchrun.sh --nodes 2 --head node1:29500 experiment=digits_twinflow micro_batch=4
TEXT
}

fail() {
    echo "torchrun.sh: $*" >&2
    exit 2
}

count() { # count OPTION VALUE: refuse a value that is no count
    [[ $2 =~ ^[1-9][0-9]*$ ]] || fail "$1 must be a number of at least 1, got '$2'"
}

gpus='' nodes=1 head='' id=twinflow entry=train dry=false
while (($#)); do
    case $1 in
        --gpus | --nodes | --head | --id | --entry)
            (($# > 1)) || fail "$1 needs a value"
            declare "${1#--}=$2"
            shift 2
            ;;
        --dry-run)
            dry=true
            shift
            ;;
        --help | -h)
            usage
            exit
            ;;
        --)
            shift
            break
            ;;
        *) break ;;
    esac
done

[[ -z $gpus ]] || count --gpus "$gpus"
count --nodes "$nodes"
if [[ -z ${PYTHON:-} ]]; then
    PYTHON=python3
    [[ ! -x .venv/bin/python ]] || PYTHON=.venv/bin/python
fi
if [[ -z $gpus ]]; then
    if [[ -n ${CUDA_VISIBLE_DEVICES:-} ]]; then
        gpus=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c .)
    else
        gpus=$( (nvidia-smi --list-gpus 2>/dev/null || true) | grep -c '^GPU' || true)
    fi
    ((gpus > 0)) || gpus=1
fi

# Asked to stop, the trainer saves: torchrun's 30 seconds are too few for a large network.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-110}

meeting=(--standalone)
if ((nodes > 1)); then
    [[ $head =~ ^[^:]+:[0-9]+$ ]] || fail "--nodes $nodes needs --head HOST:PORT, got '$head'"
    meeting=(--nnodes="$nodes" --rdzv-backend=c10d --rdzv-endpoint="$head" --rdzv-id="$id")
fi

command=(
    "$PYTHON" -m torch.distributed.run "${meeting[@]}" --nproc-per-node="$gpus"
    -m "twinflow_train.$entry" "$@"
)
printf '%q ' "${command[@]}"
echo
$dry || exec "${command[@]}"
