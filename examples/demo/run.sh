#!/usr/bin/env bash
# The whole road with the tiny checkpoint beside this file: patch, export, validate, generate. `make demo` runs it.
# Usage: run.sh OUT   (OUT is made anew)
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=${1:?usage: run.sh OUT}
ckpt=$here/qwen3-vl-tiny
image=$here/images/red-triangle-green-circle.png
rm -rf "$out"
mkdir -p "$out"
results=()

step() { # step WHAT COMMAND...: runs it, and notes whether what it shows is as expected
    local what=$1
    shift
    echo
    echo "\$ $*"
    if "$@"; then results+=("passed  $what"); else results+=("FAILED  $what"); fi
}

same_answer() { # the checkpoint's words and the bundle's
    local a b
    a=$(surgeon generate "$out/patched" --image "$image" --prompt "$question" --max-new-tokens 64)
    b=$(surgeon generate "$out/bundle-fp32" --image "$image" --prompt "$question" --max-new-tokens 64)
    echo "patched checkpoint: $a"
    echo "fp32 bundle:        $b"
    [ -n "$a" ] && [ "$a" = "$b" ]
}

question="Describe the picture."
step "the checkpoint is read" surgeon inspect "$ckpt"
step "PVM is grafted at layers 2, 4, 6" surgeon patch "$ckpt" "$out/patched" --pass pvm:layers=2,4,6,latent=64
step "the patched model gives its source's logits, bit for bit" surgeon validate "$ckpt" "$out/patched" --steps 16 --report "$out/identity.json"
step "an fp32 bundle is exported" surgeon export "$out/patched" "$out/bundle-fp32" --dtype fp32 --max-length 1024
step "a bf16 bundle is exported, its weights shared with the checkpoint" surgeon export "$out/patched" "$out/bundle-bf16" --dtype bf16 --max-length 1024
step "the fp32 bundle computes what the checkpoint does: 1e-4, same tokens" surgeon validate "$out/patched" "$out/bundle-fp32" --steps 64 --report "$out/fp32.json"
step "the bf16 bundle stays within bf16's bounds" surgeon validate "$out/patched" "$out/bundle-bf16" --steps 16 --report "$out/bf16.json"
step "every file of the bundle is the one that was exported" surgeon validate "$out/bundle-bf16" --bytes
step "checkpoint and bundle say the same about an image" same_answer

echo
echo "Checks:"
printf '  %s\n' "${results[@]}"
! printf '%s\n' "${results[@]}" | grep -q '^FAILED'
