"""Surroundings of a command: output streams, variables of launchers, unwritable folders."""

from collections.abc import Iterator, Sequence

from tests.hostile.rows import Answer, Row
from tests.hostile.world import (
    DRY,
    EVALUATE,
    FRESH,
    GREEDY,
    LOCALISE,
    PACK,
    REPORT,
    SHOW,
    VERIFY,
    WISE,
)

PLAN = ("rft.experiments", "--runs", "r", "--data", "d")
COMMANDS = {
    "rft.experiments": PLAN,
    "rft.env": ("rft.env",),
    "rft.report": REPORT,
    "rft.data.show": SHOW,
    "rft.merge": WISE,
    "verify_shards": VERIFY,
    "shard_folder": PACK,
    "rft.evaluate": EVALUATE,
    "rft.train": DRY,
    "a help": ("rft.train", "--help"),
}
LAUNCHED = {
    "rft.train": DRY,
    "rft.evaluate": EVALUATE,
    "greedy-soup": (*GREEDY, "--workers", "0"),
    "localisation": LOCALISE,
}


def row(
    what: str,
    words: Sequence[str],
    *says: str,
    answer: Answer = "refused",
    slow: bool = True,
    code: int | None = None,
    stdout: str = "",
    writes: Sequence[str] = (),
    **variables: str,
) -> Row:
    return Row(
        kind="environment",
        what=what,
        words=words,
        says=says,
        answer=answer,
        code=code,
        stdout=stdout,
        slow=slow,
        writes=writes,
        variables=variables,
    )


def quiet(what: str, words: Sequence[str]) -> Row:
    """A reader that leaves early is not an error: no line, and not the exit code of an error."""
    return Row(
        kind="environment",
        what=f"the reader of {what} leaves",
        words=words,
        answer="silent",
        stdout="left",
        slow=True,
    )


def rows() -> Iterator[Row]:
    """Yield the rows of this kind."""
    for what, words in COMMANDS.items():
        yield row(f"{what} without stdout", words, answer="either", stdout="closed")
        yield quiet(what, words)
    for what, words in LAUNCHED.items():
        for name, values in {
            "RANK": ("x", "", "-1", "1.5", "9" * 5000),
            "WORLD_SIZE": ("x", "", "0", "-2"),
            "LOCAL_RANK": ("x", "", "-1"),
        }.items():
            for value in values if what == "rft.train" else values[:2]:
                others = {
                    "RANK": "0",
                    "WORLD_SIZE": "2",
                    "LOCAL_RANK": "0",
                    "LOCAL_WORLD_SIZE": "1",
                }
                variables = {**others, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9", name: value}
                yield row(f"{what} with {name}={value[:9]}", words, name, **variables)
    yield row("a rank beyond the world", DRY, "RANK", RANK="7", WORLD_SIZE="2", LOCAL_RANK="0")
    yield row("a rank without a world", DRY, answer="either", RANK="1")
    yield row(
        "a port that is no number",
        FRESH,
        "MASTER_PORT|port",
        RANK="0",
        WORLD_SIZE="2",
        LOCAL_RANK="0",
        LOCAL_WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="x",
    )
    yield row("no home", DRY, answer="accepted", HOME="/no/such/home")
    yield row(
        "no folder for temporary files",
        PACK,
        answer="accepted",
        TMPDIR="/no/such/folder",
        slow=False,
    )
    yield row(
        "a locale that does not exist",
        PLAN,
        answer="accepted",
        LANG="xx_YY",
        LC_ALL="xx_YY",
        slow=False,
    )
    yield row("an encoding of ASCII", SHOW, answer="accepted", PYTHONIOENCODING="ascii")
    yield row("a terminal of no width", SHOW, answer="accepted", COLUMNS="0")
    yield row("a terminal whose width is no number", SHOW, answer="accepted", COLUMNS="x")
    for width in ("1", "2", "3", "4", "0", "\u00b2", "99999999999"):
        help_of_report = ("rft.report", "--help")
        what = f"a help in {width!a} columns"
        yield row(what, help_of_report, answer="accepted", COLUMNS=width, LINES=width)
    for what, words in LAUNCHED.items():
        variables = {"LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "x"}
        yield row(f"{what} with LOCAL_RANK left behind", words, "LOCAL_RANK", **variables)
    rank = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    yield row(
        "a report in the shell of a rank",
        ("rft.report", "nothing", "--out", "r"),
        "nothing",
        slow=False,
        TORCHELASTIC_RUN_ID="x",
        **rank,
    )
    for place in ("/no/such/folder/error.json", "error.json"):
        yield row(
            f"a rank whose torchrun has gone from {place}",
            (*EVALUATE, "--sets", "nothing"),
            "nothing",
            slow=True,
            writes=("error.json",),
            TORCHELASTIC_RUN_ID="x",
            TORCHELASTIC_ERROR_FILE=place,
            **rank,
        )
    for name, value in {
        "FSSPEC_HTTP": "{",
        "FSSPEC_S3": "[]",
        "FSSPEC_GS": "",
        "FSSPEC": "{}",
        "FSSPEC__HTTP": "{}",
    }.items():
        yield row(f"{name}={value}", REPORT, f"{name} in the environment", **{name: value})
    yield row(
        "a proxy that is no URL",
        (*SHOW, "--data", "http://127.0.0.1:9/x"),
        "127",
        HTTP_PROXY="::",
        http_proxy="::",
    )
    yield row(
        "options of rft in the environment", PLAN, answer="accepted", RFT_TRACEBACK="", slow=False
    )
