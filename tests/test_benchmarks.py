"""The benchmarks compare like with like: the same images, the same pixels, everything counted."""

import dataclasses
import io
import json
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from open_clip import OPENAI_DATASET_MEAN as MEAN
from open_clip import OPENAI_DATASET_STD as STD
from PIL import Image
from torchvision.transforms import v2

from benchmarks import (
    contenders,
    environments,
    loader,
    machine,
    pack,
    photos,
    ratios,
    simd_difference,
)
from benchmarks import summary as pages
from rft.packing import encode
from rft.packing.pack import Options
from rft.packing.pack import pack as pack_set
from rft.shards.images import encoding_parameters
from rft.shards.manifest import Manifest

IMAGES = 20


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as prepared by benchmarks.loader, with twenty photographs."""
    root = tmp_path_factory.mktemp("work")
    labels = photos.write(root / "photos", IMAGES)
    for encoding in ("original", "pixels"):
        options = Options(encoding=encoding, shard_mb=0.5, workers=1)
        pack_set("imagenet-train", str(root / "photos"), str(root / encoding), labels, options)
    return root


def paths(work: Path) -> list[Path]:
    return sorted((work / "photos" / "train").glob("*/*.JPEG"))


def contender(name: str, work: Path) -> contenders.Arguments:
    return contenders.Arguments(name=name, work=work, workers=0, batch_size=5, seconds=0.01)


@pytest.mark.slow
def test_photographs_are_as_described(work):
    files = [path.read_bytes() for path in paths(work)]
    assert len(set(files)) == IMAGES
    assert all(80_000 <= len(data) <= 110_000 for data in files)
    sizes = Counter(Image.open(io.BytesIO(data)).size for data in files)
    assert set(sizes) == {(500, 375), (375, 500)}
    assert files[3] == photos.make(_number(paths(work)[3]), photos.originals())


def _number(path: Path) -> int:
    return int(path.stem.rsplit("_", 1)[1])


def test_photographs_of_another_number_are_refused(work):
    with pytest.raises(ValueError, match="has 20 images, not 30"):
        photos.write(work / "photos", 30)
    with pytest.raises(ValueError, match="at least 10"):
        photos.write(work / "few", 9)


def test_bare_crop_is_torchvisions(work):
    resize = v2.Compose(
        [v2.Resize(224, v2.InterpolationMode.BICUBIC), v2.CenterCrop(224), v2.PILToTensor()]
    )
    for path in paths(work):
        expected = resize(Image.open(path).convert("RGB"))
        assert np.array_equal(contenders.bare_crop(path.read_bytes()), expected.numpy())


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["memcpy", "rft_pixels", "webdataset_pixels", "bare", "rft_original", "webdataset"],
)
def test_contenders_deliver_the_same_pixels(work, name):
    expected = {contenders.bare_crop(path.read_bytes()).tobytes() for path in paths(work)}
    batches = contenders.CONTENDERS[name](contender(name, work))()
    seen = set()
    for _ in range(12):
        images = np.asarray(next(batches))
        assert images.shape == (5, 3, 224, 224)
        seen |= {image.tobytes() for image in images}
    batches.close()
    assert seen <= expected
    assert len(seen) > IMAGES / 2
    # rft reads every sample once per epoch; random draws do not
    assert not name.startswith("rft") or seen == expected


PASS = """
import sys
from pathlib import Path
import numpy as np
from benchmarks import contenders
name, work, out = sys.argv[1:]
arguments = contenders.Arguments(
    name=name, work=Path(work), workers=0, batch_size=5, seconds=0.1
)
batches = contenders.CONTENDERS[name](arguments)()
np.save(out, np.concatenate([np.asarray(next(batches)) for _ in range(8)]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "environment"),
    [
        ("open_clip", "open_clip"),
        ("mosaicml_streaming", "mosaicml-streaming"),
        ("litdata", "litdata"),
    ],
)
def test_peers_deliver_the_same_pixels(work, tmp_path, name, environment):
    if absence := environments.absence(environment):
        pytest.skip(f"{environment}: {absence}")
    result = subprocess.run(
        [sys.executable, "-c", PASS, name, str(work), str(tmp_path / "pass.npy")],
        env=environments.variables(environment),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    images = np.load(tmp_path / "pass.npy")
    if name == "open_clip":  # which normalises
        mean, std = (np.array(v, np.float32)[:, None, None] for v in (MEAN, STD))
        images = ((images * std + mean) * 255).round().astype(np.uint8)
    expected = {contenders.bare_crop(path.read_bytes()).tobytes() for path in paths(work)}
    seen = {image.tobytes() for image in images}
    assert seen <= expected
    assert len(seen) > IMAGES / 2


def test_a_rate_is_what_was_delivered_and_ends_the_pass(monkeypatch):
    assert contenders.cpu_seconds() > 0
    # it counts all processes of the session, and those of other tests end meanwhile
    monkeypatch.setattr(contenders, "cpu_seconds", iter([3.0, 5.0]).__next__)
    ended = []

    def start():
        try:
            while True:
                yield torch.zeros(5, 3, 224, 224, dtype=torch.uint8)
        finally:
            ended.append(True)

    found = contenders.rate(start, contender("none", Path()))
    assert found["images_per_second"] > 0
    assert found["cpus"] > 0
    assert ended == [True]


def test_an_epoch_that_ends_inside_a_measurement_is_an_error(monkeypatch):
    monkeypatch.setattr(contenders, "cpu_seconds", lambda: 0.0)
    few = [torch.zeros(5, 3, 224, 224, dtype=torch.uint8)] * 3
    few_batches = lambda: (batch for batch in few)  # noqa: E731 - as the contenders' are
    with pytest.raises(ValueError, match="an epoch of none ended inside the measurement"):
        contenders.rate(few_batches, dataclasses.replace(contender("none", Path()), seconds=60))


@pytest.mark.slow
def test_webdataset_reads_two_members_for_each_sample(work):
    contenders.CONTENDERS["webdataset"](contender("webdataset", work))
    contenders.CONTENDERS["webdataset_pixels"](contender("webdataset_pixels", work))
    for encoding, suffix in (("original", "jpg"), ("pixels", "npy")):
        names = []
        for path in (work / f"webdataset-{encoding}").glob("*.tar"):
            with tarfile.open(path) as tar:
                names += tar.getnames()
        assert Counter(name.rsplit(".", 1)[1] for name in names) == {suffix: IMAGES, "cls": IMAGES}


def arguments(**changes) -> loader.Arguments:
    return loader.Arguments(cpus=1, rounds=2, seconds=0.05, batch_size=5, **changes)


@pytest.mark.slow
@pytest.mark.program
def test_rounds_of_real_processes_and_one_that_cannot_run(work, monkeypatch):
    table = {
        "memcpy": loader.Run(contender="memcpy", workers=0),
        "two at once": loader.Run(contender="memcpy", workers=0, processes=2),
        "nobody": loader.Run(contender="nobody", workers=0),
        "elsewhere": loader.Run(contender="litdata", workers=0, environment="litdata"),
    }
    monkeypatch.setattr(loader, "runs", lambda cpus: table)
    monkeypatch.setattr(environments, "absence", lambda name: f"{name} is not installed")
    outcomes = loader.measure(arguments(), work)
    for name in ("memcpy", "two at once"):
        assert outcomes[name].absent is None
        assert len(outcomes[name].images_per_second) == 2
        assert outcomes[name].versions["numpy"] == np.__version__
    assert "unknown contender 'nobody'" in outcomes["nobody"].absent
    assert outcomes["elsewhere"].absent == "litdata is not installed"
    line = loader.row(table["nobody"], outcomes["nobody"])
    assert line["images_per_second"] is None
    assert "nobody" in line["reason"]


def test_ratios_of_the_loader():
    found = {name: loader.Outcome(absent="not there") for name in loader.runs(2)}
    for name, rates in {
        "memcpy": [100.0, 50.0],
        "rft pixels, no worker": [40.0, 40.0],
        "rft pixels, 2 workers": [70.0, 40.0],
        "webdataset npy + cls, 2 workers": [7.0, 5.0],
        "bare": [2.0, 1.0],
        "rft": [3.8, 1.8],
    }.items():
        found[name] = loader.Outcome(images_per_second=rates)
    # of the faster of two ways to read, each round by itself
    assert loader.figures(found, 2) == {
        "pixels_over_memcpy": {"median": 0.75, "lowest": 0.7, "highest": 0.8},
        "pixels_over_npy_cls": {"median": 9.0, "lowest": 8.0, "highest": 10.0},
        "jpeg_over_bare": {"median": 0.925, "lowest": 0.9, "highest": 0.95},
        "simd_over_pillow": None,
    }


def test_a_ratio_with_a_wide_range_has_no_middle():
    assert ratios.shown(ratios.of_rounds([3.0, 4.0, 4.4], [3.0, 3.0, 3.0])) == "1.33 (1.00 to 1.47)"
    assert ratios.shown(ratios.of_rounds([3.0, 4.0, 4.6], [3.0, 3.0, 3.0])) == "1.00 to 1.53"
    assert ratios.shown(ratios.of_rounds([], [1.0])) == "not measured"
    with pytest.raises(ValueError, match="longer"):
        ratios.of_rounds([1.0], [1.0, 2.0])


@pytest.mark.parametrize("changes", [{"rounds": 0}, {"seconds": 0}, {"cpus": 10**6}, {"cpus": 0}])
def test_options_of_the_loader_benchmark_are_checked(changes):
    with pytest.raises(ValueError, match="must be"):
        loader.Arguments(**changes)


@pytest.mark.slow
def test_two_tasks_pack_everything_and_shares_do_not_overlap(work, tmp_path):
    settings = pack.Arguments(images=IMAGES, processes=1, work=tmp_path)
    (tmp_path / str(IMAGES)).mkdir()
    (tmp_path / str(IMAGES) / "photos").symlink_to(work / "photos")
    labels = photos.label_space()
    (whole,) = pack.parts(settings, labels, "original")
    shares = [dataclasses.replace(whole, number=number, parts=2) for number in range(2)]
    assert sorted(shares[0].paths() + shares[1].paths()) == whole.paths() == paths(work)
    for encoding in pack.ENCODINGS:
        out = tmp_path / encoding
        for share in shares:
            pack.pack_part(dataclasses.replace(share, out=out, shard_mb=0.5), encoding)
        manifest = Manifest.load(str(out / "imagenet-train"))
        assert manifest.samples == IMAGES
        assert len(manifest.shards) > 1
    for share in shares:
        pack.copy_part(share)
    copied = {path.name: path.read_bytes() for path in whole.out.glob("*/*.JPEG")}
    assert copied == {path.name: path.read_bytes() for path in paths(work)}


def test_compressing_alone_gives_what_packing_stores(work):
    encoding = encoding_parameters("jpeg", 224, 0, Options().quality)
    for path in paths(work):
        data = path.read_bytes()
        stored = encode.encode(data, path.name, encoding).payload
        assert pack.compress(contenders.bare_crop(data)) == stored


def test_ratios_of_the_packer():
    seconds = {"copy_synced": [4.0, 8.0], "original": [2.0, 5.0]}
    seconds |= {"crop": [1.9, 1.9], "pixels": [2.0, 1.9], "compress": [3.0], "jpeg": [4.0]}
    assert pack.figures(seconds) == {
        "original_over_copy_synced": {"median": 1.8, "lowest": 1.6, "highest": 2.0},
        "pixels_over_bare": {"median": 0.975, "lowest": 0.95, "highest": 1.0},
        "jpeg_over_bare": {"median": 0.75, "lowest": 0.75, "highest": 0.75},
    }
    settings = pack.Arguments(images=100, processes=1)
    line = pack.row("copy_synced", [1.0, 2.0, 4.0], settings, mib=10.0)
    assert line["images_per_second"] == 50
    assert (line["lowest"], line["highest"]) == (25, 100)
    assert line["source_mib_per_second"] == 5


@pytest.mark.slow
@pytest.mark.program
def test_the_pack_benchmark_as_a_program(tmp_path):
    command = [sys.executable, "-m", "benchmarks.pack", "--images", "10", "--rounds", "1"]
    command += ["--processes", "1", "--work", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(result.stdout.splitlines()[-1])
    assert set(found["rows"]) == set(pack.WORK)
    assert all(found[name]["median"] > 0 for name in summary_ratios("pack"))
    assert not (tmp_path / "out").exists()


def summary_ratios(benchmark: str) -> list[str]:
    return list(pages.RATIOS[benchmark])


def test_an_environment_that_is_not_there_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(environments, "BUILD", tmp_path)
    assert environments.absence("litdata").startswith("not installed; python -m")
    (tmp_path / "litdata").mkdir()
    state = {"packages": ["litdata==0.1"], "failure": None}
    (tmp_path / "litdata" / "state.json").write_text(json.dumps(state))
    assert environments.absence("litdata").startswith("installed in other versions")
    state["packages"] = list(environments.PACKAGES["litdata"])
    (tmp_path / "litdata" / "state.json").write_text(json.dumps(state))
    assert environments.absence("litdata") is None
    first, second = environments.variables("litdata")["PYTHONPATH"].split(":")
    assert first == str(tmp_path / "litdata")
    assert second == str(environments.ROOT)


@pytest.mark.slow
def test_a_package_that_does_not_install_leaves_its_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(environments, "BUILD", tmp_path / "environments")
    # a requirement that pip refuses before it contacts an index
    packages = (f"nothing @ file://{tmp_path}/absent-1.0-py3-none-any.whl",)
    monkeypatch.setitem(environments.PACKAGES, "nothing", packages)
    environments.install("nothing")
    absence = environments.absence("nothing")
    assert absence.startswith("does not install: ERROR")
    assert "absent-1.0" in absence


def test_difference_of_two_image_cores():
    first = np.array([[0, 255, 10, 10]], dtype=np.uint8)
    second = np.array([[0, 0, 11, 10]], dtype=np.uint8)
    assert simd_difference.difference(first, second) == {
        "max_levels": 255,
        "share_differing": 0.5,
        "share_above_one_level": 0.25,
    }


def test_the_page_names_every_run_and_every_ratio():
    outcome = loader.Outcome(images_per_second=[1.0, 3.0, 2.0], cpus=[1.0])
    table = loader.runs(2)
    rows = {name: loader.row(run, outcome) for name, run in table.items()}
    rows["litdata"] = {"images_per_second": None, "reason": "not installed"}
    loaded = {"benchmark": "loader", "rows": rows, "cpus": 2, "images": 10, "rounds": 3}
    seven, nine = (dict.fromkeys(("median", "lowest", "highest"), value) for value in (0.7, 0.9))
    loaded |= {**machine.describe(), **dict.fromkeys(summary_ratios("loader"), seven)}
    loaded["simd_over_pillow"] = None
    settings = pack.Arguments(images=10, processes=1)
    lines = {name: pack.row(name, [1.0], settings, 1.0) for name in pack.WORK}
    packed = {**machine.describe(), "benchmark": "pack", "cpus": 1, "rows": lines}
    packed |= dict.fromkeys(summary_ratios("pack"), nine)
    simd = {"images": 5, "cores_compared": {"Pillow": "13.0.0", "Pillow-SIMD": "12.1.1.post0"}}
    simd |= machine.describe()
    simd["decoded_and_resized"] = {"max_levels": 1, "share_differing": 0.0036}
    page = pages.page(loaded, packed, simd)
    assert all(f"| {name} |" in page for name in table)
    assert "| rft | 2 (1 to 3) |" in page
    assert "| litdata | not installed |" in page
    assert page.count("| 0.70 (0.70 to 0.70) |") == len(summary_ratios("loader")) - 1
    assert page.count("| 0.90 (0.90 to 0.90) |") == len(summary_ratios("pack"))
    assert "| not measured |" in page
    assert "at most 1 of 255 grey levels, in 0.36% of the values of 5 images" in page
    assert "- packing: commit " in page
    assert "Not of the same code" not in page
    changed = {**packed, "code": {**packed["code"], "sha256": "0" * 64}}
    assert "**Not of the same code**: rft changed" in pages.page(loaded, changed, simd)
    with pytest.raises(ValueError, match="different machines"):
        pages.page(loaded, {**packed, "processor": "another"}, simd)


def test_the_saved_page_is_made_of_the_saved_results():
    if not pages.PAGE.exists():
        pytest.skip("nothing was saved: make bench")
    assert pages.PAGE.read_text() == pages.text()
