"""What the scripts of launch/ submit, copy and refuse, without a cluster."""

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from rft.experiments import Study, experiments
from tests.launch.conftest import ROOT, SETTINGS, Project, environment
from tests.storage.test_urls import WITH_SECRET

pytestmark = pytest.mark.slow  # together

GPUS = """
GPUS_PER_NODE=8 CPUS_PER_NODE=64
SBATCH_OPTIONS=(--account='a b') CPU_OPTIONS=(--account=cpu)
"""


def dry(project: Project, *words: str) -> list[str]:
    """The words of the sbatch line that a submission would be."""
    result = project.launch("submit.sh", "--dry-run", *words)
    assert result.returncode == 0, result.stderr
    assert not project.runs.exists()
    return shlex.split(result.stdout)


def bash(project: Project, script: str) -> str:
    """Run a script with the functions of job.sh; return its output."""
    lines = f"set -euo pipefail\nsource launch/job.sh\n{script}"
    result = subprocess.run(
        ["bash", "-c", lines],
        cwd=project.folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize(
    ("words", "options", "arguments"),
    [
        (
            ("--nodes=4", "--time=1:00:00", "train", "vanilla", "--seed", "3"),
            ["--gpus-per-node=8", "--cpus-per-task=64", "--nodes=4", "--time=1:00:00"],
            ["launch/train.sbatch", "vanilla", "--seed", "3"],
        ),
        (
            ("sweep", "--optim.lr", "1e-5"),
            ["--gpus-per-node=8", "--cpus-per-task=64"],
            ["launch/sweep.sbatch", "--optim.lr", "1e-5"],
        ),
        (
            ("evaluate", "some run", "other"),
            ["--gpus-per-node=8", "--cpus-per-task=64"],
            ["launch/evaluate.sbatch", "some run", "other"],
        ),
        (
            ("--array=0-3", "shard", "ood", "--encoding", "pixels"),
            ["--cpus-per-task=8", "--array=0-3"],
            ["launch/shard.sbatch", "ood", "--encoding", "pixels"],
        ),
        (
            ("command", "python", "-m", "rft.merge"),
            ["--cpus-per-task=8"],
            ["launch/command.sbatch", "python", "-m", "rft.merge"],
        ),
        (
            ("command", "torchrun", "-m", "rft.merge"),
            ["--gpus-per-node=8", "--cpus-per-task=64"],
            ["launch/command.sbatch", "torchrun", "-m", "rft.merge"],
        ),
    ],
)
def test_what_is_submitted(project, words, options, arguments):
    project.write_settings(GPUS)
    command, *line = dry(project, *words)
    script = line.index(arguments[0])
    assert command == "sbatch"
    assert line[script:] == arguments
    given = line[:script]
    assert f"--chdir={project.folder}" in given
    gpus = options[0].startswith("--gpus")
    assert ("--account=a b" if gpus else "--account=cpu") in given
    assert set(options) <= set(given)
    assert any(option.startswith("--gpus") for option in given) == gpus
    # without a time a job gets the partition's, which may be minutes
    timed = "#SBATCH --time=" in (ROOT / arguments[0]).read_text()
    assert timed or any(option.startswith("--time=") for option in given)
    # what was asked for comes last, where it counts
    asked = list(words[: words.index(arguments[0][7:-7])])
    assert given[len(given) - len(asked) :] == asked


@pytest.mark.parametrize(
    ("words", "folder"),
    [
        (("vanilla",), "runs/vanilla-seed0"),
        (("vanilla", "--seed=2"), "runs/vanilla-seed2"),
        (("vanilla", "--run-dir", "here/mine"), "here/mine"),
        (("vanilla", "--run_dir=here/mine", "--seed", "1"), "here/mine"),
        (("vanilla", "--run", "mine"), "mine"),
    ],
)
def test_the_run_folder_is_that_of_the_training(project, words, folder):
    project.write_settings()
    (output,) = [word for word in dry(project, "train", *words) if word.startswith("--output=")]
    assert output == f"--output={project.folder / folder}/job-%j.log"


HARMLESS = [
    *("a@b", "--data=s3://b/a@b", "/a?sig=1", "s3://b/{00..11}.tar", "file:///data/a@b"),
    *("abfs://c@a.dfs.core.windows.net/x", "az://c@a/x", "http://h:8080/a@b", "https://h/a%20b"),
    *(
        "https://h/x?download=true&id=3",
        "gs://b/x?versionId=sig",
        "http://[0:0:0:0:0:0:0:1]:8/x",
        "https://h/a;b/c",
    ),
]


def test_what_rft_refuses_as_a_credential_the_scripts_refuse(project):
    """The scripts are stricter, so a new secret name in rft/storage/urls.py is refused here too."""
    words = shlex.join([*WITH_SECRET, *HARMLESS])
    script = f'for word in {words}; do (refuse_credentials "$word") 2>&- || echo "$word"; done'
    assert bash(project, script).splitlines() == WITH_SECRET


@pytest.mark.parametrize(
    "url",
    [
        *("https://u:canary@h/x", "https://canary@h/x", "s3://k:can/ary@b", "az://c:canary@a/x"),
        *("https://h/x?a=1&X-Amz-Signature=canary", "https://h/x#SAS=canary"),
    ],
)
def test_no_script_prints_a_credential(project, url):
    project.write_settings()
    for words in (("train", "vanilla", "--data", url), ("evaluate", "x", f"--data={url}")):
        result = project.launch("submit.sh", *words)
        assert result.returncode == 2
        assert "and would be printed and recorded" in result.stderr
        assert "canary" not in result.stdout + result.stderr
    project.write_settings(f"DATA={shlex.quote(url)}")
    assert project.launch("submit.sh", "--dry-run", "train", "vanilla").returncode == 2
    assert not project.runs.exists()


def test_urls_that_hold_none(project):
    project.write_settings()
    for url in ("s3://b/a@b", "http://h:80/x@y", "abfs://c@a.dfs.core.windows.net/x?versionid=1"):
        assert url in dry(project, "train", "vanilla", "--data", url)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "unknown job (none given); choose train, sweep, shard, evaluate or command"),
        (("-p", "gpu", "train"), "unknown job gpu after -p; choose"),
        (("../other/train", "vanilla"), "unknown job ../other/train; choose"),
        (("train",), "name a recipe to train"),
        (("train", "--seed", "1", "vanilla"), "name a recipe to train"),
        (("train", "vanila"), "unknown recipe 'vanila'; did you mean 'vanilla'?"),
        (("train", "wise-ft"), "wise-ft is not trained but merged"),
        (("train", "vanilla", "--seed", "x"), "--seed must be a number"),
        (("train", "vanilla", "--seed"), "--seed must be a number"),
        (("train", "vanilla", "--run-dir"), "--run-dir must be a local folder"),
        (("train", "vanilla", "--run", "s3://bucket/x"), "--run-dir must be a local folder"),
        (("train", "vanilla", "--nodes=2"), "--nodes comes before the kind of job: launch/submit"),
        (("train", "vanilla", "--dry-run"), "--dry-run comes before the kind of job"),
        (("evaluate", "run", "--time", "1"), "--time comes before the kind of job"),
        (("shard", "--array=0-1", "imagenet"), "--array comes before the kind of job"),
        (("command", "--time=5", "python"), "--time comes before the kind of job"),
        (("--array=0-2", "train", "vanilla"), "--array would run the same train several times"),
        (("-a0-2", "evaluate", "run"), "--array would run the same evaluate several times"),
        (("--array=1-2", "command", "python"), "--array would run the same command several"),
        (("--array=1-2", "shard", "imagenet"), "--array of shard must be 0-N"),
        (("--array=0,2", "shard", "ood"), "--array of shard must be 0-N"),
        (("train", "zero-shot", "--seed", "0", "1"), "1 is neither an option nor the value of one"),
        (("train", "vanilla", "more"), "more is neither an option nor the value of one"),
        (
            ("sweep", "vanilla"),
            "a sweep takes no recipe, it trains nine; for one: launch/submit.sh",
        ),
        (("sweep", "--optim.lr=1", "2"), "2 is neither an option nor the value of one"),
        (("shard", "imagenet-r"), "choose what to pack: imagenet or ood"),
        (("sweep", "--seed", "1"), "a sweep sets the run folder and the seed of each task"),
        (("evaluate",), "name at least one run"),
        (("command", "rm"), "the command must start with python or torchrun"),
    ],
)
def test_mistakes_are_one_line(project, words, message):
    project.write_settings()
    result = project.launch("submit.sh", *words)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: {message}")


@pytest.mark.parametrize("script", ["submit.sh", "reproduce.sh"])
def test_without_settings_they_say_how_to_make_them(project, script):
    result = project.launch(script, *(["train", "vanilla"] if script == "submit.sh" else []))
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert "copy launch/cluster.env.example to launch/cluster.env and edit it" in line


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("TIME=", "TIME must be the time limit"),
        ("TIME=30mins", "TIME must be the time limit"),
        ("TIME=1-", "TIME must be the time limit"),
        ("unset TIME", "TIME must be the time limit"),
        ("GPUS_PER_NODE=two", "GPUS_PER_NODE must be a number"),
        ("CPUS_PER_NODE=08", "CPUS_PER_NODE must be a number of at least 1"),
        ("PROCESSES_PER_NODE=0", "PROCESSES_PER_NODE must be the number of ranks per node"),
        ("DATA=", "DATA must be an absolute path or a URL"),
        ("unset DATA", "DATA must be an absolute path or a URL"),
        ("DATA=shards", "DATA must be an absolute path or a URL"),
        ("RUNS=", "RUNS must be an absolute path"),
        ("RUNS=s3://bucket/runs", "RUNS must be an absolute path"),
        ("unset SBATCH_OPTIONS; SBATCH_OPTIONS=--partition=a", "SBATCH_OPTIONS must be an array"),
        ("unset TRAIN_OPTIONS; TRAIN_OPTIONS='--precision fp32'", "TRAIN_OPTIONS must be an array"),
        ("unset CPU_OPTIONS", "CPU_OPTIONS must be an array"),
        # local to the function that reads the file
        ("unset CPU_OPTIONS; declare -a CPU_OPTIONS=(--qos=a)", "CPU_OPTIONS must be an array"),
        ("TRAIN_OPTIONS=('--precision fp32')", "TRAIN_OPTIONS has an option and its value in one"),
        ("unset -f setup", "the function setup is missing"),
    ],
)
def test_a_wrong_setting_is_named(project, setting, says):
    project.write_settings(setting)
    for script, words in (("submit.sh", ["train", "vanilla"]), ("reproduce.sh", ["--dry-run"])):
        result = project.launch(script, *words)
        assert result.returncode == 2
        (line,) = result.stderr.splitlines()
        assert line.startswith(f"error: launch/cluster.env: {says}")
    assert not project.runs.exists()


@pytest.mark.parametrize(
    "setting",
    [
        *("TIME=30", "TIME=1:30", "TIME=24:00:00", "TIME=2-12", "TIME=2-12:30:00"),
        "GPUS_PER_NODE=a100:8",
        "DATA=s3://bucket/rft",
        "SBATCH_OPTIONS=(-p gpu --comment='two words' '--account=a b')",
    ],
)
def test_a_right_setting_is_accepted(project, setting):
    project.write_settings(setting)
    dry(project, "train", "vanilla")


def test_an_option_with_several_values_and_one_without(project):
    project.write_settings()
    words = ["--profile", "--optim.freeze", "visual.conv1*", "visual.proj", "--seed=1"]
    assert dry(project, "train", "vanilla", *words)[-5:] == words


def test_the_images_to_pack_are_named(project):
    project.write_settings("OOD=")
    result = project.launch("submit.sh", "shard", "ood")
    assert result.returncode == 2
    assert result.stderr == "error: launch/cluster.env: OOD must be the folder of the images\n"
    dry(project, "shard", "ood", "--source", "world")


@pytest.mark.usefixtures("sbatch")
@pytest.mark.parametrize("kind", [["train"], ["sweep"], ["shard"], ["evaluate"]])
def test_help_and_dry_run_may_follow_the_kind(project, kind):
    for word in ("--help", "-h"):
        assert project.launch("submit.sh", *kind, word).stdout.startswith("usage: ")
    project.write_settings()
    words = {"train": ["vanilla"], "shard": ["ood"], "evaluate": ["run"]}.get(kind[0], [])
    result = project.launch("submit.sh", *kind, "--dry-run", *words)
    assert result.stdout.startswith("sbatch --chdir=")
    assert not project.runs.exists()


def test_a_job_that_sbatch_refuses_leaves_nothing(project, sbatch):
    project.write_settings()
    accept, refuse = sbatch.read_text(), "#!/bin/sh\necho no such partition >&2\nexit 1\n"
    sbatch.write_text(refuse)
    run = project.runs / "vanilla-seed0"
    result = project.launch("submit.sh", "train", "vanilla")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.splitlines() == [
        "no such partition",
        f"error: sbatch failed, no job was submitted; {run} is unchanged",
    ]
    # with the folders above it
    assert not project.runs.exists()
    # nor does it change a run that exists
    sbatch.write_text(accept)
    assert project.launch("submit.sh", "train", "vanilla").returncode == 0
    sbatch.write_text(refuse)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert project.launch("submit.sh", "--partition=wrong", "train", "vanilla").returncode == 2
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_each_job_has_its_own_resubmission(project, sbatch):
    """A later submission, even one that cannot work, leaves the running job's script as it was."""
    project.write_settings()
    run = project.runs / "vanilla-seed0"
    numbers = sbatch.with_name("numbers")
    sbatch.write_text(
        f"#!/bin/sh\necho >>{numbers}\n"
        f"printf '%s\\n' \"$@\" >{sbatch.parent}/words-$(wc -l <{numbers})\nwc -l <{numbers}\n"
    )
    words = ("--nodes=2", "--dependency=afterok:7", "train", "vanilla", "--optim.lr", "1e-5")
    result = project.launch("submit.sh", *words)
    assert result.stderr == f"submitted train as job 1; log: {run}/job-1.log\n"
    assert result.stdout == "1\n"
    first = (run / "resubmit-1.sh").read_text()
    project.launch("submit.sh", "train", "vanilla", "--sed", "1")
    project.launch("submit.sh", "train", "vanilla", "--data", "/nope")
    assert (run / "resubmit-1.sh").read_text() == first
    assert (run / "resubmit-3.sh").read_text().endswith(" -- vanilla --data /nope\n")
    again = subprocess.run([run / "resubmit-1.sh", "--time=5"], capture_output=True, text=True)
    assert again.stderr == f"submitted train as job 4; log: {run}/job-4.log\n"
    assert again.stdout == "4\n"
    # the jobs to wait for may be gone
    sent = [(sbatch.parent / f"words-{number}").read_text().splitlines() for number in (1, 4)]
    sent[0].remove("--dependency=afterok:7")
    sent[1].remove("--time=5")
    assert sent[0] == sent[1]
    # with the options that were added
    third = subprocess.run([run / "resubmit-4.sh"], capture_output=True, text=True)
    assert third.returncode == 0, third.stderr
    assert "--time=5" in (sbatch.parent / "words-5").read_text().splitlines()


def test_other_jobs_of_the_run_are_named(project, sbatch):
    project.write_settings()
    run = project.runs / "vanilla-seed0"
    squeue = sbatch.with_name("squeue")
    lines = "".join(f"echo {n} {run}{more}/job-{n}.log\n" for n, more in ((7, 1), (8, ""), (9, "")))
    squeue.write_text(f"#!/bin/sh\n{lines}")
    squeue.chmod(0o755)
    result = project.launch("submit.sh", "train", "vanilla")
    assert result.returncode == 0
    warning = f"warning: {run} already has jobs waiting or running: 8 9\n"
    assert warning in result.stderr
    again = subprocess.run([run / "resubmit-123.sh"], capture_output=True, text=True)
    assert again.stderr.startswith(warning)


def test_an_evaluation_of_a_missing_run_is_warned_of(project):
    project.write_settings()
    (project.folder / "here").mkdir()
    words = ("evaluate", "here", "absent", "--data", "none")
    result = project.launch("submit.sh", "--dry-run", *words)
    assert result.returncode == 0
    (line,) = result.stderr.splitlines()
    assert line.startswith("warning: absent does not exist; the job fails unless it does when")
    result = project.launch("submit.sh", "--dry-run", "--dependency=afterok:1", *words)
    assert result.stderr == ""


def test_a_setup_that_fails_is_named(project):
    project.write_settings("setup() { false; }")
    # in a bash of its own: `||` would turn off its -e
    job = "bash -euc 'source launch/job.sh; begin; echo began'"
    said = bash(project, f"export SLURM_JOB_ID=5; {job} 2>&1 || echo failed")
    header, *rest = said.splitlines()
    assert header.endswith("job 5, attempt 0")
    assert rest == ["error: setup in launch/cluster.env failed", "failed"]


def test_the_example_has_every_setting(project):
    names = re.compile(r"^(\w+)(?:=|\(\))", re.MULTILINE)
    example = (ROOT / "launch" / "cluster.env.example").read_text()
    assert set(names.findall(example)) == set(names.findall(SETTINGS))


def copied(project: Project, place: Path) -> set[str]:
    """Copy the project's code; the files that are there then."""
    bash(project, f"snapshot . {shlex.quote(str(place))}")
    return {str(path.relative_to(place)) for path in place.rglob("*") if path.is_file()}


def test_the_code_is_copied_as_it_is(project, tmp_path):
    project.write_settings()
    # as editors leave them
    for name in ("cluster.env~", ".cluster.env.swp", "cluster.env.bak"):
        (project.folder / "launch" / name).write_text("export AWS_SECRET_ACCESS_KEY=...")
    plain = copied(project, tmp_path / "plain")
    wanted = {"rft/train/command.py", "rft/demo/clip/open_clip_model.safetensors"}
    assert wanted | {"tools/shard_ood.py", "launch/job.sh", "REVISION"} <= plain
    assert "launch/cluster.env.example" in plain
    assert not [name for name in plain - {"launch/cluster.env.example"} if "cluster.env" in name]
    # the same from a repository, with what is new, changed or deleted in it
    git = ("git", "-c", "user.name=n", "-c", "user.email=e", "-C", str(project.folder))
    (project.folder / ".gitignore").write_text("*.log\n")
    for command in (("init", "-q"), ("add", "rft", "launch/job.sh"), ("commit", "-qm", "first")):
        subprocess.run([*git, *command], check=True)
    code = project.folder / "rft"
    (code / "new file.py").write_text("")
    (code / "of a run.log").write_text("")
    (code / "cli.py").write_text("changed")
    (code / "rng.py").unlink()
    tracked = copied(project, tmp_path / "tracked")
    assert tracked == plain - {"rft/rng.py"} | {"rft/new file.py"}
    assert (tmp_path / "tracked" / "rft" / "cli.py").read_text() == "changed"
    assert (tmp_path / "plain" / "REVISION").read_text() == "unknown\n"
    assert re.fullmatch(r"[0-9a-f]{12}-dirty\n", (tmp_path / "tracked" / "REVISION").read_text())
    # neither a file that was left behind in the repository nor a folder inside it has its commit
    (project.folder / "REVISION").write_text("older\n")
    said = bash(project, f"revision .; revision rft; revision {tmp_path / 'tracked'}").split()
    assert said == [said[2], "unknown", said[2]]
    # a copy of the copy, as the tasks of a sweep make
    bash(project, f"snapshot {tmp_path / 'tracked'} {tmp_path / 'again'}")
    again = {p.relative_to(tmp_path / "again") for p in (tmp_path / "again").rglob("*.*")}
    assert {str(path) for path in again} == {name for name in tracked if "." in name}


def test_a_run_keeps_the_code_it_began_with(project, tmp_path):
    project.write_settings()
    place = tmp_path / "code"
    (project.folder / "REVISION").write_text("older\n")
    copied(project, place)
    (project.folder / "REVISION").write_text("newer\n")
    (project.folder / "rft" / "cli.py").write_text("changed")
    # as left by a job
    (place / "rft" / "__pycache__").mkdir()
    (place / "rft" / "__pycache__" / "cli.cpython-311.pyc").write_text("")
    said = bash(project, f"snapshot . {place} 2>&1")
    assert f"resumes with the code in {place} (older)" in said
    assert (place / "rft" / "cli.py").read_text() != "changed"
    # a different user could have written it, and Python would run it in place of the source
    assert not (place / "rft" / "__pycache__").exists()
    # a copy of a copy is known without a record, as in the tasks of a sweep
    shutil.rmtree(tmp_path / "state")
    shutil.copytree(place, tmp_path / "sweep")
    bash(project, f"snapshot {tmp_path / 'sweep'} {place}")


def link_to(name: str) -> Callable[[Path, Path], None]:
    """A function that replaces NAME in the code by a link to a file outside."""

    def make(code: Path, outside: Path) -> None:
        (code / name).unlink(missing_ok=True)
        (code / name).symlink_to(outside)

    return make


def fifo(code: Path, _: Path) -> None:
    (code / "REVISION").unlink()
    os.mkfifo(code / "REVISION")


def repository(code: Path, _: Path) -> None:
    """A checkout whose git settings run a program when git reads it."""
    subprocess.run(["git", "init", "-q", code], check=True)
    hook = f"touch {shlex.quote(str(code.parent / 'ran'))}"
    subprocess.run(["git", "-C", code, "config", "core.fsmonitor", hook], check=True)


def given_away(code: Path, _: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    os.chown(code / "pyproject.toml", 12345, -1)


def replaced_by_link(code: Path, _: Path) -> None:
    code.rename(code.with_name("moved"))
    code.symlink_to("moved")


def large(code: Path, _: Path) -> None:
    with (code / "large").open("wb") as stream:
        stream.truncate(2**43)  # a hole, which takes hours to read


def dangling(code: Path, outside: Path) -> None:
    shutil.rmtree(code)
    code.symlink_to(outside.parent / "absent")


@pytest.mark.parametrize(
    "damage",
    [
        lambda code, _: (code / "rft" / "cli.py").write_text("print('mine')"),
        lambda code, _: (code / "torch.py").write_text("print('mine')"),
        lambda code, _: (code / "rft" / "rng.pyc").write_text(""),
        lambda code, _: (code / "REVISION").write_text("\033[2J\033]0;owned\007v1"),
        pytest.param(large, marks=pytest.mark.slow),
        link_to("REVISION"),
        link_to("pyproject.toml"),
        fifo,
        repository,
        given_away,
        replaced_by_link,
        dangling,
    ],
)
def test_code_that_was_not_copied_by_this_user_is_refused(project, tmp_path, damage):
    """The job would run it. The scripts neither print, run nor wait for any part of it."""
    project.write_settings()
    run = tmp_path / "run"
    outside = tmp_path / "outside"
    outside.write_text("precious")
    copied(project, run / "code")
    damage(run / "code", outside)
    before = sorted(path.name for path in run.iterdir())
    result = project.launch("submit.sh", "train", "vanilla", "--run-dir", run)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: the code in {run}/code was not copied there by your launch/")
    assert line.isprintable()
    assert sorted(path.name for path in run.iterdir()) == before
    assert outside.read_text() == "precious"


@pytest.fixture
def sbatch(tmp_path, monkeypatch) -> Path:
    """An sbatch that accepts every job and starts none."""
    program = tmp_path / "bin" / "sbatch"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho 123\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    return program


@pytest.mark.parametrize("kind", ["file", "folder", "absent"])
@pytest.mark.usefixtures("sbatch")
def test_a_submission_follows_no_link_of_the_run_folder(project, tmp_path, kind):
    project.write_settings()
    run, outside = tmp_path / "run", tmp_path / "outside"
    run.mkdir()
    if kind == "file":
        outside.write_text("precious")
    elif kind == "folder":
        outside.mkdir()
    (run / "resubmit-123.sh").symlink_to(outside)
    result = project.launch("submit.sh", "train", "vanilla", "--run-dir", run)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "123\n"
    assert (run / "resubmit-123.sh").stat().st_mode & 0o777 == 0o777 & ~umask()
    assert not (run / "resubmit-123.sh").is_symlink()
    assert kind != "file" or outside.read_text() == "precious"
    assert kind != "folder" or not list(outside.iterdir())
    assert kind != "absent" or not outside.exists()


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("kind", ["file", "absent", "FIFO", "link"])
def test_a_stop_is_asked_for_through_no_link(project, tmp_path, kind):
    stop, outside = tmp_path / "stop-12-0", tmp_path / "outside"
    outside.write_text("precious")
    if kind == "file":
        stop.write_text("old")
    elif kind == "FIFO":
        os.mkfifo(stop)
    elif kind == "link":
        stop.symlink_to(outside)
    bash(project, f"stop={stop}; ask_to_stop")
    assert stop.is_file()
    assert not stop.is_symlink()
    assert stop.read_bytes() == b""
    assert outside.read_text() == "precious"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("resubmit-123.sh", "is not a regular file; remove it"),
        ("job-7.log", "is a link, and logs are"),
    ],
)
@pytest.mark.usefixtures("sbatch")
def test_what_cannot_be_replaced_is_refused(project, tmp_path, name, says):
    project.write_settings()
    run = tmp_path / "run"
    run.mkdir()
    if name == "resubmit-123.sh":
        os.mkfifo(run / name)
    else:
        (run / name).symlink_to(tmp_path / "precious")
    result = project.launch("submit.sh", "train", "vanilla", "--run-dir", run)
    assert result.returncode == 2
    *_, line = result.stderr.splitlines()
    assert line.startswith(f"error: {run / name} {says}")


def test_what_is_read_of_a_run_folder_is_a_regular_file_and_plain(project, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "REVISION").write_bytes(b"\033[2Jv1\0\x9b\xc2\x9b\nsecond line\n" + b"x" * 10**6)
    assert bash(project, f"revision {run}") == "?[2Jv1????\n"
    (run / "REVISION").write_text("")
    assert bash(project, f"revision {run}") == "unknown\n"
    for make in (os.mkfifo, lambda path: path.symlink_to("/etc/hostname"), Path.mkdir):
        make(run / "progress.json")
        assert bash(project, f"run={run}; progress") == ""
        remove = Path.rmdir if make is Path.mkdir else Path.unlink
        remove(run / "progress.json")
    (run / "progress.json").write_text('{"step": 5}')
    assert bash(project, f"run={run}; progress") == '{"step": 5}'


def test_resubmitting_keeps_every_word(project, tmp_path):
    folder = tmp_path / "a run's $(touch made)"
    (folder / "code").mkdir(parents=True)
    words = ["two words", "$HOME", "it's", "*", "", "--x=1"]
    quoted = shlex.join(words)
    log = f"--output={folder}/job-%j.log"
    words_of_job = f"train {shlex.quote(log)} --account='a b' -- {quoted}"
    bash(project, f"leave_resubmit {shlex.quote(str(folder))} 7 {words_of_job}")
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sent = tmp_path / "sent"
    sbatch.write_text(f'#!/bin/bash\nprintf "%s\\n" "$PWD" "$@" >{sent}\necho 8\n')
    sbatch.chmod(0o755)
    path = f"{sbatch.parent}:{environment()['PATH']}"
    for number in (7, 8):
        said = subprocess.run(
            [folder / f"resubmit-{number}.sh"], env={"PATH": path}, capture_output=True, text=True
        )
        expected = ["--parsable", log, "--account=a b", "launch/train.sbatch", *words]
        assert sent.read_text().splitlines() == [f"{folder}/code", *expected]
        assert shlex.split(said.stderr)[-3:] == ["8;", "log:", f"{folder}/job-8.log"]


@pytest.mark.parametrize(
    ("answers", "tries", "told"),
    [
        (["Socket timed out on send/recv operation"] * 2, 3, ""),
        (["Requested operation is presently disabled"], 1, "error: the requeue failed: Requested"),
        (["Access/permission denied"], 1, "the requeue failed: Access/permission denied; resume"),
        (["Socket timed out on send/recv operation"] * 30, 30, "error: the requeue failed: Socket"),
    ],
)
def test_a_busy_controller_is_asked_again(project, answers, tries, told):
    lines = "\n".join(answers)
    said = bash(
        project,
        f"""
        job=12 run=/run
        sleep() {{ if [ "$1" = infinity ]; then echo waits for the end; exit 0; fi; }}
        scontrol() {{
            local answer
            echo "$*" >>asked
            answer=$(tail -n "+$(wc -l <asked)" <<<{shlex.quote(lines)} | head -n 1)
            if [ -n "$answer" ]; then echo "slurm error: $answer" >&2; return 1; fi
        }}
        (requeue "time is up") 2>&1 || echo failed
        """,
    )
    asked = (project.folder / "asked").read_text().splitlines()
    assert asked == ["requeue 12"] * tries
    assert told in said.replace("slurm error: ", "")
    assert said.endswith("failed\n" if told else "waits for the end\n")


def attempt(project: Project, ranks: str, settings: str = "") -> str:
    """The output of a training job on a GPU node whose ranks are a bash snippet."""
    project.write_settings(GPUS + settings)
    return bash(
        project,
        f"""
        export SLURM_SUBMIT_DIR=$PWD SLURM_JOB_ID=12 SLURM_JOB_PARTITION=p SLURM_JOB_NUM_NODES=1
        export PATIENCE=0
        job_field() {{ case $1 in JobState) echo RUNNING ;; TimeLimit) echo 1:00 ;; esac }}
        misses_node() {{ false; }}
        requeue() {{ echo "job $job requeued: $1"; exit 1; }}
        start_ranks() {{ echo "ranks: $*"; ({ranks}) & ranks=$!; }}
        source launch/cluster.env
        job=12 attempt=12-0 asked=no
        (train vanilla --seed 1) 2>&1 && echo ended well || echo failed
        """,
    )


def test_ranks_that_all_end_well_have_finished_whatever_the_file_system_shows(project):
    assert attempt(project, "exit 0").endswith("ended well\n")


def test_ranks_that_fail_without_having_advanced_are_not_started_again(project):
    said = attempt(project, "exit 1")
    assert "made no progress; not requeued" in said
    assert said.endswith("failed\n")


def test_progress_of_another_job_in_the_folder_does_not_requeue_this_one(project):
    """Both would be in the run folder of the second, whose options may be wrong."""
    advance = """
        echo '{"step": 5}' >"$run/progress.json"
        echo '{"command": ["--cluster.stop-file", "/x/stop-JOB-0"]}' >"$run/provenance.json"
        exit 1
    """
    assert "this job made no progress" in attempt(project, advance.replace("JOB", "11"))
    shutil.rmtree(project.runs)
    assert "job 12 requeued: failed after making" in attempt(project, advance.replace("JOB", "12"))


def test_a_task_of_a_sweep_leaves_each_option_once(project):
    attempt(project, "exit 0", "SBATCH_OPTIONS=(--partition=low --account=a)")
    line = (project.runs / "vanilla-seed1" / "resubmit-12.sh").read_text().splitlines()[-1]
    names = [word.partition("=")[0] for word in shlex.split(line) if word.startswith("--")]
    assert len(names) == len(set(names))
    assert {"--partition=p", "--account=a", "--nodes=1", "--time=1:00"} < set(shlex.split(line))


def test_a_task_of_a_sweep_does_not_run_the_code_of_a_stranger(project):
    code = project.runs / "vanilla-seed1" / "code"
    code.mkdir(parents=True)
    (code / "torch.py").write_text("")
    said = attempt(project, "exit 0")
    assert said.startswith(
        f"error: the code in {code} was not copied there by your launch/submit.sh"
    )
    assert said.endswith("you trust that run folder, run its resubmit-JOB.sh\nfailed\n")


def test_ranks_on_a_node_with_gpus_do_not_take_its_cpu(project):
    assert " --device cuda --seed 1\n" in attempt(project, "exit 0")


def test_the_whole_paper_is_submitted_in_order(project):
    project.write_settings(GPUS)
    words = ("--dry-run", "--seeds", "2", "--", "--precision", "bf16")
    result = project.launch("reproduce.sh", *words)
    assert result.returncode == 0, result.stderr
    lines = [shlex.split(line) for line in result.stdout.splitlines()]
    plan = Study(
        runs=str(project.runs),
        data=str(project.folder / "shards"),
        seeds=2,
        options=("--precision", "bf16"),
    )
    found = experiments(plan)
    for one, line in zip(found, lines, strict=True):
        assert f"--job-name={one.name}" in line
        needed = "".join(f":JOB-OF-{name}" for name in one.after)
        assert (f"--dependency=afterok{needed}" in line) == bool(one.after)
        assert any(word.startswith("--dependency") for word in line) == bool(one.after)
        script = next(n for n, word in enumerate(line) if word.endswith(".sbatch"))
        if one.command[2] == "rft.train":
            assert line[script] == "launch/train.sbatch"
            assert tuple(line[script + 1 :]) == one.command[3:]
            assert f"--output={plan.at(one.name)}/job-%j.log" in line
        else:
            assert line[script] == "launch/command.sbatch"
            assert tuple(line[script + 1 :]) == one.command
        gpus = one.command[0] == "torchrun"
        assert ("--gpus-per-node=8" in line) == gpus
    assert not project.runs.exists()


def test_python_knows_nothing_of_slurm():
    sources = [path for folder in ("rft", "tools") for path in (ROOT / folder).rglob("*.py")]
    assert len(sources) > 50
    assert not [path for path in sources if "SLURM_" in path.read_text()]
