"""The files in the folder of a packed set; the shards themselves are named in its manifest."""

MANIFEST = "manifest.json"  # written last: a folder without it is not a packed set
INDEX = "index.npz"
SAMPLES = "samples.npz"  # absent in older sets; the manifest has its hash
PLAN = "plan.json"  # written first: identifies the set that is packed or indexed here
COMMITS = "commit"  # a folder: the records of finished shards
PHOTOS = "photos.jsonl"  # sets of own photos only: the source file of each sample
QUARANTINE = "quarantine.jsonl"  # images left out because they cannot be decoded
