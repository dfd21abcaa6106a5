# What the scripts of this folder share; sourced by them.
#
#   OUT=DIR      where figures (.jsonl) and tables (.md) go; default: benchmarks
#   SMOKE=1      the same commands on a CPU, with tiny models: a minute or two
#   LIMIT=520    seconds after which a script ends; started again, it goes on where it was
#   PYTHON=...   the interpreter that mae_jax is installed for
#   OFFICIAL=DIR, M3AE_PUBLIC=DIR   checkouts of facebookresearch/mae and young-geng/m3ae_public

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

OUT=${OUT:-benchmarks}
SMOKE=${SMOKE:-}
LIMIT=${LIMIT:-520}
PYTHON=${PYTHON:-python}
NAME=$(basename "$0" .sh)
TABLE=$OUT/$NAME.md
export MALLOC_MMAP_THRESHOLD_=1000000000 MALLOC_TRIM_THRESHOLD_=1000000000
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
if [ -n "$SMOKE" ]; then
  export JAX_PLATFORMS=cpu
fi

mkdir -p "$OUT"
: >"$TABLE"

# Runs a benchmark; ends the script with status 75 if its time is up.
bench() {
  local left=$((LIMIT - SECONDS)) status=0
  if [ "$left" -gt 0 ]; then
    timeout "$left" "$PYTHON" -m mae_jax.tools.bench "$@" --json="$OUT/$NAME.jsonl" --resume |
      tee -a "$TABLE" || status=$?
  else
    status=124
  fi
  if [ "$status" -eq 124 ]; then
    echo "$0: time is up; start it again to go on" >&2
    exit 75
  fi
  return "$status"
}

# Shows all tables once more, without what was said on the way.
finish() {
  printf '\n# %s\n' "$NAME"
  cat "$TABLE"
}
