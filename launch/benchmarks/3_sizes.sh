#!/usr/bin/env bash
# ViT-B/16 and ViT-H/14, the claim that seeing visible patches alone is faster, and a profile.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

if [ -n "$SMOKE" ]; then
  tiny="model.depth=1 model.decoder_depth=1 model.embed_dim=64 model.num_heads=2"
  bench step "vit_b $tiny" "vit_h $tiny" --image_size=112 --batch_size=2 --rounds=1 \
    --profile="$OUT/profile"
  bench encode_all "vit_l $tiny" --image_size=32 --batch_size=2 --rounds=1
else
  bench step vit_l --batch_size=256 --rounds=3 --steps=20 --profile="$OUT/profile"
  bench encode_all vit_l --batch_size=128 --rounds=5 --steps=10
  bench step vit_b --batch_size=256,512 --rounds=5 --steps=20
  bench step vit_h --batch_size=128,256 --rounds=3 --steps=20
fi
finish
