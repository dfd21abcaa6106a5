#!/usr/bin/env bash
# Runs on each worker of a TPU pod; tpu_pod.sh copies it there and calls it.
#
#   tpu_worker.sh setup [BUCKET]  make the environment, or bring it up to date; BUCKET becomes /mnt/data
#   tpu_worker.sh start FLAG...   run `python -m mae_jax.main FLAG...` with restarts, in the background
#   tpu_worker.sh status FLAG...  print `state: STATE`, STATE being new, running, `ended STATUS` or, where
#                                 flags are given, `running with other flags`
#   tpu_worker.sh stop            have it save and stop, and wait for that
#   tpu_worker.sh log [LINES]     print the end of its log

set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$HERE/lib.sh"

ENVIRONMENT=$HOME/mae_jax_env
STATE=$HOME/mae_jax_run # pid, flags, status, log, the name of the bucket; `ready` when setup is done
DATA=/mnt/data
mkdir -p "$STATE"

setup() {
  rm -f "$STATE/ready"
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
  touch "$STATE/ready"
}

# Source: cloud.google.com/storage/docs/cloud-storage-fuse/install
install_gcsfuse() {
  local key=/usr/share/keyrings/cloud.google.asc
  curl -fsSL https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee "$key" >/dev/null
  echo "deb [signed-by=$key] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  # A machine that has just come up is bringing its packages up to date.
  sudo apt-get -o DPkg::Lock::Timeout=300 update --quiet=2
  sudo apt-get -o DPkg::Lock::Timeout=300 install --quiet=2 --yes gcsfuse
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
    if [ $# -eq 0 ] || printf '%s\0' "$@" | cmp -s - "$STATE/flags"; then
      echo "state: running"
    else
      echo "state: running with other flags"
    fi
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
  printf '%s\0' "$@" >"$STATE/flags"
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
  status) print_state "${@:2}" ;;
  log) tail -n "${2:-50}" "$STATE/log" ;;
  *) refuse "tpu_worker.sh: expected setup, start, status, stop or log, got '${1:-}'" ;;
esac
