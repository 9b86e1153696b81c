"""Measurements that anyone can repeat; docs/benchmarks.md says what came out.

python -m benchmarks.speed     models side by side: throughput, latency, training step, memory
python -m benchmarks.roofline  a model's parts against the device's bandwidth and matrix rate
python -m benchmarks.parts     the ways to compute one part, side by side
python -m benchmarks.memory    memory and time against the number of tokens
"""
