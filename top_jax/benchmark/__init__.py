"""Measures the scan and the models on this machine: `top-jax benchmark`.

    compare        a config's model: dense, pruned, every alignment, a DeiT; report and text
    contestants    the models that `compare` times
    race           times them at growing batch sizes, and judges whether pruning pays
    programs       a model's inference and train step, compiled and timed

    suite          everything below, within a budget of time
    contract       compares the implementations of the scan with the reference on this device
    scans          the scans of the published models, and how fast the implementations run them
    floor          the least time that a scan can take
    tuning         searches the kernels' block sizes

    timing         compiles several functions, and times them in turn

Only JAX, Flax, Optax and NumPy are needed, so that it runs on a borrowed GPU.
"""
