#!/usr/bin/env bash
# Runs on every worker of a TPU VM; tpu_vm.sh sends and calls it:
#   worker.sh install | setup COMMAND | start ARGUMENT... | follow | status | logs | stop
# `start` starts the job detached, so that it outlives the connection; its log, process id and exit
# code are files in the folder of this script.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

# One line per worker; tpu_vm.sh counts them.
answer() { echo "easy_jax $(hostname) $*"; }

job_runs() { [[ -e pid && ! -e exit_code ]] && kill -0 "$(<pid)" 2>/dev/null; }

conflict() {
  echo "$(hostname) runs another command or version under this run id: choose another --run-id" >&2
  exit 3
}

install() {
  if ! cmp -s installed version; then
    job_runs && conflict
    rm -rf source installed
    mkdir source
    tar -xzf source.tar.gz -C source
    # The VM's own Python may be older than 3.11, so uv installs one. --target works even if the
    # system's Python does not allow installations.
    # Everything that fails here may be tried again, so the exit code is never 2.
    python3 -m pip install --quiet --upgrade --target uv uv >&2 || exit 1
    uv/bin/uv venv --quiet --clear --python 3.12 venv >&2 || exit 1
    uv/bin/uv pip install --quiet --python venv/bin/python ./source 'jax[tpu]' gcsfs >&2 || exit 1
    cp version installed
  fi
  answer installed
}

setup() {
  job_runs || (cd source && bash -c "$1" >&2) || exit 1
  answer ready
}

start() {
  local job
  job=$(
    cat version
    printf '%q ' "$@"
  )
  if job_runs; then
    [[ $(<job) == "$job" ]] || conflict
    rm -f secrets # the running job has its own
  else
    rm -f exit_code
    printf '%s' "$job" >job
    setsid nohup bash worker.sh job "$@" >log 2>&1 </dev/null &
    echo $! >pid
  fi
  answer started
}

job() {
  if [[ -e secrets ]]; then
    set -a
    # shellcheck source=/dev/null
    source secrets
    set +a
    rm secrets
  fi
  # `stop` and a shutdown signal the process group, and this shell must outlive easy-jax.
  trap : TERM
  local code=0
  (cd source && exec ../venv/bin/easy-jax "$@") || code=$?
  echo "$code" >exit_code
}

follow() {
  tail -n 200 -f log &
  while job_runs; do sleep 1; done
  sleep 1 # for the last lines
  kill $! || true
}

status() {
  if job_runs; then
    answer running
  elif [[ -e exit_code ]]; then
    answer exit "$(<exit_code)"
  else
    answer lost # the worker was restarted
  fi
}

stop() {
  local seconds
  if job_runs; then
    kill -TERM -- "-$(<pid)"
    for ((seconds = 0; seconds < 120; seconds++)); do
      job_runs || break
      sleep 1
    done
  fi
  status
}

case ${1:-} in
  install | setup | start | job | follow | status | stop) "$@" ;;
  logs) tail -n 40 log | sed "s/^/$(hostname): /" ;;
  *)
    echo "worker.sh: unknown command ${1:-}" >&2
    exit 2
    ;;
esac
