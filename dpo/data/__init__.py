"""Preference sets -> micro-batches. Knows no model and no trainer.

sources.py from a setting to pairs: parquet.py, tables.py, hub.py, store/
pairs.py what every source yields | labels.py which columns, which label
batches.py micro-batches of any source: order.py which pairs, batch.py what one holds,
loader.py from images, store/reader.py from a store
images.py from a file to pixels | ahead.py an iterator read by a thread
"""
