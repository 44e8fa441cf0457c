"""The run folder: what its files are called, what each may hold, and what belongs together.

- `filenames`: the name of each file, who writes it and when
- `records`: the JSON documents as types, and their readers
- `folder`: which weights and counts belong together
- `derived`: folders of merges and imports
- `header`: the header of a weights file
- `trained_on`: which packed sets weights have seen
- `gallery_file`: the arrays of the counterfactual pictures
"""
