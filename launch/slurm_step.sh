#!/usr/bin/env bash
# Runs a command as a step of the job of slurm.sh, under restart.sh. Status: 2 if a task had it, else
# that of srun, which is 0 as well when all tasks have stopped and saved: MARK.75 is there then.

rm -f "$MARK.2" "$MARK.75"
# --kill-on-bad-exit: a task that ends wrongly takes the others with it. srun does not inherit
# --cpus-per-task from the job.
srun --kill-on-bad-exit=1 --gpu-bind=none --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
  "$(dirname "${BASH_SOURCE[0]}")/slurm_task.sh" "$@"
status=$?
if [ -e "$MARK.2" ]; then exit 2; fi
exit "$status"
