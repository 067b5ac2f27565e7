"""Preference sets -> micro-batches. Knows no model and no trainer.

sources.py a setting -> pairs, by parquet.py, tables.py, hub.py or store/ | pairs.py what every source yields
held_out.py which pairs are held out | labels.py which columns, which label
batches.py micro-batches of any source: order.py which pairs they have,
batch.py what one holds, loader.py made from images, store/reader.py from a prepared store
images.py a file -> pixels | ahead.py an iterator read by a thread
"""
