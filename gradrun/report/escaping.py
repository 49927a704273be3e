"""Make text from files and users harmless in any output."""

from html import escape


def escape_control_chars(text: str) -> str:
    """Escape control characters, so that no name can drive a terminal."""
    return "".join(
        char if char in "\n\t" or char.isprintable() else repr(char)[1:-1] for char in text
    )


def escape_html(text: object) -> str:
    """Escape control characters, markup and quotes."""
    return escape(escape_control_chars(str(text)))
