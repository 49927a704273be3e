"""Types of numbers in results, with bounds.

Result files may be damaged or hostile: impossible values are rejected when a file is read.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

Seconds = Annotated[float, Meta(ge=0, le=1e9)]
Count = Annotated[int, Meta(ge=0, le=2**62)]
ByteChange = Annotated[int, Meta(ge=-(2**62), le=2**62)]
"""Negative if more memory was freed than allocated."""
Calls = Annotated[float, Meta(ge=0, le=1e9)]
"""Per batch."""
Rate = Annotated[float, Meta(gt=0, le=1e24)]
"""Per second."""
