"""The miniature world: the paper's experiment, small enough for two processor cores.

A procedural stand-in for ImageNet and its five out-of-distribution benchmarks, written in their
official layouts, and a tiny CLIP pre-trained on it. docs/results.md describes how both were made.
"""
