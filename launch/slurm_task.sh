#!/usr/bin/env bash
# One task of slurm_step.sh: runs a command, and notes in MARK.STATUS a stop (75) or a mistake (2).
#
# For srun kills a step as soon as one task ends with another status than 0, and returns the highest
# status, which then is that of a task it has killed. So a stop ends with 0 here.

source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

# SLURM signals this script, and the command as well or not, as it tracks processes (proctrack/linuxproc,
# proctrack/cgroup); a second SIGTERM does no harm. No `set -m`: proctrack/pgid needs one process group.
trap 'pass_on TERM' TERM
status=0
run_child "$@" || status=$?
case "$status" in 2 | 75) touch "$MARK.$status" ;; esac
if [ "$status" -eq 75 ]; then exit 0; fi
exit "$status"
