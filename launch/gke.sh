#!/usr/bin/env bash
# Runs easy-jax on TPU slices of a GKE cluster: fills in gke_jobset.yaml and applies it with
# kubectl's current context. Build and push the image first, see Dockerfile.
#
#   launch/gke.sh --run-id=ID --image=IMAGE --runs=gs://BUCKET/FOLDER --accelerator=NAME \
#       --topology=AxB[xC] [OPTION ...] -- run --config=configs/FILE.py [--config.field=value ...]
#
#   --run-id=ID           names the JobSet; the workdir is RUNS/ID
#   --image=IMAGE         the image of easy-jax
#   --runs=DIR            folder of all runs: gs://... or a path in the image's volumes
#   --accelerator=NAME    the node label: tpu-v5-lite-podslice, tpu-v5p-slice, tpu-v6e-slice, ...
#   --topology=AxB[xC]    of one slice, as 4x4 or 2x2x4
#   --chips-per-host=N    of the node pool's machine type; default 4
#   --slices=N            default 1
#   --max-restarts=N      default 50
#   --spot                on spot nodes
#   --service-account=SA  the Kubernetes service account, which may write to RUNS; default: default
#   --namespace=NS        default: kubectl's
#   --secret=NAME         give the pods this environment variable, as HF_TOKEN; repeatable
#   --dry-run             print the manifest and the commands and run none
#
# The same command again, once the JobSet is deleted, continues the run.

# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

run_id='' image='' runs='' accelerator='' topology='' chips=4 slices=1 restarts=50 spot=''
service_account=default kubectl=(kubectl)
while (($#)); do
  case $1 in
    --run-id=*) run_id=${1#*=} ;;
    --image=*) image=${1#*=} ;;
    --runs=*) runs=${1#*=} ;;
    --accelerator=*) accelerator=${1#*=} ;;
    --topology=*) topology=${1#*=} ;;
    --chips-per-host=*) chips=${1#*=} ;;
    --slices=*) slices=${1#*=} ;;
    --max-restarts=*) restarts=${1#*=} ;;
    --spot) spot=1 ;;
    --service-account=*) service_account=${1#*=} ;;
    --namespace=*)
      need --namespace "${1#*=}" '[a-z0-9]([-a-z0-9]*[a-z0-9])?' "a namespace's name"
      kubectl+=("$1")
      ;;
    --)
      shift
      break
      ;;
    *) shared_option "$1" ;;
  esac
  shift
done

need_run_id "$run_id"
need_image "$image"
need_runs "$runs"
need --accelerator "$accelerator" 'tpu-?[a-z0-9]+(-[a-z0-9]+)*' \
  "a node label like tpu-v5-lite-podslice, tpu-v5p-slice or tpu-v6e-slice"
need --topology "$topology" '[1-9][0-9]*(x[1-9][0-9]*){1,2}' "a topology like 4x4 or 2x2x4"
need --chips-per-host "$chips" '[1248]' "1, 2, 4 or 8"
need --slices "$slices" '[1-9][0-9]*' "a positive number"
need --max-restarts "$restarts" '[0-9]+' "a number"
need --service-account "$service_account" '[a-z0-9]([-a-z0-9.]*[a-z0-9])?' "a service account"
need_secrets "${secrets[@]}"
need_easy_jax "$@"

slice_chips=$((${topology//x/*}))
((slice_chips % chips == 0)) ||
  die "--topology=$topology has $slice_chips chips, no multiple of --chips-per-host=$chips"
((slices == 1 || slice_chips > chips)) ||
  die "--slices=$slices: GKE joins slices of several hosts only, --topology=$topology is one host"

# A string of JSON, which YAML reads as well.
json() {
  local text=${1//\\/\\\\} character
  text=${text//\"/\\\"}
  text=${text//$'\n'/\\n}
  text=${text//$'\t'/\\t}
  text=${text//$'\r'/\\r}
  character='[[:cntrl:]]'
  [[ ! $text =~ $character ]] || die "control characters cannot be passed on: $(quote "$1")"
  printf '"%s"' "$text"
}

declare -A values=(
  [RUN_ID]=$run_id [IMAGE]=$image [ACCELERATOR]=$accelerator [TOPOLOGY]=$topology
  [CHIPS_PER_HOST]=$chips [HOSTS]=$((slice_chips / chips)) [SLICES]=$slices
  [MAX_RESTARTS]=$restarts [SERVICE_ACCOUNT]=$service_account
)
list=
for argument in "$@" "--workdir=$runs/$run_id"; do
  # Kubernetes expands $(NAME) in arguments, and reads $$ as $.
  word=$(json "${argument//\$/\$\$}")
  list+=", $word"
done
values[ARGUMENTS]="[${list#, }]"

# The template with the values filled in, at most one per line.
manifest() {
  local line name
  while IFS= read -r line; do
    [[ $line == *'# only with --spot'* && ! $spot || $line == '#'* ]] && continue
    if [[ $line =~ ^([^$]*)\$\{([A-Z_]+)\}(.*)$ ]]; then
      name=${BASH_REMATCH[2]}
      line=${BASH_REMATCH[1]}${values[$name]}${BASH_REMATCH[3]}
    fi
    printf '%s\n' "$line"
  done <"$(dirname "${BASH_SOURCE[0]}")/gke_jobset.yaml"
}

secret() {
  local name value
  printf 'apiVersion: v1\nkind: Secret\nmetadata:\n  name: "%s"\nstringData:\n' "$run_id"
  for name in "${secrets[@]}"; do
    value=$(json "${!name}")
    printf '  %s: %s\n' "$name" "$value"
  done
}

if ((${#secrets[@]})); then
  note "${secrets[*]} become the Kubernetes secret $run_id, by way of kubectl's standard input"
  # Server-side, because kubectl would otherwise store a copy of the values in an annotation.
  apply=("${kubectl[@]}" apply --server-side --filename=-)
  show "${apply[@]}"
  [[ $dry_run ]] || secret | "${apply[@]}"
fi
show "${kubectl[@]}" create --filename=-
if [[ $dry_run ]]; then
  manifest
else
  manifest | "${kubectl[@]}" create --filename=-
fi
labels=jobset.sigs.k8s.io/jobset-name=$run_id,jobset.sigs.k8s.io/job-index=0
labels+=,batch.kubernetes.io/job-completion-index=0
note "rank 0's log: $(quote "${kubectl[@]}" logs --follow "--selector=$labels")"
note "to stop, after saving: $(quote "${kubectl[@]}" delete jobset "$run_id")"
