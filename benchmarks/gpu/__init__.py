"""What rft does on one GPU, measured in one command: `python -m benchmarks.gpu`.

GPUs are lent rarely and for minutes, so the command needs nothing but torch and the wheels of
`benchmarks.wheels`, stops by itself, measures the most valuable things first, and keeps whatever
was measured when a part fails or the time ends. `--rehearse` runs every part on a CPU, on a tiny
model, so that no line of it runs for the first time on a lent GPU.

    __main__   the command line
    runner     parts in processes of their own: failures, deadlines, the result file
    parts      what is measured; steps.py and runs.py hold the two largest kinds
    inputs     synthetic shards and weights
    group      one rank under torchrun, in a process group as several GPUs have it
    page       the Markdown table
    command    settings and result file
"""
