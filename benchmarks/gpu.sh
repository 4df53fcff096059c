#!/bin/sh
# Everything on a borrowed GPU in one call, under ten minutes: the tests that need one, then benchmarks/gpu.py.
#
#   run this in the repository's root; results land in $OUT (or runs/gpu).
#
# The machine is bare: python3 with torch, triton and transformers, and no network. Packages that it lacks can travel as
# wheels in .whl (liger-kernel and cut-cross-entropy give the cross-entropy section its rivals).
set -u
out=${OUT:-runs/gpu}
mkdir -p "$out"
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
export FORETOKEN_CACHE=${FORETOKEN_CACHE:-/tmp/foretoken}
site=/tmp/foretoken-site
mkdir -p "$site/foretoken-0.1.0.dist-info" # the version, for a checkout that is not installed
printf 'Metadata-Version: 2.1\nName: foretoken\nVersion: 0.1.0\n' > "$site/foretoken-0.1.0.dist-info/METADATA"
if ls .whl/*.whl > /dev/null 2>&1; then
    python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" .whl/*.whl
fi
export PYTHONPATH="$PWD:$site${PYTHONPATH:+:$PYTHONPATH}"
python3 -c 'import torch; assert torch.cuda.is_available()' || { echo 'There is no CUDA device here.'; exit 1; }
nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem --format=csv,noheader
began=$(date +%s)
timeout 90 python3 -m pytest -q -W default -m "not slow" -p no:cacheprovider tests/test_graphs.py > "$out/tests.txt" 2>&1
tail -n 15 "$out/tests.txt"
python3 benchmarks/gpu.py --device cuda --out "$out" --seconds $((555 - $(date +%s) + began)) "$@" 2>&1 | tee "$out/gpu.txt"
rm -rf "$out/work"
