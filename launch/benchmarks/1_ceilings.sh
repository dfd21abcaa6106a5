#!/usr/bin/env bash
# What the device can do at best (a matrix product, a copy), and ViT-L/16 over batch sizes.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

if [ -n "$SMOKE" ]; then
  bench step "vit_l model.depth=1 model.decoder_depth=1 model.embed_dim=64 model.num_heads=2" \
    --image_size=32 --batch_size=2,4 --rounds=2 --copy
else
  bench step vit_l --batch_size=64,128,256,512 --rounds=5 --steps=20 --copy
fi
finish
