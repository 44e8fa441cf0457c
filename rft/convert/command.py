"""Import and export weights: `python -m rft.convert import|export ...`.

    python -m rft.convert import FILE --out RUN --clip ViT-B-32-quickgelu [--data URL [--set SET]]
    python -m rft.convert export RUN --to open-clip --out FOLDER

`import` makes a run folder, which rft.evaluate, rft.merge and rft.report accept like that of a
training. The format is detected from the file's content; rft/clip/weights.py has the list.
"""

import sys

from rft import cli, commands
from rft.convert.exports import Export, export_weights
from rft.convert.imports import Import, import_weights

USAGE = """Import weights from other code, and export models for other code.

usage: python -m rft.convert import FILE --out RUN [--clip NAME]
                             [--data URL [--set SET]]
       python -m rft.convert export RUN_OR_FILE --to FORMAT --out PATH
                             [--text TAG_OR_FILE] [--push hf://USER/NAME]

  import  Makes a run folder for rft.evaluate, rft.merge, rft.report and \
rft.predict. Reads OpenAI's .pt, open_clip's .pt, .bin, .safetensors, \
hub-layout folder, weights tag or hf-hub:NAME, model-soups' state dict, the \
released code's checkpoint, wise-ft's pickle, and rft's own safetensors.
  export  Converts a run folder or .safetensors file to open-clip (a folder that \
classifies without rft), onnx, released, model-soups or safetensors.

`import --help` and `export --help` list the options.
"""


def main() -> None:
    """Run the subcommand of the command line."""
    kind, *options = sys.argv[1:] or ["--help"]
    if kind in ("-h", "--help", commands.HELP_ALL):
        cli.print_help(USAGE)
    elif kind == "import":
        import_weights(cli.parse(Import, args=options, prog="rft.convert import"))
    elif kind == "export":
        export_weights(cli.parse(Export, args=options, prog="rft.convert export"))
    else:
        raise cli.unknown("conversion", kind, ["import", "export"])
