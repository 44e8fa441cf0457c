"""What the files of a run folder are called, who writes each, and when.

A merge or an import leaves config.json, its weights and provenance.json, a training more of them.
An average that was evaluated without being written has config.json and results alone.
Names are relative to the run folder. Other files have their names elsewhere: checkpoints to resume
from, `checkpoints/step-N.pt` and `step-N.json`, and `.damaged` behind what could not be used
(rft/train/checkpoint.py); traces (rft/train/profile.py); what a job on a cluster leaves,
`job-N.log`, `code/`, `stop-N` and `resubmit.sh` (launch/job.sh); and while a file is being written,
`.NAME.ID.tmp` (rft/storage/files.py).
"""

from pathlib import Path

CONFIG = "config.json"  # the options, before anything else; makes a folder a run folder
PROVENANCE = "provenance.json"  # code and command; written last by a merge or an import
METRICS = "metrics.jsonl"  # while the run trains
PROGRESS = "progress.json"  # after each checkpoint, for monitoring; resuming does not read it
TRAINING = "training.json"  # written last by a training
GALLERY = "gallery.npz"  # by a training that masks, before training.json
FRAMES = "frames.npz"  # what gallery.npz will show of the steps, while the run trains
RESULTS = "results.json"  # by rft.evaluate
PREDICTIONS = "predictions"  # by rft.evaluate before results.json: a file for each set
CLUSTERS = "clusters.json"  # by rft.ensemble dawin before results.json
LOCALISATION = "localisation.json"  # by rft.evaluate.localisation

# the weights, and what a run resumes from unless --log.checkpoints names another folder
CHECKPOINTS = "checkpoints"
SELECTED = Path(CHECKPOINTS) / "best.safetensors"  # the last ones without held-out images
LAST = Path(CHECKPOINTS) / "last.safetensors"  # after the last step

TENSORBOARD = "tensorboard"  # event files
WANDB = "wandb"  # what Weights & Biases writes
WANDB_ID = Path(WANDB) / "id"  # of the run there, so that a resumed one continues it
PROFILE = "profile"  # traces of --profile
FEATURES = "features"  # of frozen towers while the run trains; safe to delete
LOCK = ".lock"  # held by the one training that writes the folder

# written through; all others are replaced as a whole
WRITTEN_THROUGH = (CHECKPOINTS, TENSORBOARD, WANDB, PROFILE, FEATURES, PREDICTIONS, METRICS, LOCK)
