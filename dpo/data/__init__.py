"""Preference sets -> micro-batches. Knows no model and no trainer.

sources.py from a setting to pairs: parquet.py, tables.py, hub.py, store/ | pairs.py what every source yields; labels.py which columns, which label
order.py the order of an epoch | images.py from a file to pixels | batch.py a micro-batch | batches.py those of any source; loader.py from images
"""
