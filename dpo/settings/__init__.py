"""What a user may ask for; imports no torch.

config.py every setting and its default | fields.py how one is declared | flags.py the command line | compat.py other trainers' command lines
rules.py what does not go together | resolve.py every "auto" decided | advice.py what a person should be told | presets/ recipes
"""
