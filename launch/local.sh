#!/usr/bin/env bash
# One machine: a process with all its devices, or several processes that make a pod, on loopback.
#
#   launch/local.sh --config=folder --config.data.path=/data --workdir=runs/folder
#   JAX_NUM_CPU_DEVICES=2 launch/local.sh --processes=4 --config=demo --workdir=runs/pod
#
#   --processes=N   of one job; more than one run on the CPU unless JAX_PLATFORMS is set
#   --once          without the restarts of restart.sh
#   --dry-run       print what would be run
#   PYTHON=...      the interpreter that mae_jax is installed for
#
# All other flags are those of `python -m mae_jax.main`; --workdir=DIR is needed. Each line of output
# begins with the number of its process. When one process ends wrongly the others are killed, and
# its status is that of all. SIGTERM and Ctrl-C are passed on to all processes, which save; a second
# Ctrl-C ends them at once.

set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$HERE/lib.sh"

FINISHED=0 STOPPED=75
PYTHON=${PYTHON:-python}

processes=1 once="" dry_run=""
given=("$@") flags=()
for flag in "$@"; do
  case "$flag" in
    --processes=*) processes=${flag#--processes=} ;;
    --once) once=1 ;;
    --dry-run) dry_run=1 ;;
    *) flags+=("$flag") ;;
  esac
done
case "$processes" in
  '' | *[!0-9]* | 0*) refuse "--processes: expected a positive number, got '$processes'" ;;
esac
workdir_of "${flags[@]+"${flags[@]}"}" >/dev/null
if [ "$processes" -gt 1 ]; then export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}; fi

# Sets `command` to what process $2 is started with; the coordinator listens on port $1.
set_command() {
  local address=127.0.0.1:$1
  command=("$PYTHON" -m mae_jax.main "${flags[@]}")
  if [ "$processes" -eq 1 ]; then return; fi
  command=(env "MAE_JAX_COORDINATOR_ADDRESS=$address"
    "MAE_JAX_COORDINATOR_BIND_ADDRESS=$address"
    "MAE_JAX_NUM_PROCESSES=$processes" "MAE_JAX_PROCESS_ID=$2" "${command[@]}")
}

if [ -n "$dry_run" ]; then
  for ((i = 0; i < processes; i++)); do
    set_command PORT "$i"
    show "${command[@]}"
  done
  exit
fi
if [ -z "$once" ]; then
  exec "$HERE/restart.sh" "$HERE/local.sh" --once "${given[@]}"
fi

set -m # a process group for each process, so that its data workers end with it
pids=() readers=() stopping=""
pipes=$(mktemp -d)

# shellcheck disable=SC2329  # called by the trap
pass_on() {
  local pid signal=TERM
  if [ "$1" = INT ] && [ -n "$stopping" ]; then signal=INT; fi
  stopping=1
  for pid in "${pids[@]+"${pids[@]}"}"; do kill "-$signal" "$pid" 2>/dev/null || true; done
}
end_all() {
  local pid
  for pid in "${pids[@]+"${pids[@]}"}"; do kill -KILL -- "-$pid" 2>/dev/null || true; done
  rm -rf "$pipes"
}
trap 'pass_on TERM' TERM
trap 'pass_on INT' INT
trap end_all EXIT

prefix() {
  local line
  while IFS= read -r line || [ -n "$line" ]; do printf '[%s] %s\n' "$1" "$line"; done
}

port=$("$PYTHON" -c 'import socket
with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    print(s.getsockname()[1])')
for ((i = 0; i < processes; i++)); do
  mkfifo "$pipes/$i"
  prefix "$i" <"$pipes/$i" &
  readers+=($!)
  set_command "$port" "$i"
  "${command[@]}" </dev/null >"$pipes/$i" 2>&1 &
  pids+=($!)
done

# Until all have ended, or one has ended wrongly. bash 3.2 cannot wait for the first of several.
failure=$FINISHED running=$processes
statuses=()
while [ "$running" -gt 0 ]; do
  running=0
  for ((i = 0; i < processes; i++)); do
    [ -z "${statuses[i]:-}" ] || continue
    if kill -0 "${pids[i]}" 2>/dev/null; then
      running=$((running + 1))
      continue
    fi
    status=0
    wait "${pids[i]}" || status=$?
    statuses[i]=$status
    case "$status" in
      "$FINISHED") ;;
      "$STOPPED") failure=$STOPPED ;;
      *)
        say "process $i ended with status $status"
        failure=$status
        break 2
        ;;
    esac
  done
  if [ "$running" -gt 0 ]; then sleep 0.1 || true; fi
done
end_all
# What the processes wrote last.
for pid in "${readers[@]}"; do wait "$pid" 2>/dev/null || true; done
exit "$failure"
