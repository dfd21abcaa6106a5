#!/usr/bin/env bash
# A Cloud TPU pod by queued resources: create it, set it up, train, watch over it, delete it.
#
#   launch/tpu_pod.sh create --name=mae --zone=us-east5-b --type=v6e-64 --spot
#   launch/tpu_pod.sh watch  --name=mae --zone=us-east5-b --type=v6e-64 --spot \
#       --config=vit_l --workdir=gs://BUCKET/runs/vit_l
#   launch/tpu_pod.sh delete --name=mae --zone=us-east5-b
#
#   create   ask for the pod; it comes when there is room
#   setup    copy HEAD of this clone to all workers and install it there
#   start    start training on all workers, in the background
#   logs     print the end of each worker's log
#   status   print the state of the pod and of each worker
#   stop     have all workers save and stop
#   watch    create, setup and start whatever is missing, again and again, until the run has ended:
#            a pod that was preempted is made anew. Its exit status is the run's. A run that has ended
#            before is started again.
#   delete   delete the pod
#
# Settings, as flags or in the environment; --dry-run prints the commands instead:
#   --name=      TPU_NAME      of the queued resource and of its node
#   --zone=      TPU_ZONE
#   --type=      TPU_TYPE      accelerator type, as v6e-64 or v5litepod-16; for create and watch
#   --version=   TPU_VERSION   runtime version; that of the type, if not given
#   --project=   TPU_PROJECT   that of gcloud, if not given
#   --network=   TPU_NETWORK   `default`, if not given
#   --data=      TPU_DATA      bucket (gs://NAME) that setup and watch make /mnt/data, read-only
#   --spot       TPU_SPOT=1    cheaper, and taken away at any time
#                TPU_POLL=60   seconds between two looks of `watch`
#
# All other flags are those of `python -m mae_jax.main`, for start and watch. --workdir has to be on
# a bucket, for the workers share no disk.

set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$HERE/lib.sh"

FINISHED=0 STOPPED=75
MAX_FAILED=3 # requests in a row that failed before there was a pod

what=${1:-}
if [ $# -gt 0 ]; then shift; fi
name=${TPU_NAME:-} zone=${TPU_ZONE:-} type=${TPU_TYPE:-} version=${TPU_VERSION:-}
project=${TPU_PROJECT:-} network=${TPU_NETWORK:-} spot=${TPU_SPOT:-} poll=${TPU_POLL:-60}
data=${TPU_DATA:-}
dry_run="" flags=()
for flag in "$@"; do
  case "$flag" in
    --name=*) name=${flag#*=} ;;
    --zone=*) zone=${flag#*=} ;;
    --type=*) type=${flag#*=} ;;
    --version=*) version=${flag#*=} ;;
    --project=*) project=${flag#*=} ;;
    --network=*) network=${flag#*=} ;;
    --data=*) data=${flag#*=} ;;
    --spot) spot=1 ;;
    --dry-run) dry_run=1 ;;
    *) flags+=("$flag") ;;
  esac
done

# Refuses a setting that is not one word of the letters that such names have.
check() {
  local expected='^[a-z0-9][a-zA-Z0-9._:-]*$'
  [[ "$2" =~ $expected ]] || refuse "--$1: expected $3, got '$2'"
}

# Sets the runtime version that belongs to the accelerator type.
# Source: cloud.google.com/tpu/docs/runtimes
default_version() {
  case "$type" in
    v6e-*) version=v2-alpha-tpuv6e ;;
    v5p-*) version=v2-alpha-tpuv5 ;;
    v5litepod-*) version=v2-alpha-tpuv5-lite ;;
    v4-* | v3-* | v2-*) version=tpu-ubuntu2204-base ;;
    *) refuse "--version: expected the runtime version of --type=$type, got none" ;;
  esac
}

check_settings() {
  local label='^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$'
  [[ "$name" =~ $label ]] ||
    refuse "--name: expected up to 63 small letters, digits and -, got '$name'"
  check zone "$zone" "a zone, as us-east5-b"
  case "$what" in create | watch)
    check type "$type" "an accelerator type, as v6e-64"
    [ -n "$version" ] || default_version
    check version "$version" "a runtime version"
    ;;
  esac
  if [ -n "$project" ]; then check project "$project" "a project"; fi
  if [ -n "$network" ]; then check network "$network" "a network"; fi
  data=${data#gs://}
  if [ -n "$data" ]; then check data "$data" "a bucket, as gs://NAME"; fi
  place=("--zone=$zone")
  if [ -n "$project" ]; then place+=("--project=$project"); fi
}

check_flags() {
  local workdir
  case "$what" in
    start | watch)
      workdir=$(workdir_of "${flags[@]+"${flags[@]}"}")
      case "$workdir" in
        gs://*) ;;
        *) refuse "--workdir: expected a bucket (gs://...), for the workers share no disk" ;;
      esac
      ;;
    *)
      [ ${#flags[@]} -eq 0 ] || refuse "${flags[0]}: there is no such flag of $what"
      ;;
  esac
}

# Runs a command, or prints it.
run() {
  if [ -n "$dry_run" ]; then show "$@"; else "$@"; fi
}

queue() {
  local verb=$1
  shift
  run gcloud compute tpus queued-resources "$verb" "$name" "${place[@]}" "$@"
}

# Runs a script of bash on all workers.
on_workers() {
  run gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" --worker=all --command="$1"
}

# Runs a command of tpu_worker.sh on all workers.
worker() {
  on_workers "$(show bash mae_jax/launch/tpu_worker.sh "$@")"
}

create() {
  local more=()
  if [ -n "$network" ]; then more+=("--network=$network"); fi
  if [ -n "$spot" ]; then more+=(--spot); fi
  queue create --node-id="$name" --accelerator-type="$type" --runtime-version="$version" \
    "${more[@]+"${more[@]}"}"
}

# --force: with its node. Waits until it is gone, so that the name is free again.
delete() {
  queue delete --force --quiet
}

setup() {
  local folder=. archive status=0
  if [ -z "$dry_run" ]; then folder=$(mktemp -d); fi
  archive=$folder/mae_jax.tar.gz
  run git -C "$(dirname "$HERE")" archive --format=tar.gz --prefix=mae_jax/ \
    --output="$archive" HEAD &&
    run gcloud compute tpus tpu-vm scp "$archive" "$name:mae_jax.tar.gz" "${place[@]}" \
      --worker=all &&
    on_workers "tar -xzf mae_jax.tar.gz && bash mae_jax/launch/tpu_worker.sh setup${data:+ $data}" ||
    status=$?
  if [ -z "$dry_run" ]; then rm -rf "$folder"; fi
  return "$status"
}

start() {
  worker start "${flags[@]}"
}

# Prints the state of the queued resource; ABSENT if there is none, UNKNOWN if it cannot be told.
pod_state() {
  local said
  if said=$(queue describe --format='value(state.state)' 2>&1); then
    printf '%s\n' "${said##*$'\n'}"
  else
    case "$said" in
      *NOT_FOUND*) echo ABSENT ;;
      *)
        say "$said"
        echo UNKNOWN
        ;;
    esac
  fi
}

# Prints a line `state: ...` for each worker; `state: absent` where `setup` has not come to its end.
worker_states() {
  local look
  look=$(show bash mae_jax/launch/tpu_worker.sh status "${flags[@]}")
  on_workers "if [ -e mae_jax_run/ready ]; then $look; else echo 'state: absent'; fi" |
    grep '^state: '
}

first=1 to_start="" # whether the workers have not yet been looked at; whether all are to be started

# Starts what is not running on the workers of a pod that is there. Exits when the run has ended.
attend() {
  local states ended
  if ! states=$(worker_states); then
    say "cannot reach the workers"
    return
  fi
  if grep -q absent <<<"$states"; then
    say "setting up"
    # What fails here, a worker that is not up yet, say, is tried again at the next look.
    if setup && start; then first=""; else say "cannot set up the workers"; fi
    return
  fi
  if grep -q "other flags" <<<"$states"; then
    refuse "the workers run with other flags than these; launch/tpu_pod.sh stop ends that run"
  fi
  # How a run has ended that this `watch` did not see running says nothing: its flags may have been
  # others, its mistake may be mended, and one that has finished says so again.
  if [ -n "$first" ] && ! grep -q running <<<"$states"; then to_start=1; fi
  first=""
  if [ -n "$to_start" ]; then
    if start; then to_start=""; else say "cannot start the workers"; fi
    return
  fi
  # Another status than these ends the run, as restart.sh has decided on that worker.
  ended=$(sed -n 's/^state: ended //p' <<<"$states" | grep -vx -e $FINISHED -e $STOPPED | head -n 1) ||
    ended=""
  if [ -n "$ended" ]; then
    say "the run has ended with status $ended; see launch/tpu_pod.sh logs"
    exit "$ended"
  fi
  if ! grep -qvx "state: ended $FINISHED" <<<"$states"; then
    say "the run has finished"
    exit "$FINISHED"
  fi
  if grep -q -e new -e "ended $STOPPED" <<<"$states"; then
    start || say "cannot start the workers"
  fi
}

watch() {
  local state last="" failed=0
  while :; do
    state=$(pod_state)
    if [ "$state" != "$last" ]; then say "the pod is $state"; fi
    last=$state
    case "$state" in
      ACTIVE)
        failed=0
        attend
        ;;
      ABSENT) create || failed=$((failed + 1)) ;;
      # ABSENT at the next look.
      SUSPENDED) delete || say "cannot delete it" ;;
      FAILED)
        failed=$((failed + 1))
        delete || say "cannot delete it"
        ;;
    esac
    if [ "$failed" -ge $MAX_FAILED ]; then
      say "the request has failed $failed times running, so it is given up"
      exit 1
    fi
    sleep "$poll"
  done
}

# What `watch` does in the life of a pod that is preempted once.
show_watch() {
  queue describe --format='value(state.state)'
  create && setup && start
  echo "# when it is SUSPENDED or FAILED:"
  delete && create && setup && start
}

print_status() {
  queue describe --format='value(state.state)'
  worker status
}

case "$what" in
  create | setup | start | stop | watch | delete | logs | status) ;;
  *) refuse "tpu_pod.sh: expected create, setup, start, logs, status, stop, watch or delete, got '$what'" ;;
esac
check_settings
check_flags
case "$what" in
  create | setup | start | delete) "$what" ;;
  watch) if [ -n "$dry_run" ]; then show_watch; else watch; fi ;;
  status) print_status ;;
  logs) worker log ;;
  stop) worker stop ;;
esac
