"""All bytes that enter or leave rft, and what is checked of them before anything is done with them.

- `urls`: which names may be opened, decided from the text alone
- `files`: whole files on any store: read, published, listed, hashed
- `remote`: requests to remote stores: retries, time limits, what answers mean
- `local`: regular files of this machine, and no writing through links
- `documents`: JSON as checked dataclasses
- `arrays`: .npz archives at a known cost
- `zips`: the size of a zip archive's directory, before it is read
"""
