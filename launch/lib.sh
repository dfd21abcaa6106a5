# What the scripts of this folder share; sourced by them. Runs on bash 3.2 (macOS) as well.

SCRIPT=$(basename "$0")

# Ends the script: the user has to mend something.
refuse() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

say() {
  printf '%s: %s\n' "$SCRIPT" "$*" >&2
}

# Prints a command so that a shell reads it back as it was.
show() {
  local word blank=""
  for word in "$@"; do
    case "$word" in
      '' | *[!A-Za-z0-9_./:=@%+,-]*)
        word="'$(printf '%s' "$word" | sed "s/'/'\\\\''/g")'"
        ;;
    esac
    printf '%s' "$blank$word"
    blank=" "
  done
  echo
}

# Prints the DIR of --workdir=DIR, the last one given, as `mae_jax.main` takes it.
workdir_of() {
  local argument workdir=""
  for argument in "$@"; do
    case "$argument" in --workdir=*) workdir=${argument#--workdir=} ;; esac
  done
  [ -n "$workdir" ] || refuse "--workdir: expected --workdir=DIR among the flags, got none"
  # shellcheck disable=SC2088  # the ~ that the shell has left for the program to expand
  case "$workdir" in "~/"*) workdir=$HOME/${workdir#"~/"} ;; esac
  printf '%s\n' "$workdir"
}

# Prints the newest step committed under a work folder, -1 if there is none. Status 1: cannot tell.
newest_step() {
  local names name newest=-1
  case "$1" in
    gs://*) names=$(bucket_steps "${1%/}/checkpoints") || return 1 ;;
    *://*) return 1 ;;
    *) names=$(ls "$1/checkpoints" 2>/dev/null || true) ;;
  esac
  while IFS= read -r name; do
    # On a disk, a step that is being saved has a longer name; it gets its number by one rename.
    case "$name" in '' | *[!0-9]*) continue ;; esac
    if [ "$name" -gt "$newest" ]; then newest=$name; fi
  done <<<"$names"
  printf '%s\n' "$newest"
}

# Prints the names of the steps of a bucket that this object commits.
bucket_steps() {
  local listed
  command -v gcloud >/dev/null || return 1
  if listed=$(gcloud storage ls "$1/*/commit_success.txt" 2>&1); then
    sed -n 's|.*/\([^/]*\)/commit_success\.txt$|\1|p' <<<"$listed"
  else
    # So it says where there is none yet; anything else is a failure.
    case "$listed" in *"matched no objects"*) ;; *) return 1 ;; esac
  fi
}

# The command of `run_child`, and what signals have come; for scripts with `trap 'pass_on TERM' TERM`.
child="" stopping="" interrupted=""

# Passes a signal on to the command: SIGINT as SIGTERM, a second one as SIGINT.
pass_on() {
  local signal=TERM
  if [ "$1" = INT ] && [ -n "$stopping" ]; then signal=INT; fi
  stopping=1 interrupted=1
  if [ -n "$child" ]; then kill "-$signal" "$child" 2>/dev/null || true; fi
}

# Runs a command and gives its status. A signal ends `wait`, not the command, which is waited for again.
run_child() {
  local again status=0
  "$@" </dev/null &
  child=$!
  # A signal that came before there was a child.
  if [ -n "$stopping" ]; then kill -TERM "$child" 2>/dev/null || true; fi
  interrupted=""
  wait "$child" || status=$?
  while [ -n "$interrupted" ]; do
    interrupted="" again=0
    wait "$child" 2>/dev/null || again=$?
    # 127: it had ended when the signal came, and `status` is its own.
    if [ "$again" -ne 127 ]; then status=$again; fi
  done
  # Data workers outlive a killed trainer; where `set -m` gave it a process group, they are ended.
  kill -KILL -- "-$child" 2>/dev/null || true
  child=""
  # The signal came before the command heeded it: there was nothing to save.
  if [ -n "$stopping" ] && [ "$status" -eq $((128 + 15)) ]; then status=75; fi
  return "$status"
}
