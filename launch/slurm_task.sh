#!/usr/bin/env bash
# One task of slurm_step.sh: runs a command, and notes in MARK.STATUS a stop (75) or a mistake (2).
#
# For srun kills a step as soon as one task ends with another status than 0, and returns the highest
# status, which then is that of a task it has killed. So a stop ends with 0 here.

trap : TERM # SLURM signals this script as well, which is to wait for the command
"$@"
status=$?
case "$status" in 2 | 75) touch "$MARK.$status" ;; esac
if [ "$status" -eq 75 ]; then exit 0; fi
exit "$status"
