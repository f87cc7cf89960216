#!/usr/bin/env bash
# The study on a GPU machine without internet access, in calls of at most ten minutes (docs/study.md, section 4).
#
#   bash docs/study_gpu.sh prepare DATA_DIR   here: puts wheels and CIFAR-10 into .gpu; copy it with the checkout
#   bash docs/study_gpu.sh run MODEL          there: continues the study for MINUTES (8), then packs it into $OUT
#
# Before the next call, copy the parts in $OUT (study.tar.gz.*) into .gpu here.
set -euo pipefail

prepare() {
  mkdir -p .gpu/wheels
  python -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_24_x86_64 --platform manylinux_2_17_x86_64 \
    --platform manylinux2014_x86_64 -d .gpu/wheels grain array_record ml_collections tensorboardX portpicker
  [ -f .gpu/cifar10.npz ] ||
    python -m top_jax.cli.pack .gpu/cifar10.npz --config configs/study_vim.py --config.data.data_dir="$1"
  du -sh .gpu
}

run() {
  python3 -m pip install -q --no-index --no-deps --upgrade --target /tmp/site .gpu/wheels/*.whl
  mkdir -p /tmp/bin /tmp/study
  ln -sf "$(command -v python3)" /tmp/bin/python
  export PATH=/tmp/bin:$PATH PYTHONPATH=/tmp/site:$PWD JAX_COMPILATION_CACHE_DIR=/tmp/study/programs
  ! compgen -G ".gpu/study.tar.gz.*" >/dev/null || cat .gpu/study.tar.gz.* | tar -xzf - -C /tmp/study
  SMALL_STEPS=${SMALL_STEPS:-0} PRUNED=${PRUNED:---after_blocks=3,6,9} \
    timeout -s TERM "${MINUTES:-8}m" bash docs/study.sh "$1" "/tmp/study/$1" \
    --config.data.source=packed --config.data.data_dir=.gpu/cifar10.npz || echo "stopped with status $?"
  tar -czf - -C /tmp/study . | split -b 15m - "$OUT/study.tar.gz."
}

case ${1:-} in
  prepare | run) "$@" ;;
  *) sed -n 's/^#   //p' "$0" >&2 && exit 2 ;;
esac
