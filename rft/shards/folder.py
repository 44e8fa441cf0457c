"""The files in the folder of a packed set; the shards themselves are named in its manifest."""

MANIFEST = "manifest.json"  # written last: a folder without it is no packed set
INDEX = "index.npz"
SAMPLES = "samples.npz"  # of older sets absent; the manifest has its hash
PLAN = "plan.json"  # written first: which set is packed or indexed here
COMMITS = "commit"  # a folder: the record of each shard that is finished
PHOTOS = "photos.jsonl"  # of one's own photos: which file each sample was
QUARANTINE = "quarantine.jsonl"  # images that were left out because they cannot be decoded
