"""Quiets other libraries."""

from __future__ import annotations


def quiet() -> None:
    """Turns off the progress bars and advice of diffusers and transformers; their errors stay."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
