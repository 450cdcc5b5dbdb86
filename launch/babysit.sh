#!/usr/bin/env bash
# Keeps a run on pre-emptible TPUs going: calls tpu_vm.sh until the run has finished. The run id
# names the queued resource and the workdir, so every attempt continues from the last checkpoint.
#
#   launch/babysit.sh [--attempts=N] [--crashes=N] [--backoff=SECONDS] [--max-backoff=SECONDS] \
#       ARGUMENT_OF_TPU_VM_SH ... -- run --config=configs/FILE.py ...
#
#   --attempts=N            at most N attempts in all; default 50
#   --crashes=N             give up after N crashes in a row; default 3
#   --backoff=SECONDS       before the second attempt, then twice as long each time; default 30
#   --max-backoff=SECONDS   but never longer, and an attempt that lasted longer than this starts
#                           the back-off anew; default 600
#   --dry-run               print the commands of one attempt and run none
#
# It stops at once on success (0), on a mistake of yours (2), and on Ctrl-C or SIGTERM, when the
# workers save and the resource is deleted. Pre-emption (75, 76) and missing capacity (69) are
# tried again; so is any other exit code, a crash, but only --crashes times in a row.

# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

attempts=50 crashes=3 backoff=30 longest=600
options=()
while (($#)) && [[ $1 != -- ]]; do
  case $1 in
    --attempts=*) attempts=${1#*=} ;;
    --crashes=*) crashes=${1#*=} ;;
    --backoff=*) backoff=${1#*=} ;;
    --max-backoff=*) longest=${1#*=} ;;
    --dry-run) dry_run=1 ;;
    --help | -h)
      usage
      exit
      ;;
    *) options+=("$1") ;;
  esac
  shift
done
need --attempts "$attempts" '[1-9][0-9]*' "a positive number"
need --crashes "$crashes" '[1-9][0-9]*' "a positive number"
need --backoff "$backoff" '[0-9]+' "a number of seconds"
need --max-backoff "$longest" '[0-9]+' "a number of seconds"

command=("$(dirname "${BASH_SOURCE[0]}")/tpu_vm.sh" "${options[@]}" "$@")
if [[ $dry_run ]]; then
  show "${command[@]}"
  exec "${command[0]}" --dry-run "${command[@]:1}"
fi

# A child in the background does not receive Ctrl-C; SIGTERM makes it save, delete and end.
# shellcheck disable=SC2317,SC2329 # called by traps
stop() {
  trap '' INT TERM HUP
  if [[ $child ]]; then
    kill -TERM "$child" 2>/dev/null || true
    wait "$child" || true
  fi
  exit "$1"
}
trap 'stop 129' HUP
trap 'stop 130' INT
trap 'stop 143' TERM

delay=$backoff crashed=0
for ((attempt = 1; attempt <= attempts; attempt++)); do
  note "attempt $attempt of $attempts"
  begin=$SECONDS code=0
  run_child "${command[@]}" || code=$?
  case $code in
    0)
      note "finished"
      exit 0
      ;;
    2)
      note "a mistake that another attempt would repeat: not trying again"
      exit 2
      ;;
    129 | 130 | 143) exit "$code" ;;
    69 | 75 | 76) crashed=0 ;;
    *)
      if ((++crashed == crashes)); then
        note "crashed $crashes times in a row (exit code $code): giving up"
        exit "$code"
      fi
      ;;
  esac
  ((attempt < attempts)) || break
  ((SECONDS - begin <= longest)) || delay=$backoff
  note "attempt $attempt ended with exit code $code; the next one in $delay s"
  pause "$delay"
  delay=$((delay * 2 > longest ? longest : delay * 2))
done
note "gave up after $attempts attempts; run the same command again to continue"
exit "$code"
