"""Block devices.

One interface (`device`), one real device (`file`), and small devices that stack on any other.
"""
