"""What other libraries say, and their versions."""

from __future__ import annotations


def quiet() -> None:
    """No progress bars and advice of the libraries between the lines of the run; their errors stay."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
