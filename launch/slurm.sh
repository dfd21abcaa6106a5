#!/usr/bin/env bash
# A job of SLURM that goes on until the run has finished, over any number of time limits.
#
#   sbatch --nodes=4 --time=24:00:00 launch/slurm.sh --config=vit_l --workdir=/shared/runs/vit_l
#   bash launch/slurm.sh --dry-run --config=vit_l --workdir=/shared/runs/vit_l
#
# Submit it in the folder of the clone; options of sbatch on the command line win over those below.
# The flags are those of `python -m mae_jax.main`. --workdir has to be on a disk that all nodes see.
# One task a GPU, which is how JAX deals GPUs out on SLURM: each task sees all of its node (--gpu-bind)
# and takes the one of its number. PYTHON=... is the interpreter that mae_jax is installed for.
#
# Two minutes before the limit SLURM sends SIGTERM to the tasks (without "B:", so not to this
# script); slurm_task.sh passes it on, all save and give 75, and the job is put back into the queue.
# After a node failure SLURM does so itself (--requeue). After a crash restart.sh starts the tasks
# again within the job.
#
#SBATCH --job-name=mae_jax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-task=1
#SBATCH --gpu-bind=none
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out

set -euo pipefail
# SLURM runs a copy of this file, so that its folder says nothing.
if [ -n "${SLURM_JOB_ID:-}" ]; then
  ROOT=${SLURM_SUBMIT_DIR:-$PWD}
else
  ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
fi
if [ ! -e "$ROOT/launch/lib.sh" ]; then
  echo "error: sbatch: expected to be called in the folder of the clone, got $ROOT" >&2
  exit 2
fi
# shellcheck source=lib.sh
source "$ROOT/launch/lib.sh"

PYTHON=${PYTHON:-python}

dry_run="" flags=()
for flag in "$@"; do
  case "$flag" in --dry-run) dry_run=1 ;; *) flags+=("$flag") ;; esac
done
workdir_of "${flags[@]+"${flags[@]}"}" >/dev/null

command=("$ROOT/launch/restart.sh" "$ROOT/launch/slurm_step.sh"
  "$PYTHON" -m mae_jax.main "${flags[@]}")
if [ -n "$dry_run" ]; then
  sed -n 's/^#SBATCH/sbatch/p' "${BASH_SOURCE[0]}"
  show "${command[@]}"
  exit
fi
[ -n "${SLURM_JOB_ID:-}" ] ||
  refuse "slurm.sh: expected to be submitted, as in: sbatch launch/slurm.sh --config=... --workdir=..."

# A proxy would catch the connections between the tasks.
unset http_proxy https_proxy all_proxy HTTP_PROXY HTTPS_PROXY ALL_PROXY

# Begins the names of notes from the tasks: beside the output, so on a disk that all nodes see.
export MARK=$PWD/slurm-$SLURM_JOB_ID
status=0 stopped=""
"${command[@]}" || status=$?
if [ "$status" -eq 0 ] && [ -e "$MARK.75" ]; then stopped=1; fi
rm -f "$MARK.2" "$MARK.75"
if [ -n "$stopped" ]; then
  say "stopped and saved; back into the queue"
  scontrol requeue "$SLURM_JOB_ID" # which ends this script
fi
exit "$status"
