#!/usr/bin/env bash
# ViT-L/16 in bfloat16 beside others' code, each at the best of several batch sizes.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

given=()
if [ -n "${OFFICIAL:-}" ]; then given+=("--official=$OFFICIAL"); fi
if [ -n "${M3AE_PUBLIC:-}" ]; then given+=("--m3ae_public=$M3AE_PUBLIC"); fi

if [ -n "$SMOKE" ]; then
  bench peers --wall --size=toy --dtype=float32 --batch_sizes=2 --rounds=2 --steps=1 \
    --contenders=ours,plain,eager "${given[@]}"
else
  bench peers --wall --size=vit_l --dtype=bfloat16 --batch_sizes=128,256 --rounds=3 --steps=20 \
    "${given[@]}"
fi
finish
