#!/usr/bin/env bash
# Runs easy-jax on Cloud TPU VMs: creates a queued resource, waits for it, installs the project on
# all workers, runs there, streams rank 0's log, and finally deletes the resource in any case.
#
#   launch/tpu_vm.sh --run-id=ID --zone=ZONE --accelerator-type=TYPE --runs=gs://BUCKET/FOLDER \
#       [OPTION ...] -- run --config=configs/FILE.py [--config.field=value ...]
#
#   --run-id=ID               names the queued resource; the workdir is RUNS/ID
#   --zone=ZONE               for example us-east5-b
#   --accelerator-type=TYPE   v5litepod-4 (one VM), v5litepod-64 (a slice), v5p-128, v6e-16, ...
#   --runs=DIR                folder of all runs, shared by the workers: gs://... or an NFS path
#   --node-count=N            N slices of that type (multi-slice); default 1
#   --spot, --reserved        instead of on demand
#   --project=PROJECT         default: gcloud's
#   --runtime-version=V       default: the one for the accelerator
#   --commit=REVISION         install this git revision; default: the local tree as it is, with
#                             new files, without ignored ones
#   --setup=COMMAND           a shell command, run on every worker in the project's folder before
#                             easy-jax, as 'gcloud storage cp gs://BUCKET/DATA.jsonl .'
#   --secret=NAME             give the workers this environment variable, as HF_TOKEN; repeatable
#   --create-flag=FLAG        for `queued-resources create`, as --service-account=...; repeatable
#   --connect-flag=FLAG       for gcloud's `ssh` and `scp`, as --tunnel-through-iap; repeatable
#   --wait=SECONDS            give up when it is not active by then; default: wait for ever
#   --poll=SECONDS            between looks at its state; default 30
#   --keep                    do not delete it at the end
#   --dry-run                 print every command and run none
#
# The same command again continues the run, on the same resource if it is still there.
# Exit codes are easy-jax's: 0 finished, 2 a mistake of yours, 75 and 76 interrupted or pre-empted
# (run it again), and 69 when there was no capacity.

# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
readonly NO_CAPACITY=69 INTERRUPTED=75 PEERS_LOST=76

run_id='' zone='' accelerator='' runs='' nodes=1 runtime='' commit='' setup=''
wait_seconds=0 poll=30 keep=''
tier=() common=() create_flags=() connect_flags=()
while (($#)); do
  case $1 in
    --run-id=*) run_id=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --accelerator-type=*) accelerator=${1#*=} ;;
    --runs=*) runs=${1#*=} ;;
    --node-count=*) nodes=${1#*=} ;;
    --spot | --reserved) tier+=("$1") ;;
    --project=*)
      need_project "${1#*=}"
      common+=("$1")
      ;;
    --runtime-version=*) runtime=${1#*=} ;;
    --commit=*) commit=${1#*=} ;;
    --setup=*) setup=${1#*=} ;;
    --create-flag=*) create_flags+=("${1#*=}") ;;
    --connect-flag=*) connect_flags+=("${1#*=}") ;;
    --wait=*) wait_seconds=${1#*=} ;;
    --poll=*) poll=${1#*=} ;;
    --keep) keep=1 ;;
    --)
      shift
      break
      ;;
    *) shared_option "$1" ;;
  esac
  shift
done

need_run_id "$run_id"
need_zone "$zone"
[[ $accelerator != v5e-* ]] || die "--accelerator-type=$accelerator: v5e is called v5litepod-N here"
need --accelerator-type "$accelerator" '(v[234]|v5p|v5litepod|v6e)-[1-9][0-9]*' \
  "a type like v5litepod-16, v5p-8, v6e-8 or v4-8"
need --node-count "$nodes" '[1-9][0-9]{0,3}' "a number of slices"
need --wait "$wait_seconds" '[0-9]+' "a number of seconds"
need --poll "$poll" '[0-9]+' "a number of seconds"
need_runs "$runs"
((${#tier[@]} < 2)) || die "--spot and --reserved exclude each other"
need_secrets "${secrets[@]}"
need_easy_jax "$@"
arguments=("$@" "--workdir=$runs/$run_id")

# The number in a type is that of chips for v5e and v6e, and of cores, two per chip, for the others.
# A host has four chips; the largest single host of v5e and v6e has eight.
size=${accelerator##*-}
case $accelerator in
  v5litepod-* | v6e-*) workers=$((size <= 8 ? 1 : (size + 3) / 4)) ;;
  *) workers=$(((size + 7) / 8)) ;;
esac
workers=$((workers * nodes))
case $accelerator in
  v6e-*) : "${runtime:=v2-alpha-tpuv6e}" ;;
  v5p-*) : "${runtime:=v2-alpha-tpuv5}" ;;
  v5litepod-*) : "${runtime:=v2-alpha-tpuv5-lite}" ;;
  *) : "${runtime:=tpu-ubuntu2204-base}" ;;
esac

common+=("--zone=$zone" --quiet)
resource=(gcloud compute tpus queued-resources)
everywhere=(--node=all --worker=all)
folder=easy_jax_$run_id # in the home of every worker
temporary=$(mktemp -d)
created='' started=''

# Prints the state of the queued resource, ABSENT, or UNKNOWN if gcloud does not return it.
state() {
  local answer
  if answer=$("${resource[@]}" describe "$run_id" "${common[@]}" --format='value(state.state)' \
    2>"$temporary/error"); then
    echo "${answer:-UNKNOWN}"
  elif grep -qi 'not[_ ]found' "$temporary/error"; then
    echo ABSENT
  else
    cat "$temporary/error" >&2
    echo UNKNOWN
  fi
}

delete() { run "${resource[@]}" delete "$run_id" "${common[@]}" --force; }

# on_workers WHERE... -- COMMAND: writes the answers of worker.sh to the file `answers`.
on_workers() {
  local where=()
  while [[ $1 != -- ]]; do
    where+=("$1")
    shift
  done
  shift
  run_child "${resource[@]}" ssh "$run_id" "${common[@]}" "${where[@]}" \
    --ssh-flag=-oServerAliveInterval=30 "${connect_flags[@]}" \
    --command="$(quote bash "$folder/worker.sh" "$@")"
}

# gcloud only warns about a node that it cannot reach, so the answers are counted.
ask() {
  local code=0
  [[ $dry_run ]] && on_workers "${everywhere[@]}" -- "$@" && return
  on_workers "${everywhere[@]}" -- "$@" >"$temporary/answers" || code=$?
  ((code == 0)) || return "$code"
  local count
  count=$(grep -c '^easy_jax ' "$temporary/answers") || true
  ((count == workers)) && return
  note "$count of $workers workers answered"
  return 1
}

# Tries a command that needs a connection three times; distinguishes a pre-empted resource from a
# bad one. Exit code 2 is gcloud's for a wrong flag, 3 is worker.sh's if another run uses a worker.
persist() {
  local try code
  for try in 1 2 3; do
    code=0
    "$@" || code=$?
    ((code == 0)) && return
    ((code == 2)) && exit 2
    if ((code == 3)); then
      created='' # not this run's to delete
      exit 2
    fi
    still_active || exit "$INTERRUPTED"
    note "try $try failed (exit code $code): $(quote "$@")"
    pause "$poll"
  done
  exit 1
}

still_active() {
  local now
  now=$(state)
  [[ $now == ACTIVE || $now == UNKNOWN ]] && return
  note "pre-empted: the queued resource is $now"
  return 1
}

# shellcheck disable=SC2317,SC2329 # called by traps
cleanup() {
  local code=$? try
  trap '' INT TERM HUP
  trap - EXIT
  if [[ $created && $keep ]]; then
    note "kept; delete it with: $(quote "${resource[@]}" delete "$run_id" "${common[@]}" --force)"
  elif [[ $created ]]; then
    for try in 1 2 3; do
      if [[ ! $dry_run && $(state) == ABSENT ]]; then
        [[ $created == unsure && $try == 1 ]] || break # a request that was cut off may still arrive
      elif delete; then
        break
      fi
      if ((try == 3)); then
        note "NOT DELETED, it goes on costing: delete the queued resource $run_id by hand"
      fi
      sleep "$poll"
    done
  fi
  rm -rf "$temporary"
  exit "$code"
}

# shellcheck disable=SC2317,SC2329 # called by traps
interrupted() {
  trap '' INT TERM HUP
  [[ $child ]] && kill -TERM "$child" 2>/dev/null
  if [[ $started ]]; then
    note "interrupted: the workers save and stop"
    on_workers "${everywhere[@]}" -- stop || true
  fi
  exit "$1"
}
trap cleanup EXIT
trap 'interrupted 129' HUP
trap 'interrupted 130' INT
trap 'interrupted 143' TERM

# Puts the project, worker.sh and the secrets into one folder to be copied.
pack() {
  local tree=TREE stage=$temporary/$folder name
  local git=(git -C "$(dirname "$here")") index=(env "GIT_INDEX_FILE=$temporary/index")
  mkdir -m 700 "$stage"
  if [[ $commit ]]; then
    capture tree "${git[@]}" rev-parse --quiet --verify "$commit^{tree}" ||
      die "--commit=$commit is no revision of this repository"
  else # HEAD and all changes, by way of an index of its own
    run "${index[@]}" "${git[@]}" read-tree HEAD
    run "${index[@]}" "${git[@]}" add --all
    capture tree "${index[@]}" "${git[@]}" write-tree
  fi
  run "${git[@]}" archive --format=tar.gz --output="$stage/source.tar.gz" "$tree"
  run cp "$here/worker.sh" "$stage/worker.sh"
  echo "$tree" >"$stage/version"
  # With this token the processes recognise each other; it is new for every start.
  (umask 077 && printf 'EASY_JAX_RUN_TOKEN=%s\n' "$(random_token)" >"$stage/secrets")
  for name in "${secrets[@]}"; do
    note "the value of $name is written to a file that only you can read, and copied"
    [[ $dry_run ]] || (umask 077 && printf '%s=%q\n' "$name" "${!name}" >>"$stage/secrets")
  done
}

create() {
  local nodes_flags=("--node-id=$run_id")
  ((nodes == 1)) || nodes_flags=("--node-count=$nodes" "--node-prefix=$run_id")
  show "${resource[@]}" describe "$run_id" "${common[@]}" --format='value(state.state)'
  local now=ABSENT
  [[ $dry_run ]] || now=$(state)
  created=unsure
  case $now in
    ABSENT) ;;
    FAILED | SUSPENDING | SUSPENDED | DELETING) delete ;;
    *)
      note "the queued resource $run_id is there already ($now): continuing on it"
      created=1
      return
      ;;
  esac
  run_child "${resource[@]}" create "$run_id" "${common[@]}" "${nodes_flags[@]}" \
    "--accelerator-type=$accelerator" "--runtime-version=$runtime" "${tier[@]}" "${create_flags[@]}"
  created=1
}

wait_until_active() {
  local now last='' begin=$SECONDS
  show "${resource[@]}" describe "$run_id" "${common[@]}" --format='value(state.state)'
  [[ $dry_run ]] && return
  while true; do
    now=$(state)
    [[ $now == "$last" ]] || note "the queued resource is $now"
    last=$now
    case $now in
      ACTIVE) return ;;
      FAILED | SUSPENDING | SUSPENDED | DELETING | ABSENT) exit "$NO_CAPACITY" ;;
    esac
    if ((wait_seconds > 0 && SECONDS - begin >= wait_seconds)); then
      note "not active after $wait_seconds s"
      exit "$NO_CAPACITY"
    fi
    pause "$poll"
  done
}

# shellcheck disable=SC2329 # called by persist
upload() {
  run_child "${resource[@]}" scp --recurse "$temporary/$folder" "$run_id:" \
    "${common[@]}" "${everywhere[@]}" "${connect_flags[@]}"
}

# Streams rank 0's log until every worker has ended; the job continues if connections break.
follow() {
  local failures=0
  while true; do
    on_workers --node=0 --worker=0 -- follow || true
    if ask status; then
      [[ $dry_run ]] && return
      failures=0
      grep -q '^easy_jax [^ ]* running$' "$temporary/answers" || return 0
    else
      still_active || exit "$INTERRUPTED"
      if ((++failures == 5)); then
        note "the workers cannot be reached"
        exit "$PEERS_LOST"
      fi
    fi
    pause "$poll"
  done
}

# One exit code for all workers: a mistake of the user comes first, then a crash, because both make
# the other workers end with 76.
verdict() {
  local code lost='' stopped='' peers='' crash=''
  while read -r code; do
    case $code in
      0) ;;
      2) return 2 ;;
      75) stopped=1 ;;
      76) peers=1 ;;
      lost) lost=1 ;;
      *) crash=$code ;;
    esac
  done < <(awk '$1 == "easy_jax" { print $NF }' "$temporary/answers")
  [[ ! $crash ]] || return "$crash"
  [[ ! $lost && ! $peers ]] || return "$PEERS_LOST"
  [[ ! $stopped ]] || return "$INTERRUPTED"
}

pack
create
wait_until_active
persist upload
persist ask install
[[ ! $setup ]] || persist ask setup "$setup"
started=1
persist ask start "${arguments[@]}"
follow
[[ ! $dry_run ]] || exit 0
code=0
verdict || code=$?
note "$run_id ended with exit code $code; workdir $runs/$run_id"
((code == 0)) || on_workers "${everywhere[@]}" -- logs || true
exit "$code"
