# shellcheck shell=bash
# What the scripts beside this file share. They are run from the repository's top.

# fail WORDS...: end with one line and the code of what a user can mend.
fail() {
    echo "${script:-${0##*/}}: $*" >&2
    exit 2
}

# count OPTION VALUE: refuse a value that is no count.
count() {
    [[ $2 =~ ^[1-9][0-9]*$ ]] || fail "$1 must be a number of at least 1, got '$2'"
}

# interpreter: print which Python starts the program; a container has its own.
interpreter() {
    if [[ -n ${PYTHON:-} ]]; then
        echo "$PYTHON"
    elif [[ -z ${CONTAINER:-} && -x .venv/bin/python ]]; then
        echo .venv/bin/python
    else
        echo python3
    fi
}

# visible_gpus: print how many GPUs this node has, 0 where there is none.
visible_gpus() {
    if [[ -n ${CUDA_VISIBLE_DEVICES:-} ]]; then
        tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c .
    else
        (nvidia-smi --list-gpus 2>/dev/null || true) | grep -c '^GPU' || true
    fi
}

# show WORDS...: print a command so that it can be pasted into a shell.
show() {
    printf '%q ' "$@"
    echo
}

child='' stopped=false

# stop: ask `child` to end, and what begins after it.
stop() {
    stopped=true
    [[ -z $child ]] || kill -TERM "$child" 2>/dev/null || true
}

# begin COMMAND...: start it as `child`. A terminal's Ctrl-C reaches it, which a shell by itself has
# ignored by what it starts in the background; SIGUSR1 does not harm it.
begin() {
    (
        trap - INT
        trap '' USR1
        exec "$@"
    ) &
    child=$!
    ! $stopped || kill -TERM "$child"
}

# shellcheck disable=SC2034  # the scripts use what this sets
# attend: wait for the end of `child`, however many signals are trapped meanwhile, and set `code`.
attend() {
    while :; do
        wait "$child" && code=0 || code=$?
        kill -0 "$child" 2>/dev/null || break
    done
    # A signal may have interrupted the last wait: ask again what the end was.
    wait "$child" && code=0 || code=$?
}

# later SECONDS COMMAND...: run a command after a time; ended by SIGTERM it leaves no sleep behind.
later() {
    local pause
    sleep "$1" &
    pause=$!
    trap 'kill "$pause"; exit' TERM
    shift
    wait "$pause" && "$@"
}

# shellcheck disable=SC2034  # the scripts use what this sets
# container: set `container` (options of srun) and `inside` (words before the command) for the image
# in CONTAINER: a .sif by apptainer, everything else (.sqsh, registry#name:tag) by pyxis.
container() {
    container=() inside=()
    [[ -n ${CONTAINER:-} ]] || return 0
    local mounts=$PWD:$PWD${MOUNTS:+,$MOUNTS}
    case $CONTAINER in
        *.sif)
            [[ -f $CONTAINER ]] || fail "CONTAINER=$CONTAINER is not there"
            inside=(apptainer exec --nv --bind "$mounts" --pwd "$PWD" "$CONTAINER")
            ;;
        /* | ./* | *.sqsh)
            [[ -f $CONTAINER ]] || fail "CONTAINER=$CONTAINER is not there"
            ;;&
        *)
            container=(
                --container-image="$CONTAINER" --container-mounts="$mounts"
                --container-workdir="$PWD" --no-container-mount-home
            )
            ;;
    esac
}
