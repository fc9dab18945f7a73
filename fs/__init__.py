"""File systems on block devices.

Knows nothing of processes, transports or tmem; standard library only.
"""
