"""A prepared store: pairs encoded once.

files.py the files on disk | fill.py filling a store, filling.py with what, shard.py what a file of it holds while it is made
known.py what a store holds already, appended.py what a new source shares with it, mended.py images readable since
store.py a store as a source of pairs, parts.py what its parts say together | reader.py micro-batches from a store
recording.py, recorded.py the reference's errors, written and read
"""
