"""The file names of a run folder, and which command writes each file when.

Names are relative to the run folder. A merge or an import writes config.json, its weights and
provenance.json. A training writes more. An average that was evaluated in memory has config.json and
results alone.

Other files are named elsewhere:

- checkpoints to resume from, `checkpoints/step-N.pt` and `step-N.json`, and the suffix `.damaged`
  of unreadable ones (rft/train/checkpoint.py)
- traces (rft/train/profile.py)
- files of a cluster job, `job-N.log`, `code/`, `stop-N` and `resubmit-N.sh` (launch/job.sh)
- `.NAME.ID.tmp`, while a file is being written (rft/storage/files.py)
"""

from pathlib import Path

CONFIG = "config.json"  # the options, before the first step; makes a folder a run folder
PROVENANCE = "provenance.json"  # code and command; written last by a merge or an import
METRICS = "metrics.jsonl"  # while the run trains
PROGRESS = "progress.json"  # after each checkpoint, for monitoring; resuming does not read it
TRAINING = "training.json"  # written last by a training
GALLERY = "gallery.npz"  # by a training that masks, before training.json
FRAMES = "frames.npz"  # maps of some steps, kept for gallery.npz while the run trains
RESULTS = "results.json"  # by rft.evaluate
PREDICTIONS = "predictions"  # by rft.evaluate before results.json: one file per set
CLUSTERS = "clusters.json"  # by rft.ensemble dawin before results.json
LOCALISATION = "localisation.json"  # by rft.evaluate.localisation

# the weights, and the checkpoints to resume from unless --log.checkpoints names another folder
CHECKPOINTS = "checkpoints"
SELECTED = Path(CHECKPOINTS) / "best.safetensors"  # equal to the last without held-out images
LAST = Path(CHECKPOINTS) / "last.safetensors"  # after the last step

TENSORBOARD = "tensorboard"  # event files
WANDB = "wandb"  # written by Weights & Biases
WANDB_ID = Path(WANDB) / "id"  # id of the run there, so that a resumed run continues it
PROFILE = "profile"  # traces of --profile
FEATURES = "features"  # of frozen towers while the run trains; safe to delete
LOCK = ".lock"  # held by the one training that writes the folder

# folders that are written into and files that are appended to; all others are replaced atomically
WRITTEN_THROUGH = (CHECKPOINTS, TENSORBOARD, WANDB, PROFILE, FEATURES, PREDICTIONS, METRICS, LOCK)
