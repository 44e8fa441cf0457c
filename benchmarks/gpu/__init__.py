"""What rft does on one GPU, measured in one command: `python -m benchmarks.gpu`.

GPU time is scarce, so the command needs nothing but torch and the wheels of
`benchmarks.wheels`, stops by itself, measures the most valuable things first, and keeps whatever
was measured when a part fails or the time ends. `--rehearse` runs every part on a CPU, on a tiny
model, so that no line of it runs for the first time where time is scarce.

    __main__     the start, before anything is imported
    command      the command line and the result file
    runner       parts in processes of their own: failures and deadlines
    parts        what is measured; steps and runs hold the two largest kinds
    inputs       synthetic shards and weights
    group        one rank under torchrun, in a process group as several GPUs have it
    interrupted  a training that is asked to stop in a step
    page         the Markdown table
"""
