#!/usr/bin/env bash
# Every GPU figure that docs/benchmarks.md has a row for, in one command:
#
#   bash benchmarks/gpu.sh OUT [RELEASED]
#
# OUT is the folder for JSON, pictures and logs; RELEASED the authors' models.py or its folder. What fails is named at the
# end, and does not keep the rest from running. PARTS="infer train" runs only those.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:?usage: bash benchmarks/gpu.sh OUT [RELEASED]}
mkdir -p "$out"
released=() authors=()
if [[ $# -gt 1 ]]; then released=(--released "$2") authors=(released:amp); fi
failed=()

run() { # NAME COMMAND...
    local name=$1
    shift
    [[ " ${PARTS:-infer latency train roofline parts memory} " == *" ${name%%-*} "* ]] || return 0
    echo "== $name: python -m benchmarks.$*"
    python -m "benchmarks.$@" --device cuda --out "$out" --name "gpu-$name" 2>&1 | tee "$out/gpu-$name.log" || failed+=("$name")
}

compiled=bf16+channels_last+compile
peers=("convnext_tiny:$compiled" "swin_tiny_patch4_window7_224:$compiled" "pvt_v2_b2:$compiled" "resnet50:$compiled")
light=container_light:amp,bf16,bf16+channels_last,bf16+compile,fused+bf16,fused+$compiled
run infer speed "${authors[@]}" "$light" "${peers[@]}" "${released[@]}" --batch-size 256
run latency speed "${authors[@]}" "$light" "${peers[@]}" "${released[@]}" --work latency
run train speed "${authors[@]}" container_light:amp,amp+channels_last,amp+compile,amp+channels_last+compile \
    "${released[@]}" --work train --batch-size 128
run roofline-infer roofline "container_light:fused+bf16,fused+$compiled" --batch-size 256
run roofline-train roofline container_light:amp,amp+channels_last+compile --work train --batch-size 128
run parts-infer parts --dtype bfloat16 --batch-size 256
run parts-train parts --dtype bfloat16 --batch-size 128 --backward
run memory memory container container_light --dtype bfloat16

if [[ ${#failed[@]} -gt 0 ]]; then
    echo "failed: ${failed[*]}" >&2
    exit 1
fi
