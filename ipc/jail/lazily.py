"""Modules that the standard library imports inside of functions that a process in a jail may call.

It could not open them then: the call fails where nobody expects it to.  `Counter.most_common(1)`
takes `heapq`, a traceback with a letter beyond ASCII `unicodedata`, `datetime.strptime` the third.
"""

from __future__ import annotations

from importlib import import_module

for _name in ("heapq", "unicodedata", "_strptime"):
    import_module(_name)
