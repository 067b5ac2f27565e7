"""One file per claim; each prints a table and writes it with device, versions and date.

python -m benchmarks.gpu --out DIR        everything a GPU has to show, in one call (parity, kernels, training steps)
"""
