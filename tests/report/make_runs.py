"""Synthetic run folders with invented numbers, for tests only."""

import dataclasses
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from rft.classes import Classes
from rft.recipes import MASKED
from rft.report.read import Run
from rft.runs.filenames import SELECTED
from rft.runs.predictions import Predictions, path_of
from rft.runs.records import Provenance, Results, RunConfig, SetCount
from rft.sets import TEST_SETS
from rft.storage import documents, files


def make_run(
    folder: Path,
    recipe: str = "vanilla",
    seed: int = 0,
    *,
    percent: tuple[float, ...] = (70, 60, 50, 40, 30, 20),
    total: int = 1000,
    metrics: bool = True,
    **config: Any,
) -> Path:
    """Write a run folder whose accuracies are `percent`, in the order of TEST_SETS."""
    path = folder / f"{recipe.replace('/', '_')}-seed{seed}"
    path.mkdir(parents=True)
    sets = {
        name: {
            "correct": round(share * total / 100),
            "total": total,
            "manifest_sha256": files.sha256_bytes(name.encode()),
        }
        for name, share in zip(TEST_SETS, percent, strict=False)
    }
    write(path / "config.json", {"recipe": recipe, "seed": seed, **config})
    weights = make_weights(path, recipe, tilt=seed)
    results = {
        "schema": 1,
        "checkpoint": "checkpoints/best.safetensors",
        "checkpoint_sha256": files.sha256_file(weights),
        "step": 250,
        "config_sha256": files.sha256_file(path / "config.json"),
        "sets": sets,
    }
    provenance = {
        "rft": "0.1.0",
        "git": "0123456789ab",
        "packages": {"torch": "2.0"},
        "python": "3.11.0",
        "command": ["rft.train", recipe],
    }
    if "optim" in config:
        write(path / "training.json", {"steps": 250, "best_step": 250, "world_size": 1})
    write(path / "results.json", results)
    write(path / "provenance.json", provenance)
    if metrics:
        lines = [
            json.dumps(line) for line in make_metrics(recipe, seed, distils=recipe != "vanilla")
        ]
        (path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return path


def predict(
    run: Path,
    rights: dict[str, np.ndarray],
    *,
    classes: int = 2,
    salt: int = 0,
    labels: dict[str, np.ndarray] | None = None,
    scaled: bool = False,
) -> None:
    """Give a run synthetic predictions that are correct where `rights` is true, (N,) per set."""
    counts = json.loads((run / "results.json").read_text())["sets"]
    for name, right_N in rights.items():
        draws = np.random.default_rng([salt, *run.name.encode(), *name.encode()])
        images = len(right_N)
        label_N = (np.arange(images) % classes).astype(np.int32)
        if labels is not None:
            label_N = labels[name].astype(np.int32)
        rank_N = np.where(right_N, 0, draws.integers(1, 9, images)).astype(np.int32)
        confidence_N = draws.uniform(0.2, 1, images).astype(np.float32)
        likelihood_N = np.where(right_N, np.log(confidence_N), -3).astype(np.float32)
        rows = Predictions(
            key=np.array([f"{name}/{n:05d}" for n in range(images)]),
            label=label_N,
            prediction=np.where(right_N, label_N, (label_N + 1) % classes).astype(np.int32),
            rank=rank_N,
            confidence=confidence_N,
            log_likelihood=likelihood_N,
            scaled_confidence=confidence_N**2 if scaled else None,
            scaled_log_likelihood=2 * likelihood_N if scaled else None,
        )
        data = rows.to_bytes()
        files.write_bytes(str(path_of(run, name)), data)
        counts[name] = {
            "correct": int(right_N.sum()),
            "total": images,
            "manifest_sha256": files.sha256_bytes(name.encode()),
            "predictions_sha256": files.sha256_bytes(data),
        }
    edit(run / "results.json", sets=counts)


def make_predicted(
    folder: Path,
    recipe: str = "vanilla",
    seed: int = 0,
    *,
    skill: float = 0.6,
    images: int = 60,
    sets: tuple[str, ...] = TEST_SETS,
    **config: Any,
) -> Path:
    """A run with predictions; all runs share easy and hard images."""
    run = make_run(folder, recipe, seed, percent=(), **config)
    rights = {}
    for place, name in enumerate(sets):
        hard_N = np.random.default_rng(place).uniform(size=images)
        own_N = np.random.default_rng([place, seed, *recipe.encode()]).normal(0, 0.1, images)
        rights[name] = hard_N + own_N < skill
    predict(run, rights)
    return run


def make_weights(
    run: Path,
    recipe: str,
    ids: tuple[str, ...] = ("cat", "dog"),
    tilt: float = 0.0,
    step: str = "250",
) -> Path:
    """Write the selected weights of a run: rft's header without the tower."""
    classes = Classes(ids=ids, names=tuple(f"a {name}" for name in ids))
    head = np.full((len(ids) or 2, 3), tilt, dtype=np.float32)
    entries: dict[str, Any] = {"recipe": recipe, "step": step}
    if ids:  # weights of an older rft do not name classes
        entries["classes"] = dataclasses.asdict(classes)
    header = {"rft": json.dumps(entries)}
    path = run / SELECTED
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(save({"head.weight": head}, metadata=header))
    return path


def make_metrics(
    recipe: str, seed: int, *, distils: bool, steps: int = 250
) -> list[dict[str, float]]:
    """Rows like those of rft.train: losses every 5 steps, held-out counts every 25."""
    rng = np.random.default_rng([seed, *recipe.encode()])
    shift = 0.1 * (len(recipe) % 7)
    lines: list[dict[str, float]] = []
    for step in range(5, steps + 1, 5):
        decay = float(np.exp(-step / 60))
        ce = 0.15 + shift + 0.9 * decay + 0.03 * float(rng.normal())
        mse = (
            (0.05 + shift / 10 + 0.1 * (1 - decay) + 0.004 * float(rng.normal()))
            if distils
            else 0.0
        )
        kd = 2 * decay if recipe.startswith("wise-kd-") else 0.0
        lines.append(
            {"step": step, "ce": ce, "mse": mse, "kd": kd, "loss": ce + 3 * mse + kd, "lr": 1e-4}
        )
        if step % 25 == 0:
            correct = int(400 * (0.95 - shift / 20 - 0.12 * decay) + rng.normal())
            lines.append({"step": step, "held_out_correct": correct, "held_out_total": 400})
    return lines


def make_gallery(
    path: Path,
    size: int = 48,
    patch: int = 8,
    batch: int = 6,
    frames: int = 0,
    **columns: np.ndarray,
) -> Path:
    """Write a gallery.npz of coloured blobs, with every mask x fill; `columns` replace its own.

    With frames, as many steps in which the heat of noise becomes that of the blob.
    """
    rng = np.random.default_rng(size)
    grid = size // patch
    y, x = np.mgrid[:size, :size] / size
    images, relevances = [], []
    for _ in range(batch):
        cx, cy, radius = *rng.uniform(0.35, 0.65, 2), rng.uniform(0.2, 0.3)
        stripes = 0.5 + 0.2 * np.sin(rng.uniform(15, 40) * (x * rng.normal() + y * rng.normal()))
        ground = stripes[..., None] * rng.uniform(0.3, 1, 3)
        blob = ((x - cx) ** 2 + (y - cy) ** 2 < radius**2)[..., None]
        picture = np.where(blob, rng.uniform(0.6, 1, 3), ground) + rng.normal(0, 0.02, (1, 1, 3))
        images.append((255 * picture.clip(0, 1)).astype(np.uint8).transpose(2, 0, 1))
        py, px = (np.mgrid[:grid, :grid] + 0.5) / grid
        heat = np.exp(-((px - cx) ** 2 + (py - cy) ** 2) / radius**2 * 1.5)
        relevances.append((heat / heat.max()).ravel())
    relevance = np.stack(relevances).astype(np.float32)
    masks = {
        "random": rng.random(relevance.shape) < 0.5,
        "context": relevance <= 0.5,
        "object": relevance > 0.4,
    }
    fills = {
        "none": np.full(relevance.shape, -1),
        "single": np.broadcast_to(np.roll(np.arange(batch), 1)[:, None], relevance.shape),
        "multi": rng.integers(0, batch, relevance.shape),
    }
    own = np.arange(batch)[:, None]
    arrays = {
        "images_BCHW": np.stack(images),
        "labels_B": np.arange(batch),
        "class_names": np.array([f"digit {n}" for n in range(batch)]),
        "relevance_BP": relevance,
        "patch": np.array(patch),
    }
    for name, method in MASKED.items():
        arrays[f"donor/{name}"] = np.where(masks[method.mask], fills[method.fill], own)
    if frames:
        noise = rng.random(relevance.shape).astype(np.float32)
        share_S11 = np.linspace(0, 1, frames, dtype=np.float32)[:, None, None]
        arrays["steps_S"] = 100 * np.arange(frames)
        arrays["relevance_SBP"] = (1 - share_S11) * noise + share_S11 * relevance
        arrays["masked_SBP"] = arrays["relevance_SBP"] > 0.4
    np.savez(path, **{**arrays, **columns})
    return path


def run_of(recipe: str, seed: int = 0, percent: tuple[float, ...] = (), total: int = 1000) -> Run:
    """A run in memory; `percent` in the order of TEST_SETS, shorter where sets are missing."""
    counts = {
        name: SetCount(
            correct=round(share * total / 100),
            total=total,
            manifest_sha256=files.sha256_bytes(name.encode()),
        )
        for name, share in zip(TEST_SETS, percent, strict=False)
    }
    return Run(
        path=Path(f"{recipe}-{seed}"),
        recipe=recipe,
        seed=seed,
        results=Results(step=0, checkpoint_sha256="0" * 64, sets=counts),
        config=RunConfig(recipe=recipe, seed=seed),
        provenance=Provenance(),
        metrics=(),
    )


def configured(run: Run, **config: Any) -> Run:
    """A run in memory with these entries of its config.json."""
    whole = {"recipe": run.recipe, "seed": run.seed, **config}
    found = documents.decode(json.dumps(whole).encode(), RunConfig, "config.json")
    return replace(run, config=replace(found, whole=whole))


def edit(path: Path, **changes: Any) -> None:
    """Change entries of a JSON file."""
    write(path, {**json.loads(path.read_text()), **changes})


def write(path: Path, document: Any) -> None:
    path.write_text(json.dumps(document))
