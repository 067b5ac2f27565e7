"""A prepared store: pairs encoded once.

files.py the files on disk | fill.py filling a store, known.py what it holds already, mended.py images readable since
store.py a store as a source of pairs | reader.py micro-batches from a store
recording.py, recorded.py the reference's errors, written and read
"""
