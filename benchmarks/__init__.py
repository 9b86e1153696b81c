"""Reproducible benchmarks; docs/benchmarks.md has the results.

python -m benchmarks.speed     models side by side: throughput, latency, training step, memory
python -m benchmarks.roofline  a model's parts against the device's bandwidth and matrix rate
python -m benchmarks.parts     implementations of each part of a block, side by side
python -m benchmarks.memory    memory and time against the number of tokens
"""
