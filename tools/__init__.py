"""Measurements and checks that only developers run, from the root of a checkout: `python -m tools.NAME`. Not installed.

scan_on_a_cpu       the recurrence against what JAX and PyTorch offer without it
triton_resources    registers and instructions of the Triton kernels, compiled without a GPU
compile_time        how long the models take to compile
depthwise_conv      PlainMamba's convolution against XLA's grouped one
xla_flops           XLA's cost analysis of a model, explained from the multiply-accumulates that we count
"""
