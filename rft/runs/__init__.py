"""The run folder: the names of its files, their contents, and which of them belong together.

- `filenames`: the name of each file, and which command writes it when
- `records`: the JSON documents as types, and their readers
- `folder`: which weights and counts belong together
- `derived`: folders of merges and imports
- `header`: the header of a weights file
- `trained_on`: which packed sets the weights have seen
- `gallery_file`: the arrays of the counterfactual pictures
"""
