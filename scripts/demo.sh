#!/usr/bin/env bash
# The main job on a model of DeepSeek-R1's shape, 1/16 of its size: a W8A8 checkpoint, cut for 4 ranks.
set -euo pipefail

show() {
  printf '\n$ %s\n' "$*"
  "$@"
}

rm -rf demo
show reshard synth configs/deepseek-r1.json demo/model --scheme w8a8_dynamic --scale 1/16 --layers 5 --quiet
show reshard inspect demo/model
show reshard split demo/model demo/tp4 --tp 4 --quiet
show reshard verify demo/tp4 --source demo/model --quiet
show reshard merge demo/tp4 demo/merged --quiet

printf '\nMerged back, is it the same? Cut it again, and compare the shards byte by byte:\n'
show reshard split demo/merged demo/again --tp 4 --quiet
for shard in demo/tp4/*.safetensors; do cmp "$shard" "demo/again/${shard##*/}" && echo "${shard##*/}: the same"; done
printf '\nAnd cut for 2 ranks, from the 4 shards alone:\n'
show reshard split demo/tp4 demo/tp2 --tp 2 --quiet
show reshard verify demo/tp2 --source demo/model --quiet

printf '\nThe runtime: four processes, each with its own shard, against the unsplit layers:\n'
show torchrun --nproc-per-node 4 -m reshard_runtime.demo demo/tp4
