#!/usr/bin/env bash
# Before a job: are the nodes alike, free, connected, and do they see one folder?
set -euo pipefail

usage() {
    cat <<'TEXT'
Usage: launch/preflight.sh [OPTIONS]

Starts one process a GPU on this node, or on every node where the same command is run, and prints
one line a node: versions, free memory, clock, the shared folder; then how fast all ranks add up a
tensor. Ends with 0, or with 2 and one line for each problem that says what to do. Run it from the
repository's top.

  --gpus N            processes on this node (default: its GPUs, or 1 where there are none)
  --nodes N           nodes (default: 1)
  --head HOST:PORT    where the nodes meet (needed for 2 or more)
  --id TEXT           name of the meeting, the same on all nodes (default: preflight)
  --shared FOLDER     folder that all nodes have to see and write (default: outputs)
  --free GIB          memory that has to be free on each GPU (default: 90% of it)
  --bandwidth GB/S    the least bus bandwidth of the all-reduce (default: any)
  --skew SECONDS      the most that clocks may differ (default: 1)
  --minutes N         give up when the nodes have not met and answered by then (default: 5)
  --dry-run           print the command and do not start it
  --help              show this text

All nodes of a Slurm job: launch/slurm.sbatch runs it by itself. By hand, on each of two nodes:

  launch/preflight.sh --nodes 2 --head node1:29501
TEXT
}

if [[ ${1:-} == --help || ${1:-} == -h ]]; then
    usage
    exit
fi
if [[ ! -f launch/lib.sh ]]; then
    echo "preflight.sh: no launch/ in $PWD: run it from the repository's top" >&2
    exit 2
fi
source launch/lib.sh

minutes=5 starting=(--id preflight) checks=()
while (($#)); do
    case $1 in
        --gpus | --nodes | --head | --id)
            (($# > 1)) || fail "$1 needs a value"
            starting+=("$1" "$2")
            shift 2
            ;;
        --shared | --free | --bandwidth | --skew)
            (($# > 1)) || fail "$1 needs a value"
            checks+=("$1" "$2")
            shift 2
            ;;
        --minutes)
            (($# > 1)) || fail "$1 needs a value"
            count --minutes "$2"
            minutes=$2
            shift 2
            ;;
        --dry-run)
            starting+=(--dry-run)
            shift
            ;;
        *) fail "unknown word '$1' (see --help)" ;;
    esac
done

# Nothing is saved here that would take time.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=5
trap stop TERM HUP
trap : INT # which a terminal's Ctrl-C sends to all
begin timeout --foreground --kill-after=30 $((minutes * 60)) launch/torchrun.sh "${starting[@]}" \
    --restarts 0 --preflight off --entry launch.preflight -- "${checks[@]}"
attend
case $code in
    0 | 2 | 75 | 130) exit "$code" ;;
    124 | 137) fail "the nodes did not meet and answer in $minutes minutes: is --nodes right, are" \
        "all started, and do they reach --head (network, firewall, NCCL_SOCKET_IFNAME)?" ;;
    *) fail "a process ended with code $code, see above; on GPUs, NCCL_DEBUG=INFO tells more" ;;
esac
