"""Preference sets -> micro-batches. Knows no model and no trainer.

sources.py a setting -> pairs, by parquet.py, hub.py, arrow.py (what `datasets` saves), tar.py (WebDataset shards),
tables.py (CSV, JSONL), folders.py (w/ and l/) or store/ | pairs.py what every source yields | listing.py the files of a
folder | held_out.py which pairs are held out | labels.py which columns, which label
batches.py micro-batches of any source: order.py which pairs they have,
batch.py what one holds, loader.py made from images, kept.py encoded pairs in memory, store/reader.py from a prepared store
buckets.py the shapes of images that are not square, and the one of each pair
writing.py judged pairs -> parquet | labelled.py what dpo.label made | images.py a file -> pixels
examples.py pairs to look at from Python | contents.py whether image files were changed | ahead.py an iterator read by a thread
"""
