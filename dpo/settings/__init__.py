"""What a user may ask for; imports no torch.

config.py every setting and its default | families.py names of models' families | fields.py how a setting is declared
flags.py the command line | compat.py other trainers' command lines | recipe.py what of a preset still holds beside the user's own settings
rules.py what does not go together, has no effect, may change on resume
resolve.py every "auto" decided | advice.py the first log line and warnings | page.py docs/settings.md | presets/ recipes
"""
