"""rft on one GPU, measured in one command: `python -m benchmarks.gpu`.

GPU time is scarce. The command needs only torch and the wheels of `benchmarks.wheels`, stops by
itself, measures the most valuable parts first, and keeps earlier measurements when a part fails or
time runs out. `--rehearse` runs every part on a CPU with a tiny model, so that no line of code runs
for the first time on the GPU.

    __main__     the start, before anything is imported
    command      the command line and the result file
    runner       parts in separate processes: failures and deadlines
    parts        the measurements; steps and runs have the two largest kinds
    inputs       synthetic shards and weights
    group        one rank under torchrun, in a process group like those of several GPUs
    interrupted  a training that is stopped within a step
    page         the Markdown table
"""
