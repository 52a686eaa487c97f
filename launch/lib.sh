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
