"""Text from files and users, made harmless for whatever shows it.

Knows characters; not terminals, tables or mark-up.
"""


def escape_control_chars(text: str) -> str:
    """`text` with control characters written out, so that no name can drive a terminal."""
    return "".join(
        char if char in "\n\t" or char.isprintable() else repr(char)[1:-1] for char in text
    )
