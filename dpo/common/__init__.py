"""What every room may call. It calls no room.

errors.py UserError, Stopped, and reading a user's file | files.py files written whole, checked, sealed | locks.py one process in a folder
console.py the log and the progress line | command.py the main of every command | stats.py intervals
words.py words for messages | hub.py names on the hub | device.py tensors to a device and back
cores.py work of which each core of a CPU does a part of its own
libraries.py other libraries: quieted, or named where one does not fit
pictures.py, tokenizers.py pictures, turned upright, and tokenizers as content
machine.py what differs between Linux, macOS and Windows
"""
