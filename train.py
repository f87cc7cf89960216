"""Trains a model: the command `top-jax train`, for a checkout.

python train.py --config configs/vim_s_top.py [--workdir runs/vim_s_top] [--config.batch_size=64 ...]
"""

from top_jax.cli.main import run_command

if __name__ == "__main__":  # not in worker processes, which may import this file
    run_command("train")
