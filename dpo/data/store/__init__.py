"""A prepared store: pairs encoded once.

files.py its files on disk | fill.py filling it | store.py a store as a source of pairs | reader.py micro-batches of it
recording.py, recorded.py the reference's errors, written and read
"""
