#!/usr/bin/env bash
# Submit launch/slurm.sbatch, after looking for what would stop the job once it has waited for days.
set -euo pipefail

usage() {
    cat <<'TEXT'
Usage: launch/submit.sh [SBATCH OPTIONS] -- [OVERRIDES...]

Checks the configuration, the shards and the account, prints the sbatch command and runs it. Options
before `--` go to sbatch, OVERRIDES to the trainer, both unchanged. Run it from the repository's top
on a node that has sbatch:

  launch/submit.sh --nodes=8 --gres=gpu:8 --account=ACCOUNT --partition=PARTITION -- \
      experiment=digits_twinflow micro_batch=1

  --dry-run  check and print, and do not submit
  --help     show this text

  launch/site.sh           account and partition of this cluster, once and for all
  launch/slurm.sbatch      --help tells what the environment can change in the job
TEXT
}

if [[ ${1:-} == --help || ${1:-} == -h ]]; then
    usage
    exit
fi
if [[ ! -f launch/lib.sh ]]; then
    echo "submit.sh: no launch/ in $PWD: run it from the repository's top" >&2
    exit 2
fi
source launch/lib.sh

options=() dry=false nodes=1 per_node=8 account=${SBATCH_ACCOUNT:-} partition=${SBATCH_PARTITION:-}
# shellcheck source=/dev/null
[[ ! -f launch/site.sh ]] || source launch/site.sh
account=${SBATCH_ACCOUNT:-$account} partition=${SBATCH_PARTITION:-$partition}
while (($#)); do
    case $1 in
        --)
            shift
            break
            ;;
        --dry-run)
            dry=true
            shift
            continue
            ;;
        --account=* | --partition=* | --nodes=*) declare "${1#--}" ;;&
        --account | --partition | --nodes)
            (($# > 1)) || fail "$1 needs a value"
            declare "${1#--}=$2"
            ;;&
        -A) account=${2:-} ;;&
        -p) partition=${2:-} ;;&
        -N) nodes=${2:-} ;;&
        --gres=gpu:* | --gpus-per-node=*) per_node=${1##*[:=]} ;;&
        -*)
            options+=("$1")
            shift
            # The value of an option that stands apart from it.
            while (($#)) && [[ $1 != -* ]]; do
                [[ $1 != *=* ]] || fail "'$1' is an override: put it after --"
                options+=("$1")
                shift
            done
            ;;
        *) fail "'$1' is not an option of sbatch: put overrides after --" ;;
    esac
done

command -v sbatch >/dev/null || fail "no sbatch here: run it where Slurm is"
scontrol ping 2>/dev/null | grep -q UP || fail "Slurm's controller does not answer (scontrol ping)"
if [[ -z $account ]]; then
    config=$(scontrol show config)
    if grep -q '^AccountingStorageEnforce .*associations' <<<"$config"; then
        account=$(sacctmgr --noheader --parsable2 show user "$USER" format=DefaultAccount || true)
        [[ -n $account ]] || fail "this cluster wants an account: give --account=NAME, or set" \
            "SBATCH_ACCOUNT in launch/site.sh"
    fi
    allowed=$(scontrol show partition ${partition:+"$partition"} 2>/dev/null |
        awk -v any="${partition:+1}" '/^PartitionName/ {name = $1}
            /AllowAccounts=/ {sub(/.*AllowAccounts=/, ""); sub(/ .*/, ""); accounts = $0}
            / Default=/ && (any || /Default=YES/) {print accounts}')
    [[ -z $allowed || $allowed == ALL ]] ||
        fail "the partition wants an account of $allowed: give --account=NAME, or set" \
            "SBATCH_ACCOUNT in launch/site.sh"
fi
CONTAINER='' command -v "$(CONTAINER='' interpreter)" >/dev/null ||
    fail "no interpreter $(CONTAINER='' interpreter): run 'make install', or set PYTHON"
most=${nodes#*-}
[[ $most =~ ^[0-9]+$ && $per_node =~ ^[0-9]+$ ]] || fail "cannot read the numbers of nodes and GPUs"
"$(CONTAINER='' interpreter)" -m launch.check --ranks $((most * ${RANKS:-$per_node})) -- "$@" || exit
command=(sbatch "${options[@]}" launch/slurm.sbatch "$@")
show "${command[@]}"
$dry || exec "${command[@]}"
