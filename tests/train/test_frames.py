"""A gallery's frames: which steps, of which weights, after a stop, at no cost to the run."""

import os
import signal

import numpy as np
import pytest
import torch

from rft.clip.classifier import build_classifier, load_state
from rft.evaluate.measure_cam import label_map
from rft.runs.filenames import FRAMES, GALLERY, LAST
from rft.runs.gallery_file import read
from rft.train import loop, select
from rft.train.pictures import frame_steps
from tests.tiny import complaints, weights
from tests.train.test_stop import at_step


def test_the_steps_are_the_start_and_ends_of_epochs():
    assert frame_steps(3, 10) == [0, 10, 20, 30]
    assert frame_steps(0, 10) == [0]
    assert frame_steps(16, 5) == list(range(0, 81, 10))
    for epochs in range(9, 100):
        steps = np.array(frame_steps(epochs, 1))
        assert (len(steps), steps[0], steps[-1]) == (9, 0, epochs)
        assert np.diff(steps).min() >= epochs // 8


@pytest.mark.slow
def test_each_frame_is_of_the_weights_after_its_step(three_epochs):
    run = three_epochs("run", "--log.keep", 100)
    gallery = read(run / GALLERY)
    assert not (run / FRAMES).exists()
    assert gallery.frames.steps_S.tolist() == [0, 10, 20, 30]
    threshold = 0.3
    assert (gallery.frames.masked_SBP == (gallery.frames.relevance_SBP > threshold)).all()
    assert gallery.frames.masked_SBP.any()
    with np.load(run / GALLERY) as arrays:
        images_BCHW = torch.from_numpy(arrays["images_BCHW"])
        labels_B = torch.from_numpy(arrays["labels_B"])
    architecture = load_state(run / LAST).architecture
    for step, relevance_BP in zip(
        gallery.frames.steps_S, gallery.frames.relevance_SBP, strict=True
    ):
        if step:
            content = torch.load(run / f"checkpoints/step-{step:08d}.pt", weights_only=True)
            model = build_classifier(content["model"], architecture)
            expected = label_map(model, images_BCHW, labels_B, "relevance")
            np.testing.assert_allclose(relevance_BP, expected, rtol=1e-4, atol=1e-5)
    # the first shows the start, with which a run without steps ends
    start = read(three_epochs("start", "--optim.epochs", 0) / GALLERY)
    assert start.frames.steps_S.tolist() == [0]
    np.testing.assert_array_equal(start.frames.relevance_SBP[0], gallery.frames.relevance_SBP[0])
    np.testing.assert_allclose(start.relevance_BP, start.frames.relevance_SBP[0], rtol=1e-4)


@pytest.mark.slow
def test_a_resumed_run_has_the_frames_of_an_undisturbed_one(
    three_epochs, tmp_path, monkeypatch, capsys
):
    calm, run = three_epochs("calm"), tmp_path / "run"
    # between two frames
    with monkeypatch.context() as patch:
        at_step(14, patch, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit):
            three_epochs()
    assert not (run / GALLERY).exists()
    three_epochs()
    assert (run / GALLERY).read_bytes() == (calm / GALLERY).read_bytes()
    # finished twice, from the last checkpoint: the frames are only in the gallery
    (run / "training.json").unlink()
    three_epochs()
    assert (run / GALLERY).read_bytes() == (calm / GALLERY).read_bytes()
    # damaged frames are lost, but not the run
    (run / "training.json").unlink()
    (run / FRAMES).write_bytes(b"damaged")
    capsys.readouterr()
    three_epochs()
    (line,) = complaints(capsys.readouterr().err)
    assert "no pictures of the steps before 30" in line
    assert f"{run / FRAMES} has no frames of this run: not a readable .npz" in line
    assert read(run / GALLERY).frames.steps_S.tolist() == [30]
    assert weights(run) == weights(calm)


@pytest.mark.slow
def test_frames_change_nothing_of_the_training(three_epochs, monkeypatch):
    whole, kept = loop.keep_frame, []

    def watching(job, step):
        seen = [torch.get_rng_state(), job.student.training, torch.is_grad_enabled()]
        whole(job, step)
        after = [torch.get_rng_state(), job.student.training, torch.is_grad_enabled()]
        assert torch.equal(seen[0], after[0])
        assert seen[1:] == after[1:]
        kept.append(step)

    for module in (loop, select):
        monkeypatch.setattr(module, "keep_frame", watching)
    watched = three_epochs("watched")
    assert kept == [0, 10, 20, 30]
    for module in (loop, select):
        monkeypatch.setattr(module, "keep_frame", lambda job, step: None)
    without = three_epochs("without")
    assert weights(watched) == weights(without)
    assert read(without / GALLERY).frames is None


@pytest.mark.slow
def test_where_chance_masks_there_are_maps_alone(train):
    run = train("random-mask-single-fill", "--loader.held-out", 16)
    frames = read(run / GALLERY).frames
    assert frames.steps_S.tolist() == [0, 10]
    assert frames.masked_SBP is None


@pytest.mark.slow
def test_the_maps_are_of_the_runs_own_kind(three_epochs):
    options = ("--method.cam", "grad-cam", "--optim.epochs", 0)
    chefer, grad_cam = three_epochs("chefer", *options[2:]), three_epochs("cam", *options)
    maps = [read(run / GALLERY).frames.relevance_SBP for run in (chefer, grad_cam)]
    assert not np.allclose(*maps)


@pytest.mark.slow
def test_recomputed_layers_give_the_same_frames(three_epochs):
    options = ("--optim.epochs", 0)
    kept, recomputed = three_epochs("kept", *options), three_epochs("re", *options, "--recompute")
    assert (kept / GALLERY).read_bytes() == (recomputed / GALLERY).read_bytes()
