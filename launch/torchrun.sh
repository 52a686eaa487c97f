#!/usr/bin/env bash
# Start a job on one node, or this node's share of a job on many, through torchrun.
set -euo pipefail

usage() {
    cat <<'TEXT'
Usage: launch/torchrun.sh [OPTIONS] [OVERRIDES...]

Starts python -m twinflow_train.train with one process a GPU. The first word that is not an option
below, and all after it, go to the trainer unchanged (`--` ends the options explicitly). Run it from
the repository's top.

  --gpus N          processes on this node (default: its GPUs, or 1 where there are none)
  --nodes N         nodes of the job (default: 1); run the same command on every node
  --nodes MIN:MAX   go on with fewer nodes when some are lost, and with more when they come back,
                    if the ranks that there are divide the batch
  --head HOST:PORT  where the nodes meet: any one of them and a free port (needed for 2 or more)
  --id TEXT         name of the meeting, the same on all nodes (default: twinflow)
  --restarts N      how often a crash starts all ranks anew, from the last checkpoint (default: 3)
  --preflight WHEN  on: compare the nodes before the start; off (default: on for 2 nodes or more,
                    off for MIN:MAX, whose nodes need not come at once)
  --entry NAME      another module to start, of twinflow_train unless it has a dot (default: train)
  --dry-run         print the command and do not start it
  --help            show this text

  PYTHON            interpreter (default: .venv/bin/python here, else python3)
  launch/env.sh     all other settings of the environment

SIGTERM, SIGUSR1 and Ctrl-C ask the trainer to save and stop; a second Ctrl-C ends it at once.
Exit codes: 0 done, 75 stopped and saved (start again to continue), 2 refused, else a failure.

One node with 8 GPUs:   launch/torchrun.sh experiment=digits_twinflow micro_batch=8
Two nodes, on each:     launch/torchrun.sh --nodes 2 --head node1:29500 experiment=digits_twinflow micro_batch=4
TEXT
}

if [[ ${1:-} == --help || ${1:-} == -h ]]; then
    usage
    exit
fi
if [[ ! -f launch/lib.sh ]]; then
    echo "torchrun.sh: no launch/ in $PWD: run it from the repository's top" >&2
    exit 2
fi
source launch/lib.sh

gpus='' nodes=1 head='' id=twinflow restarts=3 preflight='' entry=train dry=false
while (($#)); do
    case $1 in
        --gpus | --nodes | --head | --id | --restarts | --preflight | --entry)
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
[[ $nodes != *:*:* ]] || fail "--nodes must be N or MIN:MAX, got '$nodes'"
for number in ${nodes/:/ }; do count --nodes "$number"; done
most=${nodes#*:}
((${nodes%:*} <= most)) || fail "--nodes MIN:MAX needs MIN <= MAX, got '$nodes'"
[[ $restarts =~ ^[0-9]+$ ]] || fail "--restarts must be a number, got '$restarts'"
[[ $nodes == 1 || $nodes == *:* ]] || : "${preflight:=on}"
: "${preflight:=off}"
[[ $preflight == on || $preflight == off ]] || fail "--preflight must be on or off, got '$preflight'"
PYTHON=$(interpreter)
command -v "$PYTHON" >/dev/null || fail "no interpreter $PYTHON: run 'make install', or set PYTHON"
[[ -n $gpus ]] || gpus=$(visible_gpus)
((gpus > 0)) || gpus=1
source launch/env.sh

meeting=(--standalone)
if ((most > 1)); then
    [[ $head =~ ^[^:]+:[0-9]+$ ]] || fail "--nodes $nodes needs --head HOST:PORT, got '$head'"
    meeting=(
        --nnodes="$nodes" --rdzv-backend=c10d --rdzv-endpoint="$head" --rdzv-id="$id"
        --rdzv-conf="$RDZV_CONF"
    )
fi
[[ $entry == *.* ]] || entry=twinflow_train.$entry
command=(
    "$PYTHON" -m torch.distributed.run "${meeting[@]}" --nproc-per-node="$gpus"
    --max-restarts="$restarts" --no-python launch/worker.sh "$PYTHON" -m "$entry" "$@"
)
if $dry; then
    show "${command[@]}"
    exit
fi

START_FOLDER=$(mktemp -d)
export START_FOLDER
killer='' reminder='' interrupts=0

# end SIGNAL: send it to all ranks of this node that still live. Each has a group of its own.
end() {
    local file
    for file in "$START_FOLDER"/rank-*.pid; do
        [[ ! -f $file ]] || kill "-$1" -- "-$(<"$file")" 2>/dev/null || true
    done
}

# ends: print what the ranks ended with that were started here, each code once, and - for a death.
ends() {
    local file
    for file in "$START_FOLDER"/rank-*.pid; do
        [[ ! -f $file ]] || cat "${file%.pid}.code" 2>/dev/null || echo -
    done | sort -u
}

# With torchrun no rank outlives this script: one that did would hold the run's folder.
finish() {
    end KILL
    # shellcheck disable=SC2086  # none, one or two
    kill $killer $reminder 2>/dev/null || true
    rm -rf "$START_FOLDER"
}

on_interrupt() { # a terminal's Ctrl-C has reached torchrun too, which asks the ranks
    touch "$START_FOLDER/asked"
    stopped=true interrupts=$((interrupts + 1))
    if ((interrupts > 1)); then
        [[ -z $child ]] || kill -KILL "$child" 2>/dev/null || true
        exit 130
    fi
}

on_stop() { # torchrun asks the ranks; one that hangs itself, as on a dead connection, is not waited for
    touch "$START_FOLDER/asked"
    stop
    [[ -z $killer && -n $child ]] || return 0
    (later $((TORCH_ELASTIC_SHUTDOWN_TIMEOUT + 15)) kill -KILL "$child") >/dev/null 2>&1 &
    killer=$!
}

on_request() { # for the ranks, again and again: one that has just started does not listen yet
    [[ -z $reminder ]] || return 0
    (while :; do end USR1 && later 2 true; done) >/dev/null 2>&1 &
    reminder=$!
}

trap finish EXIT
trap on_stop TERM HUP
trap on_interrupt INT
trap on_request USR1

code=0
if [[ $preflight == on ]]; then
    # On the next port: nobody meets those who have not left the last meeting yet.
    begin launch/preflight.sh --gpus "$gpus" --nodes "$most" \
        --head "${head%:*}:$((${head##*:} + 1))" --id "$id-preflight"
    attend
    ! $stopped || exit 75
    ((code == 0)) || exit "$code"
fi
show "${command[@]}"
begin "${command[@]}"
attend
if [[ -f $START_FOLDER/code ]]; then
    code=$(<"$START_FOLDER/code")
elif $stopped; then
    # torchrun fails of the request, whatever its ranks made of it.
    case $(ends) in
        '') code=75 ;; # there were none: nothing to save
        0) code=0 ;;
    esac
fi
exit "$code"
