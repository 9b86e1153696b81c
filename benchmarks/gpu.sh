#!/usr/bin/env bash
# A quarter of an hour on a GPU, in order of worth and within a budget:
#
#   bash benchmarks/gpu.sh OUT [--minutes 8] [--rehearse] [--only STEP ...] [--released PATH] [--data DIR] \
#       [--photos DIR ... --teacher FILE] [--transfer DIR]
#
#   OUT          results, logs, and the compilers' caches; the same command goes on with what is left
#   --minutes    for everything; a step that no longer fits is left out and named
#   --rehearse   the same steps on the CPU, with tiny sizes, in three minutes
#   --only       these steps, also if they are done: distill tests infer train latency roofline transfer cifar
#   --released   the authors' models.py (github.com/allenai/container), or its folder, to be measured beside ours
#   --data       CIFAR-10 as cifar10/{train,test}/CLASS/*.jpg
#   --photos     folders to distil from, and --teacher, EfficientNet-Lite2 by examples/efficientnet_lite.py: eight minutes
#   --transfer   data for fine-tuning, DINO and YOLO side by side, as of benchmarks/transfer.py: seven minutes
#
# A machine without a network needs Python >= 3.10 with torch >= 2.11 and torchvision >= 0.26 for its GPU, and what
# pyproject.toml names for `train`, with pytest and pytest-xdist. What it lacks is carried as wheels. Here:
#
#   pip wheel --no-deps --wheel-dir wheels .          # this project: its metadata say what is needed
#   pip download --no-deps --dest wheels timm         # and whatever else the check names
#
# and there, in a copy of this tree:
#
#   pip install --no-index --no-deps --upgrade --target site wheels/*.whl
#   PYTHONPATH=$PWD/site bash benchmarks/gpu.sh OUT
#
# The check comes first, takes seconds, and names what is missing. Tree, wheels and CIFAR-10 (19 MB as .tar.xz) are
# 32 MB.
set -euo pipefail
[[ $# -gt 0 ]] || { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}" >&2; exit 2; }
here=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec "${PYTHON:-python3}" -m benchmarks.gpu --from "$here" "$@"
