#!/usr/bin/env bash
# One rank. torchrun knows two ends, success and failure, and starts anew after a failure; the
# program knows two more, which this script tells launch/torchrun.sh through a file.
set -uo pipefail

if [[ ${1:-} == --help || ${1:-} == -h || -z ${START_FOLDER:-} ]]; then
    cat <<'TEXT'
Usage: launch/worker.sh COMMAND...

Runs one rank's command for launch/torchrun.sh, which starts it through torchrun. Two exit codes do
not count as a failure that a restart could mend:

  75   the program was asked to stop and has saved: torchrun ends as after a success. Also where it
       was asked so early in its start that it was ended by the signal: there is nothing to save
  2    the program refused to start, in one line: so do all ranks, or torchrun is stopped
TEXT
    exit
fi

# A signal to all processes reaches the command too: this shell only waits for what it makes of it.
trap : TERM INT HUP
echo $$ >"$START_FOLDER/rank-$LOCAL_RANK.pid"
rm -f "$START_FOLDER/rank-$LOCAL_RANK.code"
[[ $LOCAL_RANK != 0 ]] || rm -f "$START_FOLDER/code"

# end CODE: tell the code, and end as after a success; where this rank alone does, the others wait for
# it, or fail and would be started anew.
end() {
    echo "$1" >"$START_FOLDER/code"
    (sleep 3 && kill -TERM "$PPID") >/dev/null 2>&1 &
    exit 0
}

"$@"
code=$?
case $code in
    75)
        echo $code >"$START_FOLDER/code"
        exit 0
        ;;
    2) end $code ;;
    129 | 130 | 143)
        # A signal's default, which is death, before the program listened to it. torchrun too sends
        # one, where another rank failed.
        sleep 0.5
        [[ ! -f $START_FOLDER/asked ]] || end 75
        ;;
esac
echo $code >"$START_FOLDER/rank-$LOCAL_RANK.code"
exit $code
