"""Real servers, each with and without its adapter, and real clients whose uploads they refuse.

How to add a server: `kit`. What its processes serve: `apps`. Each needs its server's package, and skips without it.
"""
