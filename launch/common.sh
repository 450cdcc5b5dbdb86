#!/usr/bin/env bash
# Shared by the scripts of launch/; sourced, not run.

set -euo pipefail
if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
  echo "bash 4.4 or newer is needed, this is $BASH_VERSION (macOS: brew install bash)" >&2
  exit 2
fi

dry_run=
secrets=() # names of environment variables
child= # of run_child, while it runs

# A mistake of the user: exit code 2, as in easy-jax.
die() {
  echo "${0##*/}: $*" >&2
  exit 2
}

note() { echo "${0##*/}: $*" >&2; }

# The comment at the top of the script is its help.
usage() { awk 'NR > 1 && !/^#/ { exit } NR > 1 { sub(/^# ?/, ""); print }' "$0"; }

# Prints words, quoted so that a shell reads the same words.
quote() {
  local word line=
  for word; do
    [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]] || word=${word@Q}
    line+=" $word"
  done
  printf '%s' "${line# }"
}

# 32 hexadecimal digits that nobody can guess.
random_token() { od -An -N16 -tx1 /dev/urandom | tr -d ' \n'; }

# Prints commands on stdout in a dry run, where they are the result, and otherwise on stderr.
show() {
  if [[ $dry_run ]]; then
    printf '+ %s\n' "$(quote "$@")"
  else
    printf '+ %s\n' "$(quote "$@")" >&2
  fi
}

run() {
  show "$@"
  [[ $dry_run ]] || "$@"
}

# capture NAME COMMAND...: stores its output in the variable, which a dry run does not change.
# shellcheck disable=SC2034 # the caller's variable
capture() {
  local -n captured=$1
  shift
  show "$@"
  [[ $dry_run ]] || captured=$("$@")
}

# Like run, but a trap need not wait for the command to end: it may kill $child.
run_child() {
  show "$@"
  [[ $dry_run ]] && return
  local code=0
  "$@" &
  child=$!
  wait "$child" || code=$?
  child=
  return "$code"
}

# pause SECONDS: waits; a trap may interrupt it.
pause() {
  sleep "$1" &
  child=$!
  wait "$child" || true
  child=
}

# shared_option OPTION: parses an option that all launchers have.
shared_option() {
  case $1 in
    --secret=*) secrets+=("${1#*=}") ;;
    --dry-run) dry_run=1 ;;
    --help | -h)
      usage
      exit
      ;;
    *) die "unknown option $1; easy-jax's own come after --, see --help" ;;
  esac
}

# need OPTION VALUE REGEX EXPLANATION
need() {
  [[ $2 ]] || die "$1 is missing: $4"
  [[ $2 =~ ^($3)$ ]] || die "$1=$2 is not valid: $4"
}

need_run_id() {
  need --run-id "$1" '[a-z]([-a-z0-9]{0,38}[a-z0-9])?' \
    "up to 40 lower-case letters, digits and hyphens, a letter first"
}

need_project() { need --project "$1" '[-a-z0-9.:]+' "a project's id"; }

need_zone() { need --zone "$1" '[a-z]+-[a-z]+[0-9]+-[a-z0-9]+' "a zone like us-east5-b"; }

need_image() { need --image "$1" '[a-zA-Z0-9][-a-zA-Z0-9._/:@]*' "an image's name"; }

need_runs() {
  need --runs "$1" '(gs://[a-z0-9][-a-z0-9._]+|/[^/]+)(/[^/]+)*' \
    "a folder that all workers share, gs://BUCKET[/FOLDER] or an absolute path (NFS)"
}

need_secrets() {
  local name
  for name; do
    need --secret "$name" '[A-Za-z_][A-Za-z0-9_]*' "the name of an environment variable"
    [[ ${!name:-} ]] || die "--secret=$name: the environment variable $name is not set"
  done
}

# The arguments of easy-jax, with the run's workdir.
need_easy_jax() {
  local argument config=
  need "the command after --" "${1:-}" 'run|score|train|evaluate|export|report' \
    "easy-jax's run, score, train, evaluate, export or report"
  for argument; do
    case $argument in
      --config=?*) config=1 ;;
      --workdir | --workdir=*) die "--workdir is set by --runs and --run-id; leave it out" ;;
    esac
  done
  [[ $config ]] || die "--config=configs/FILE.py is missing among the arguments after --"
}
