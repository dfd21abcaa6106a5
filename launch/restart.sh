#!/usr/bin/env bash
# Runs a training command until it has finished, starting it again as its exit status asks.
#
#   launch/restart.sh python -m mae_jax.main --config=vit_l --workdir=/shared/runs/vit_l
#
# Status of the command:
#   0      finished: not started again
#   75     stopped and saved: started again at once
#   2      the user's mistake: not started again
#   other  started again after a wait, which doubles; given up when no new step was committed in 3
#          restarts running
#
# SIGTERM and SIGINT are passed on to the command as SIGTERM, and it is not started again; a second
# SIGINT as SIGINT, which ends it at once. The exit status is the command's last one; 75 if it was
# stopped between two runs, or before the command heeded signals (143).
#
# A step is committed when its numbered folder is in WORKDIR/checkpoints, and on a bucket has a
# `commit_success.txt`. A bucket is listed by `gcloud storage ls`; where that is not to be had, a run
# of RESTART_PROGRESS_SECONDS is taken to have committed one.
#
#   RESTART_WAIT=10       seconds before the first restart after a crash
#   RESTART_MAX_WAIT=300  seconds, at most
#   RESTART_LIMIT=3       restarts without a new step
#   RESTART_PROGRESS_SECONDS=600

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

FINISHED=0 USER_MISTAKE=2 STOPPED=75

[ $# -gt 0 ] || refuse "restart.sh: expected a command, got nothing"
workdir=$(workdir_of "$@")
wait_seconds=${RESTART_WAIT:-10}
max_wait=${RESTART_MAX_WAIT:-300}
limit=${RESTART_LIMIT:-3}
progress_seconds=${RESTART_PROGRESS_SECONDS:-600}

# A process group of its own for each child: a terminal's Ctrl-C reaches this script alone, which
# passes it on once, and what a child leaves behind can be ended.
set -m
trap 'pass_on TERM' TERM
trap 'pass_on INT' INT

# Whether the run that began at `$1` seconds has committed a step; remembers the newest.
newest=$(newest_step "$workdir") || newest=unknown
committed() {
  local before=$newest
  newest=$(newest_step "$workdir") || newest=unknown
  if [ "$before" = unknown ] || [ "$newest" = unknown ]; then
    [ $((SECONDS - $1)) -ge "$progress_seconds" ]
  else
    [ "$newest" -gt "$before" ]
  fi
}

step() {
  if [ "$newest" = -1 ]; then echo none; else echo "$newest"; fi
}

restarts=0 fruitless=0 seconds=$wait_seconds
while :; do
  began=$SECONDS
  status=0
  run_child "$@" || status=$?
  if [ -n "$stopping" ] || [ "$status" -eq $FINISHED ] || [ "$status" -eq $USER_MISTAKE ]; then
    exit "$status"
  fi

  if committed "$began"; then
    fruitless=0 seconds=$wait_seconds
  elif [ "$status" -ne $STOPPED ] && [ "$restarts" -gt 0 ]; then
    fruitless=$((fruitless + 1))
  fi
  if [ "$fruitless" -ge "$limit" ]; then
    say "status $status; no new step in $limit restarts (newest: $(step)), so it is given up"
    exit "$status"
  fi

  restarts=$((restarts + 1))
  if [ "$status" -eq $STOPPED ]; then
    say "status 75, stopped and saved (newest step: $(step)); restart $restarts"
  else
    say "status $status (newest step: $(step)); restart $restarts in $seconds s"
    run_child sleep "$seconds" || true
    if [ -n "$stopping" ]; then exit $STOPPED; fi
    seconds=$((seconds * 2))
    if [ "$seconds" -gt "$max_wait" ]; then seconds=$max_wait; fi
  fi
done
