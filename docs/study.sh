#!/usr/bin/env bash
# The study of docs/study.md: trains dense models from three seeds, then prunes them without training and after fine-tuning.
#
#   bash docs/study.sh MODEL OUT [FLAG...]    MODEL: vim, plain_mamba, or another configs/study_MODEL.py
#
# FLAGs are passed to every command, such as --config.data.data_dir=DIR. A second call continues where the first stopped,
# so each call may have a time limit: timeout -s TERM 570 bash docs/study.sh ...
#
# Environment variables: SEEDS ("0 1 2"), SMALL_STEPS (1200; 0 skips the small images), FINETUNE_STEPS (100), and flags of
# cli.ablate: for both ablations (PRUNED: "--after_blocks=2,4"), only the first (TABLES), only the second (TUNED).
set -euo pipefail
model=$1 out=$2
shift 2
config=configs/study_$model.py
checkpoints=()
mkdir -p "$out"

for seed in ${SEEDS:-0 1 2}; do
  run=$out/seed$seed start=()
  if [ "${SMALL_STEPS:-1200}" != 0 ]; then
    # Images of half the side have a quarter of the tokens; training on whole images then resizes the position embedding.
    python train.py --config "$config" --workdir "${run}_small" "$@" --config.seed="$seed" \
      --config.total_steps="${SMALL_STEPS:-1200}" --config.model.img_size=16 --config.data.shift=2 \
      --config.optimizer.learning_rate=3e-3
    [ -f "${run}_small/summary.json" ] || exit 0 # a signal ended it; the next call resumes
    [ -f "${run}_small.safetensors" ] ||
      python -m top_jax.cli.convert "${run}_small" "${run}_small.safetensors" --which latest
    start=(--config.init_from="${run}_small.safetensors")
  fi
  python train.py --config "$config" --workdir "$run" "$@" --config.seed="$seed" "${start[@]}"
  [ -f "$run/summary.json" ] || exit 0
  checkpoints+=(--checkpoint "$run")
done

ablate() {
  # shellcheck disable=SC2086  # several flags in one variable
  python -m top_jax.cli.ablate --config "$config" "${checkpoints[@]}" ${PRUNED:---after_blocks=2,4} "$@"
}
# shellcheck disable=SC2086
ablate --out "$out/ablation" ${TABLES:-} "$@"
# shellcheck disable=SC2086
ablate --out "$out/ablation" --tables=alignment --finetune_steps="${FINETUNE_STEPS:-100}" ${TUNED:-} "$@"
