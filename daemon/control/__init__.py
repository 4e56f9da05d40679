"""The coordinator process: it pairs engines for migration, scales, and answers the admin API.

`policy` holds the pure decisions. Frontends and engines import them too, and import nothing else of this package.
"""
