#!/usr/bin/env bash
# Runs on each worker of a TPU pod; tpu_pod.sh copies it there and calls it.
#
#   tpu_worker.sh setup [BUCKET]  make the environment, or bring it up to date; BUCKET becomes /mnt/data
#   tpu_worker.sh start FLAG...   run `python -m mae_jax.main FLAG...` with restarts, in the background
#   tpu_worker.sh status          print `state: STATE`, STATE being new, running or `ended STATUS`
#   tpu_worker.sh stop            have it save and stop, and wait for that
#   tpu_worker.sh log [LINES]     print the end of its log

set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$HERE/lib.sh"

ENVIRONMENT=$HOME/mae_jax_env
STATE=$HOME/mae_jax_run # pid, status, log, and the name of the bucket
DATA=/mnt/data
mkdir -p "$STATE"

setup() {
  # The images of TPU VMs have an older Python than we need; uv brings one.
  export PATH=$HOME/.local/bin:$PATH
  command -v uv >/dev/null || python3 -m pip install --quiet --user uv
  [ -x "$ENVIRONMENT/bin/python" ] || uv venv --quiet --python 3.12 "$ENVIRONMENT"
  uv pip install --quiet --python "$ENVIRONMENT/bin/python" -e "$(dirname "$HERE")[tpu,gcs]"
  if [ $# -gt 0 ]; then
    command -v gcsfuse >/dev/null || install_gcsfuse
    echo "$1" >"$STATE/bucket"
    mount_data
  fi
}

# Source: cloud.google.com/storage/docs/cloud-storage-fuse/install
install_gcsfuse() {
  local key=/usr/share/keyrings/cloud.google.asc
  curl -fsSL https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee "$key" >/dev/null
  echo "deb [signed-by=$key] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  sudo apt-get update --quiet=2
  sudo apt-get install --quiet=2 --yes gcsfuse
}

# The readers of array_record and TFRecord files know no buckets, but files.
mount_data() {
  if [ ! -s "$STATE/bucket" ] || mountpoint -q "$DATA"; then return; fi
  sudo mkdir -p "$DATA"
  sudo chown "$(id -u)" "$DATA"
  gcsfuse --implicit-dirs -o ro "$(cat "$STATE/bucket")" "$DATA"
}

# A pid alone may be another program's, after the machine was started anew.
is_running() {
  [ -s "$STATE/pid" ] || return 1
  local command
  command=$(ps -o args= -p "$(cat "$STATE/pid")" 2>/dev/null) || return 1
  case "$command" in *restart.sh*) ;; *) return 1 ;; esac
}

print_state() {
  if is_running; then
    echo "state: running"
  elif [ -s "$STATE/status" ]; then
    echo "state: ended $(cat "$STATE/status")"
  else
    echo "state: new"
  fi
}

start() {
  if is_running; then
    echo "is running already"
    return
  fi
  mount_data # gone after the machine was started anew
  rm -f "$STATE/pid" "$STATE/status"
  nohup "$HERE/tpu_worker.sh" run "$@" >>"$STATE/log" 2>&1 </dev/null &
  while [ ! -s "$STATE/pid" ]; do sleep 0.1; done
  echo "started"
}

run() {
  local status=0
  "$HERE/restart.sh" "$ENVIRONMENT/bin/python" -m mae_jax.main "$@" &
  echo $! >"$STATE/pid"
  wait $! || status=$?
  echo "$status" >"$STATE/status"
}

stop() {
  if is_running; then kill -TERM "$(cat "$STATE/pid")"; fi
  while is_running; do sleep 0.2; done
  print_state
}

case "${1:-}" in
  setup | start | run | stop) "$@" ;;
  status) print_state ;;
  log) tail -n "${2:-50}" "$STATE/log" ;;
  *) refuse "tpu_worker.sh: expected setup, start, status, stop or log, got '${1:-}'" ;;
esac
