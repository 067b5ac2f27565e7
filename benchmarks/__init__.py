"""Measurements: each command prints a table and writes it with device, versions and date.

python -m benchmarks.gpu --out DIR   everything a GPU has to show, in one call; sections.py lists its files
python -m benchmarks.children NAME   a section of it, in a process of its own
python -m benchmarks.flops           FLOPs of training on one pair, counted
python -m benchmarks.plan            how near a plan's memory and FLOPs are to the step's own, on the CPU
python -m benchmarks.host            what a call of each operation costs the host, by its short way and by torch's dispatcher
python -m benchmarks.spared          what a training step is spared of casts, products and ways around, on the CPU
python -m benchmarks.prepare         what a prepared store and recorded reference errors save, on the CPU
python -m benchmarks.step            the trainer's update against the peers', by where its pairs come from, on the CPU
python -m benchmarks.sampling        memory and speed of drawing and scoring by the number of images, on the CPU
python -m benchmarks.saving          memory of writing a result, drawing samples and exporting, by commit, on the CPU
python -m benchmarks.study           do the methods do what the papers say: study_rows.py the runs, evidence.py the page
python -m benchmarks.aot             registers, spills and vector accesses of every kernel: machine_code.py, no GPU needed
python -m benchmarks.losses A B      do two commits train alike, bit for bit

sizes.py holds the models that are measured, peers.py the peers' step on a device.
measuring.py holds what they share: timing, memory, result files, Markdown tables.
"""
