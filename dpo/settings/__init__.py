"""What a user may ask for; imports no torch.

config.py every setting and its default | fields.py how a setting is declared | flags.py the command line
compat.py other trainers' command lines | rules.py what does not go together, has no effect, may change on resume
resolve.py every "auto" decided | advice.py the first log line and warnings | presets/ recipes
"""
