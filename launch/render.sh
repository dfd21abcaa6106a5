#!/usr/bin/env bash
# Prints a Kubernetes manifest with its settings and the flags of the training filled in.
#
#   launch/render.sh launch/gke_jobset.yaml IMAGE=REGISTRY/mae_jax:1 HOSTS=4 \
#       --config=vit_l --workdir=gs://BUCKET/runs/vit_l | kubectl apply -f -
#
# KEY=VALUE are the settings at the top of the manifest; those without a default are needed. All that
# begins with -- are flags of `python -m mae_jax.main`. Nothing is sent anywhere: without `kubectl`
# behind it, it is the dry run.

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

manifest=${1:-}
[ -f "$manifest" ] || refuse "render.sh: expected a manifest of launch/, got '$manifest'"
shift

# Settings of the manifest: lines `#   KEY=DEFAULT  what it is`.
keys=() values=() defaults=()
while IFS='=' read -r key value; do
  keys+=("$key")
  values+=("$value")
  defaults+=("$value")
done < <(sed -n 's/^#   \([A-Z_][A-Z_]*=[^ ]*\) .*/\1/p' "$manifest")

flags=()
for argument in "$@"; do
  case "$argument" in
    --*) flags+=("$argument") ;;
    *=*)
      found=""
      for ((i = 0; i < ${#keys[@]}; i++)); do
        if [ "${keys[i]}" = "${argument%%=*}" ]; then
          values[i]=${argument#*=}
          found=1
        fi
      done
      [ -n "$found" ] || refuse "${argument%%=*}: expected one of ${keys[*]}"
      ;;
    *) refuse "$argument: expected KEY=VALUE or a flag of mae_jax.main" ;;
  esac
done
workdir_of "${flags[@]+"${flags[@]}"}" >/dev/null

# Refuses a value that is not of the kind of its default, a number or a word.
check() {
  local key=$1 value=$2 default=$3
  # The pods of a set have some more letters, and 63 at most.
  local name='^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$' number='^[1-9][0-9]*$'
  local word='^[A-Za-z0-9][A-Za-z0-9._:/@-]*$'
  if [ "$key" = NAME ]; then
    [[ "$value" =~ $name ]] ||
      refuse "NAME: expected up to 40 small letters, digits and -, got '$value'"
  elif [[ "$default" =~ $number ]]; then
    [[ "$value" =~ $number ]] || refuse "$key: expected a positive number, got '$value'"
  else
    [[ "$value" =~ $word ]] || refuse "$key: expected letters, digits and ._:/@-, got '$value'"
  fi
}
substitutions=()
for ((i = 0; i < ${#keys[@]}; i++)); do
  check "${keys[i]}" "${values[i]}" "${defaults[i]}"
  substitutions+=(-e "s|@${keys[i]}@|${values[i]}|g")
done

# Prints the flags as a list in JSON, which is YAML. Kubernetes would fill in $(NAME), but not $$(NAME).
json_flags() {
  local flag comma=""
  for flag in "${flags[@]}"; do
    case "$flag" in *[[:cntrl:]]*) refuse "${flag%%=*}: expected no line breaks, got some" ;; esac
    printf '%s"%s"' "$comma" \
      "$(printf '%s' "$flag" | sed -e 's/\\/\\\\/g' -e 's/"/\\"/g' -e 's/[$](/$&/g')"
    comma=", "
  done
}
list=$(json_flags)
sed "${substitutions[@]}" "$manifest" | while IFS= read -r line; do
  case "$line" in
    *@FLAGS@*) printf '%s\n' "${line%%@FLAGS@*}$list${line#*@FLAGS@}" ;;
    *) printf '%s\n' "$line" ;;
  esac
done
