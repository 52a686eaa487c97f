#!/usr/bin/env bash
# One rank. torchrun knows two ends, success and failure, and starts anew after a failure; the
# program knows two more, which this script tells launch/torchrun.sh through a file.
set -uo pipefail

if [[ ${1:-} == --help || ${1:-} == -h || -z ${START_FOLDER:-} ]]; then
    cat <<'TEXT'
Usage: launch/worker.sh COMMAND...

Runs one rank's command for launch/torchrun.sh, which starts it through torchrun. Two exit codes do
not count as a failure that a restart could mend:

  75   the program was asked to stop and has saved: torchrun ends as after a success
  2    the program refused to start, in one line: so do all ranks, or torchrun is stopped
TEXT
    exit
fi

# A signal to all processes reaches the command too: this shell only waits for what it makes of it.
trap : TERM INT HUP
echo $$ >"$START_FOLDER/rank-$LOCAL_RANK.pid"
[[ $LOCAL_RANK != 0 ]] || rm -f "$START_FOLDER/code"

"$@"
code=$?
case $code in
    75)
        echo $code >"$START_FOLDER/code"
        exit 0
        ;;
    2)
        echo $code >"$START_FOLDER/code"
        # Where one rank alone refuses, the others wait for it, or fail and would be started anew.
        (sleep 3 && kill -TERM "$PPID") >/dev/null 2>&1 &
        exit 0
        ;;
esac
exit $code
