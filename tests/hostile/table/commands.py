"""Command lines that are certainly mistakes, one per command and kind of option."""

from collections.abc import Callable, Iterator, Sequence

from tests.hostile.rows import Answer, Row
from tests.hostile.world import (
    COUNT,
    DRY,
    EVALUATE,
    EXPORT,
    GREEDY,
    HUB,
    IMPORT,
    INDEX,
    LOCALISE,
    PACK,
    PREDICT,
    REPORT,
    SHOW,
    SOUP,
    VERIFY,
    WISE,
    Place,
)

NEW = tuple("packed" if word == "shards" else word for word in PACK)
FOREIGN = (*INDEX[:3], "new/test", *INDEX[4:])
PLAN = ("rft.experiments", "--runs", "r", "--data", "d")
IMAGENET = ("tools/shard_imagenet.py", "--source", "photos", "--out", "packed", "--workers", "1")
OOD = ("tools/shard_ood.py", "--benchmark", "imagenet-r", "--source", "photos", "--out", "packed")
DRAWN = ("--model.clip", "rft-miniature", "--dry-run")
CHOICE = ("--data", "shards", "--save", "choice.json", "--workers", "0", "--device", "cpu")
SET = ("tools/shard_set.py", "--name", "own", "--source", "photos", "--out", "packed")
DEMO = ("rft.demo", "--out", "world")
PUSHED = ("rft.convert", "export", "run", "--out", "x")
ENSEMBLE = ("rft.ensemble", "ose", "zero", "run", *COUNT, "--out", "m")
VRF = ("rft.ensemble", "vrf", *ENSEMBLE[2:])
NAMED = ("rft.merge", "rft.ensemble", "rft.convert")  # whose first word is a command of its own
OPTIONS: tuple[tuple[Sequence[str], str, str, str], ...] = (
    # command, option, value, expected words of the line
    (DRY, "--optim.lr", "nan", "lr"),
    (DRY, "--optim.lr", "inf", "lr"),
    (DRY, "--optim.lr", "-1", "lr"),
    (DRY, "--optim.lr", "1e999", "lr"),
    (DRY, "--optim.eps", "nan", "eps"),
    (DRY, "--optim.eps", "-1", "eps"),
    (DRY, "--optim.eps", "inf", "eps"),
    (DRY, "--optim.beta1", "nan", "beta1"),
    (DRY, "--optim.beta2", "2", "beta2"),
    (DRY, "--optim.weight-decay", "nan", "decay"),
    (DRY, "--optim.l2-sp", "nan", "l2"),
    (DRY, "--optim.l2-sp", "-1", "l2"),
    (DRY, "--optim.optimizer", "sgd", "optimizer"),
    (DRY, "--optim.spd", "0.5", "spd"),
    (DRY, "--optim.freeze", "nothing", "freeze"),
    (DRY, "--method.context-weight", "inf", "context"),
    (DRY, "--method.lipsum-weight", "-1", "lipsum"),
    (DRY, "--method.head-weight", "nan", "head"),
    (DRY, "--method.teacher-decay", "2", "decay"),
    (DRY, "--method.donor-choice", "like", "donor"),
    (DRY, "--loader.shots", "-1", "shots"),
    (DRY, "--loader.shots", "1000000", "shots"),
    (DRY, "--loader.augment", "crop", "augment"),
    (DRY, "--like", "gone.json", "gone"),
    (DRY, "--like", "/dev/zero", "/dev/zero|device"),
    (DRY, "--optim.weight-decay", "inf", "decay"),
    (DRY, "--optim.clip-norm", "nan", "clip"),
    (DRY, "--optim.clip-norm", "inf", "clip"),
    (DRY, "--optim.epochs", "-1", "epochs"),
    (DRY, "--optim.epochs", "1.5", "epochs"),
    (DRY, "--optim.warmup-steps", "-1", "warmup"),
    (DRY, "--method.threshold", "nan", "threshold"),
    (DRY, "--method.distill-weight", "nan", "distill"),
    (DRY, "--method.distill-weight", "inf", "distill"),
    (DRY, "--method.kd-temperature", "nan", "temperature"),
    (DRY, "--method.kd-temperature", "inf", "temperature"),
    (DRY, "--method.mask", "objct", "mask"),
    (DRY, "--loader.batch-size", "0", "batch"),
    (DRY, "--loader.held-out", "-1", "held"),
    (DRY, "--loader.cache-gb", "nan", "cache"),
    (DRY, "--loader.cache-gb", "inf", "cache"),
    (DRY, "--log.every-steps", "0", "every"),
    (DRY, "--log.keep", "0", "keep"),
    (DRY, "--cluster.timeout", "nan", "timeout"),
    (DRY, "--cluster.lock-wait", "inf", "lock"),
    (DRY, "--scale", "huge", "scale"),
    (DRY, "--precision", "fp8", "precision"),
    (DRY, "--device", "tpu", "device"),
    (DRY, "--device", "cuda", "cuda|gpu"),
    (DRY, "--train-set", "../train", "train-set"),
    (DRY, "--train-set", "", "train-set"),
    (DRY, "--model.clip", "no-such-model", "no-such-model"),
    (DRY, "--model.clip", "hf-hub:../../x", "hf-hub|x"),
    (DRY, "--model.start", "gone", "gone"),
    (DRY, "--log.wandb", "x", "wandb"),
    (DRY, "--no-such-option", "1", "no-such-option"),
    (EVALUATE, "--batch-size", "0", "batch"),
    (EVALUATE, "--batch-size", "-9", "batch"),
    (EVALUATE, "--batch-size", "x", "batch"),
    (EVALUATE, "--workers", "-1", "workers"),
    (EVALUATE, "--sets", "../x", "sets"),
    (EVALUATE, "--device", "gpu", "device"),
    (LOCALISE, "--thresholds", "nan", "thresholds"),
    (LOCALISE, "--thresholds", "-0.1", "thresholds"),
    (LOCALISE, "--samples", "-1", "samples"),
    (LOCALISE, "--samples", "9999", "samples"),
    (LOCALISE, "--classes", "some", "classes"),
    (LOCALISE, "--set", "/etc", "set"),
    (WISE, "--alpha", "nan", "alpha"),
    (WISE, "--alpha", "-0.5", "alpha"),
    (WISE, "--alpha", "1e999", "alpha"),
    (WISE, "--end-weights", "first", "end-weights"),
    (WISE, "--out", "s3://bucket/x", "--out"),
    (SOUP, "--out", "s3://bucket/x", "--out"),
    (GREEDY, "--out", "memory://x", "--out"),
    (GREEDY, "--batch-size", "0", "batch"),
    (REPORT, "--out", "s3://bucket/x", "--out"),
    (REPORT, "--out", "http://host/x", "--out"),
    (REPORT, "--out", "memory://x", "--out"),
    (REPORT, "--out", "", "--out"),
    (SHOW, "--step", "-1", "step"),
    (SHOW, "--epoch", "-1", "epoch"),
    (SHOW, "--world-size", "0", "world"),
    (SHOW, "--world-size", "3", "world"),
    (IMPORT, "--out", "s3://bucket/x", "--out"),
    (IMPORT, "--recipe", "", "recipe"),
    (IMPORT, "--recipe", "a\nb", "recipe"),
    (IMPORT, "--seed", "x", "seed"),
    (IMPORT, "--set", "../x", "set"),
    (EXPORT, "--out", "s3://bucket/x", "--out"),
    (EXPORT, "--to", "tflite", "to"),
    (EXPORT, "--text", "gone.pt", "gone"),
    (NEW, "--test-share", "nan", "share"),
    (NEW, "--test-share", "-1", "share"),
    (NEW, "--test-share", "1", "share"),
    (NEW, "--size", "0", "size"),
    (NEW, "--size", "-5", "size"),
    (NEW, "--shard-mb", "nan", "shard-mb"),
    (NEW, "--shard-mb", "inf", "shard-mb"),
    (NEW, "--shard-mb", "-1", "shard-mb"),
    (NEW, "--max-bad", "-1", "max-bad"),
    (NEW, "--task", "5/4", "task"),
    (NEW, "--task", "x", "task"),
    (NEW, "--task", "-1/4", "task"),
    (NEW, "--workers", "0", "workers"),
    (NEW, "--workers", "-1", "workers"),
    (NEW, "--quality", "101", "quality"),
    (NEW, "--encoding", "avif", "encoding"),
    (FOREIGN, "--crop-border", "-1", "crop.border"),
    (FOREIGN, "--crop-border", "-100000000", "crop.border"),
    (FOREIGN, "--crop-border", "9999", "border|side"),
    (FOREIGN, "--label-field", "gone", "json|gone"),
    (FOREIGN, "--labels-are", "colours", "labels-are"),
    (FOREIGN, "--local-classes", "gone.txt", "gone"),
    (FOREIGN, "--allow-count", "x", "allow-count"),
    (FOREIGN, "--allow-count", "test=-1", "allow-count"),
    (FOREIGN, "--workers", "0", "workers"),
    (FOREIGN, "--dataset", "objectnet", "mappings"),
    (VERIFY, "--workers", "0", "workers"),
    (VERIFY, "--report", "s3://", "s3|report"),
    (REPORT, "--max-pixels", "0", "pixels"),
    (REPORT, "--max-pixels", "nan", "pixels"),
    (PREDICT, "--top", "0", "top"),
    (PREDICT, "--max-pixels", "nan", "pixels"),
    (PREDICT, "--out", "s3://bucket/x", "--out"),
    (PREDICT, "--out", "photos", "a folder"),
    (PREDICT, "--html", "/dev/null", "/dev"),
    (PREDICT, "--html", "classes.json", r"classes\.json exists"),
    (IMAGENET, "--splits", "test", "splits"),
    (IMAGENET, "--allow-count", "imagenet-val=x", "allow-count"),
    (IMAGENET, "--size", "0", "size|found|train"),
    (OOD, "--allow-count", "imagenet-r=x", "allow-count"),
    (OOD, "--workers", "1", "imagenet-r|found|photos"),
    (PLAN, "--seeds", "0", "seeds"),
    (PLAN, "--seeds", "-1", "seeds"),
    (PLAN, "--epochs", "-1", "epochs"),
    (PLAN, "--only", "no-such-recipe", "no-such-recipe"),
    (PLAN, "--runs", "s3://bucket/runs", "--runs"),
    ((*PLAN, "--lines"), "--runs", "a\nb", "runs|line break|newline|control"),
    ((*PLAN, "--lines"), "--data", "a\nb", "data|line break|newline|control"),
    (SET, "--domains", "-1", "domains"),
    (SET, "--domains", "100", "domains"),
    (SET, "--domains", "3", "photos"),
    (SET, "--score", "best", "score"),
    (SET, "--allow-count", "0", "allow-count"),
    (DEMO, "--seeds", "0", "seeds"),
    (ENSEMBLE, "--alpha", "nan", "alpha"),
    (ENSEMBLE, "--alpha", "1.1", "alpha"),
    (VRF, "--scale", "0", "scale"),
    (VRF, "--centre", "nan", "centre"),
    (VRF, "--temperatures", "1", "temperatures"),
    (DEMO, "--processes", "0", "processes"),
    (DEMO, "--processes", "-3", "processes"),
    (DEMO, "--epochs", "-1", "epochs"),
    (DEMO, "--out", "s3://bucket/x", "--out|--runs"),
)
ALONE: tuple[tuple[Sequence[str], str], ...] = (
    (("rft.train", "no-such-recipe"), "no-such-recipe"),
    (("rft.train", "vanilla", "--data", "shards"), "run-dir"),
    (("rft.evaluate",), "checkpoints|data"),
    (("rft.evaluate", "--data", "shards"), "checkpoint|run"),
    (("rft.merge", "average"), "average"),
    (("rft.merge", "wise", "zero"), "END|out|argument"),
    (("rft.merge", "uniform-soup", "run", "--out", "m"), "two|models"),
    (("rft.merge", "uniform-soup", "run", "run", "--out", "m"), "run"),
    (("rft.merge", "model-stock", "zero", "run", "--out", "m"), "at least two"),
    (("rft.ensemble", "average"), "average"),
    (("rft.ensemble", "ose", "zero"), "FINE|out|data|argument"),
    (("rft.ensemble", "ose", "zero", "zero", *COUNT, "--out", "m"), "same weights"),
    (("rft.ensemble", "vrf", "gone", "run", *COUNT, "--out", "m"), "gone"),
    (("rft.ensemble", "dawin", "zero", "run", *COUNT, "--out", "run"), "run"),
    (("rft.report",), "out|run"),
    (("rft.report", "--out", "report"), "run"),
    (("rft.predict",), "RUN"),
    (("rft.predict", "run"), "image"),
    (("rft.predict", "gone", "photos"), "gone"),
    (("rft.predict", "clip", "photos"), "no classification head"),
    (("rft.predict", "run", "classes.json"), r"classes\.json is not a readable"),
    (("rft.predict", "run", "gone.jpg"), r"gone\.jpg cannot be read"),
    (("rft.predict", "run", "/dev/zero"), "a device, not a regular file"),
    (("rft.photos",), "name the folder of your photos"),
    (("rft.photos", "gone", *DRAWN), "gone"),
    (("rft.photos", "classes.json", *DRAWN), r"classes\.json"),
    (("rft.photos", "photos", "--example"), "leave photos out"),
    (("rft.photos", "photos", *DRAWN, "--test-share", "1.5"), "test-share"),
    (("rft.photos", "photos", *DRAWN, "--classes", "gone.json"), r"gone\.json"),
    (("rft.photos", "photos", "--out", "photos/made", "--model.clip", "rft-miniature"), "photos"),
    (("rft.photos", "photos", "--out", "s3://bucket/x"), "--out"),
    (("rft.photos", "photos", "--model.clip", "no-such-clip", "--dry-run"), "no-such-clip"),
    (("rft.merge.choose",), "RUN|data|save"),
    (("rft.merge.choose", "gone", *CHOICE), "gone"),
    (("rft.merge.choose", "clip", *CHOICE), "clip"),
    (("rft.merge.choose", "run", "zero", "--data", "gone", "--save", "x.json"), "gone"),
    (("rft.merge.choose", "run", *CHOICE, "--wise", "zero"), "wise|END"),
    (("rft.merge.choose", "run", "zero", *CHOICE, "--save", "/dev/zero"), "/dev/zero|device"),
    (("rft.convert", "turn"), "turn"),
    (("rft.convert", "import"), "file|out"),
    (("rft.convert", "import", "gone.pt", "--out", "x"), "gone"),
    (("rft.convert", "export", "gone", "--to", "released", "--out", "x.pt"), "gone"),
    (
        ("rft.convert", "export", "run", "--out", "x.pt", "--to", "released", "--push", "hf://a/b"),
        "--push uploads the folder",
    ),
    ((*PUSHED, "--to", "open-clip", "--push", "hf://datasets/a"), "hf://USER/NAME"),
    ((*PUSHED, "--to", "open-clip", "--push", "hf://a/../b"), "hf://USER/NAME"),
    ((*PUSHED, "--to", "open-clip", "--private"), "--push"),
    (("rft.data.show",), "run|step"),
    (("rft.data.show", "zero", "--step", "0", "--step"), "step"),
    (("rft.evaluate.localisation",), "checkpoints|data|masks"),
    (("tools/verify_shards.py",), "url"),
    (("tools/index_shards.py", "--out", "x"), "shards"),
    (("tools/shard_folder.py",), "source|out"),
    (("tools/shard_imagenet.py",), "source|out"),
    (("tools/shard_ood.py",), "benchmark|source|out"),
    (("tools/shard_set.py",), "name|source|out"),
    ((*SET, "--metadata", "gone.csv", "--split", "test"), r"gone\.csv"),
    ((*SET, "--metadata", "classes.json", "--split", "test"), r"classes\.json has"),
    ((*SET, "--metadata", "/dev/zero", "--split", "test"), "a device, not a regular file"),
    ((*SET, "--name", "../outside"), "--name"),
    ((*SET, "--name", "s3://bucket/x"), "--name"),
    (("tools/index_shards.py", "foreign/{0..1.tar", "--out", "x"), "brace"),
    (("tools/index_shards.py", "foreign/*.tar", "--out", "x"), r"\*"),
    (("tools/index_shards.py", "foreign/0.tar", "foreign/0.tar", "--out", "x"), "twice"),
    (("tools/index_shards.py", "", "--out", "x"), ""),
    (("rft.experiments",), "runs|data"),
    ((*PLAN, "--", "--data", "x"), "data"),
    ((*PLAN, "--lines", "--", "--model.clip", "a\nb"), "line break|newline|control|option"),
)


def launch(
    what: str,
    words: Sequence[str],
    *says: str,
    damage: Callable[[Place], object] = lambda _: None,
    answer: Answer = "refused",
) -> Row:
    return Row(
        kind="command line",
        what=f"launch: {what}",
        words=words,
        damage=damage,
        says=says,
        answer=answer,
        slow=True,
    )


def planted(place: Place) -> None:
    """A script that would be submitted for a kind with folders in its name."""
    (place / "x.sbatch").write_text("touch ran\n")
    (place / "launch/sub").mkdir()
    (place / "launch/sub/x.sbatch").write_text("touch ran\n")


def rows() -> Iterator[Row]:
    """Yield the rows of this kind."""
    for words, option, value, says in OPTIONS:
        shown = value.encode("unicode_escape").decode()
        yield Row(
            kind="command line",
            what=f"{words[0]} {words[1] if words[0] in NAMED else ''} {option} {shown}",
            words=(*words, option, value),
            says=[says],
            slow=words[0]
            in ("rft.train", "rft.evaluate.localisation", "rft.data.show", "rft.report"),
        )
    for words, says in ALONE:
        shown = " ".join(words).encode("unicode_escape").decode()
        yield Row(kind="command line", what=f"{shown} alone", words=words, says=[says])
    submit = ("launch/submit.sh", "--dry-run")
    yield launch("a kind that is a path", (*submit, "../x", "a"), "kind|job", damage=planted)
    yield launch("a kind in a folder", (*submit, "sub/x", "a"), "kind|job", damage=planted)
    yield launch("no kind", submit, "kind|job")
    yield launch("an unknown kind", (*submit, "dance"), "dance")
    yield launch("a kind that is an option", (*submit, "--", "train"), "kind|job|option|recipe")
    yield launch("a line break in a word", (*submit, "train", "vanilla\nsbatch"), answer="either")
    yield launch(
        "a plan with a line break",
        ("launch/reproduce.sh", "--dry-run", "--seeds", "1", "--", "--model.clip", "a\nb"),
        "line break|newline|control|option",
    )
    yield launch(
        "a plan that runs a command",
        ("launch/reproduce.sh", "--dry-run", "--seeds", "1", "--", "--model.clip", "$(touch ran)"),
        answer="accepted",
    )
    yield launch(
        "a plan of negative seeds", ("launch/reproduce.sh", "--dry-run", "--seeds", "-1"), "seeds"
    )
    yield launch("a training", (*submit, "train", "vanilla"), answer="accepted")
    yield Row(kind="command line", what="a plan as it is meant", words=PLAN, answer="accepted")
    yield Row(
        kind="command line",
        what="a dry run as it is meant",
        words=DRY,
        answer="accepted",
        slow=True,
    )
    yield Row(
        kind="command line",
        what="an import as it is meant",
        words=HUB,
        answer="accepted",
        slow=True,
    )
