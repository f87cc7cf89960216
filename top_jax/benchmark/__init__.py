"""What the machine at hand does with the scan and the models: `python -m top_jax.cli.benchmark`.

    timing     medians of several functions run in turn        floor      the time no version can beat
    cases      the scans of the published models               associative  the scan that JAX alone would write
    contract   right, on this device                           scans, models  how fast
    goals      what is asked for, and whether it is reached    suite      all of it, within a budget of time
    tuning     block sizes by search                           report     where it was measured, and tables
    compare    a config's model: dense, pruned, a DeiT         contestants, race, speedup  who, how, what to say
    programs   what is compiled of a model to be timed         compare_text  its report, to read

Nothing here needs more than JAX, Flax, Optax and NumPy, so that it runs on a borrowed GPU.
"""
