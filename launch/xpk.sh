#!/usr/bin/env bash
# Runs easy-jax on a GKE cluster made by xpk (pip install xpk): wraps `xpk workload create`.
#
#   launch/xpk.sh --run-id=ID --cluster=NAME --tpu-type=TYPE --image=IMAGE --runs=gs://BUCKET/FOLDER \
#       [OPTION ...] -- run --config=configs/FILE.py [--config.field=value ...]
#
#   --run-id=ID         names the workload; the workdir is RUNS/ID
#   --cluster=NAME      the cluster
#   --tpu-type=TYPE     of one slice, as v5litepod-16
#   --image=IMAGE       the image of easy-jax, see Dockerfile
#   --runs=DIR          folder of all runs, gs://...
#   --num-slices=N      default 1
#   --max-restarts=N    default 50
#   --project=PROJECT   default: gcloud's
#   --zone=ZONE         default: gcloud's
#   --secret=NAME       give the pods this environment variable, as HF_TOKEN; repeatable
#   --xpk-flag=FLAG     for `xpk workload create`, as --spot or --priority=high; repeatable
#   --dry-run           print the command and run none
#
# xpk writes the values of secrets into the workload's JobSet, where whoever may read JobSets reads
# them; gke.sh puts them into a Kubernetes secret.

# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

run_id='' cluster='' tpu_type='' image='' runs='' slices=1 restarts=50 flags=()
while (($#)); do
  case $1 in
    --run-id=*) run_id=${1#*=} ;;
    --cluster=*) cluster=${1#*=} ;;
    --tpu-type=*) tpu_type=${1#*=} ;;
    --image=*) image=${1#*=} ;;
    --runs=*) runs=${1#*=} ;;
    --num-slices=*) slices=${1#*=} ;;
    --max-restarts=*) restarts=${1#*=} ;;
    --project=*)
      need_project "${1#*=}"
      flags+=("$1")
      ;;
    --zone=*)
      need_zone "${1#*=}"
      flags+=("$1")
      ;;
    --xpk-flag=*) flags+=("${1#*=}") ;;
    --)
      shift
      break
      ;;
    *) shared_option "$1" ;;
  esac
  shift
done

need_run_id "$run_id"
need --cluster "$cluster" '[a-z]([-a-z0-9]*[a-z0-9])?' "a cluster's name"
need --tpu-type "$tpu_type" '[a-z0-9]+(-[a-z0-9]+)+' "a type like v5litepod-16 or v5p-8"
need_image "$image"
need_runs "$runs"
need --num-slices "$slices" '[1-9][0-9]*' "a positive number"
need --max-restarts "$restarts" '[0-9]+' "a number"
need_secrets "${secrets[@]}"
need_easy_jax "$@"

if ((${#secrets[@]})); then
  # For a name without a value in the file, xpk uses the value in its own environment.
  names=$(mktemp)
  trap 'rm -f "$names"' EXIT
  printf '%s\n' "${secrets[@]}" >"$names"
  export "${secrets[@]}"
  flags+=("--env-file=$names")
fi

# xpk runs the command in a bash that passes SIGTERM on to its child: exec makes easy-jax that
# child. Exit codes that it restarts on, besides its own: stopped after saving, peers lost.
command="exec $(quote easy-jax "$@" "--workdir=$runs/$run_id")"
# Kubernetes reads $$ as $, and would expand $(NAME).
run xpk workload create "--workload=$run_id" "--cluster=$cluster" "--tpu-type=$tpu_type" \
  "--num-slices=$slices" "--docker-image=$image" "--max-restarts=$restarts" \
  --restart-on-exit-codes=75,76 --termination-grace-period-seconds=300 "${flags[@]}" \
  "--command=${command//\$/\$\$}"
