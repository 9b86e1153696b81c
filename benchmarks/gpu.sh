#!/usr/bin/env bash
# A quarter of an hour on a GPU: benchmarks in order of importance, within a time budget:
#
#   bash benchmarks/gpu.sh OUT [--minutes 8] [--rehearse] [--only STEP ...] [--released PATH] [--data DIR] \
#       [--transfer DIR]
#
#   OUT          folder for results, logs and compiler caches; the same command continues with the steps that are left
#   --minutes    time for all steps; a step that no longer fits is left out and named
#   --rehearse   run the same steps on the CPU, with tiny sizes, in three minutes
#   --only       steps to run, even if they are done: tests infer train latency roofline transfer cifar
#   --released   the authors' models.py (github.com/allenai/container), or its folder, to measure beside ours
#   --data       CIFAR-10 as cifar10/{train,test}/CLASS/*.jpg
#   --transfer   data for parallel fine-tuning, DINO and YOLO runs, as in benchmarks/transfer.py; takes seven minutes
#
# A machine without a network needs Python >= 3.10 with torch >= 2.11 and torchvision >= 0.26 for its GPU. It also needs
# the `train` requirements of pyproject.toml, pytest and pytest-xdist. Bring missing packages as wheels. Here:
#
#   pip wheel --no-deps --wheel-dir wheels .          # this project: its metadata say what is needed
#   pip download --no-deps --dest wheels timm         # and whatever else the check names
#
# and there, in a copy of this tree:
#
#   pip install --no-index --no-deps --upgrade --target site wheels/*.whl
#   PYTHONPATH=$PWD/site bash benchmarks/gpu.sh OUT
#
# The check runs first, takes seconds, and names what is missing. Source tree, wheels and CIFAR-10 (19 MB as .tar.xz)
# total 32 MB.
set -euo pipefail
[[ $# -gt 0 ]] || { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}" >&2; exit 2; }
here=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec "${PYTHON:-python3}" -m benchmarks.gpu --from "$here" "$@"
