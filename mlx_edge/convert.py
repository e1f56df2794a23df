"""`python -m mlx_edge.convert`: a model in, a folder that maps and says how good it is out.

Reads flags and prints; the flags have the names that mlx_lm.convert gives them.
"""

import sys
from argparse import Namespace
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_edge.command import Parser, integer, number, run_command
from mlx_edge.errors import InvalidRequestError

if TYPE_CHECKING:
    from mlx_edge.conversion.converter import Conversion
    from mlx_edge.conversion.request import Request
    from mlx_edge.conversion.source import Source

PROG = "mlx_edge.convert"
DEFAULT_TARGET = "mlx_model"
BITS = (2, 3, 4, 5, 6, 8)

# Flags that mean something only beside others, by the names that they have in `Namespace`.
QUANTIZING = (
    *("q_bits", "q_group_size", "q_mode", "q_scheme", "q_per", "quant_predicate", "method"),
    *("activations", "target_bpw", "max_kl", "sensitivities"),
)
CONVERTING = [
    *("model", "mlx_path", "revision", "quantize", "dequantize", "realign", "dtype", "force"),
    *("no_receipt", "seed", *QUANTIZING),
]
SAMPLING = ("calibration", "num_samples", "sequence_length", "seed")
EXCLUSIVE = [
    ("quantize", "dequantize"),
    ("quantize", "realign"),
    ("dequantize", "realign"),
    ("realign", "dtype"),
    *(("q_bits", by) for by in ("quant_predicate", "target_bpw", "max_kl")),
    *(("q_group_size", by) for by in ("target_bpw", "max_kl")),
]


def make_parser() -> Parser:
    """All flags."""
    parser = Parser(prog=PROG, description="Convert a model, quantize it, and measure the damage.")
    add = parser.add_argument
    add(
        *("--model", "--hf-path"),
        help="a folder, a hub id (owner/name), a .gguf file, or the bundled pocket",
    )
    add("--revision", help="branch, tag or commit of a hub model")
    add("--mlx-path", help=f"the new folder (default: {DEFAULT_TARGET})")
    add("--force", action="store_true", help="replace the folder when the new one is complete")
    add(
        "--dtype",
        choices=("float16", "bfloat16", "float32"),
        help="of floats and scales (default: what config.json says)",
    )
    add("-d", "--dequantize", action="store_true", help="make floats of a quantized model")
    add(
        "--realign",
        action="store_true",
        help="write the same tensors so that they can be mapped",
    )
    _add_formats(parser)
    _add_methods(parser)
    _add_measures(parser)
    add("--upload-repo", help="refused: nothing is uploaded from here")
    add("--trust-remote-code", action="store_true", help="refused: no code of a model is run")
    return parser


def _add_formats(parser: Parser) -> None:
    add = parser.add_argument
    add("-q", "--quantize", action="store_true", help="quantize linears, embedding and head")
    add("--q-bits", type=int, choices=BITS, help="per weight (default: 4)")
    add("--q-group-size", type=int, choices=(16, 32, 64, 128), help="weights that share a scale")
    add("--q-mode", choices=("affine", "mxfp4", "mxfp8", "nvfp4"), help="default: affine")
    add(
        "--q-scheme", choices=("asymmetric", "symmetric"), help="affine grids (default: asymmetric)"
    )
    add(
        "--q-per",
        choices=("group", "channel", "tensor"),
        help="over what a scale is chosen (default: group); it is stored for each group",
    )
    add(
        "--quant-predicate",
        choices=("mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6"),
        help="mixed bits by rule of thumb",
    )


def _add_methods(parser: Parser) -> None:
    add = parser.add_argument
    add(
        "--method",
        choices=("rtn", "gptq", "awq", "dwq", "smooth"),
        help="how codes and scales are chosen (default: rtn, round to nearest)",
    )
    add(
        "--activations",
        choices=("dynamic", "static"),
        help="int8 steps of what meets the weights: as it comes (default), or fixed by the text",
    )
    add("--target-bpw", type=number(1, 32), help="mixed bits by measure: real bits per weight")
    add("--max-kl", type=number(0), help="mixed bits by measure: the most damage, nats per token")
    add(
        "--sensitivities", help="the layers' measured damages: read if the file is there, else made"
    )


def _add_measures(parser: Parser) -> None:
    add = parser.add_argument
    add("--calibration", help="text: a file or a data set of the hub (default: a built-in text)")
    add("--num-samples", type=integer(1, 1 << 20), help="rows that calibrate (default: 64)")
    add("--sequence-length", type=integer(2, 1 << 20), help="tokens in a row (default: 256)")
    add("--seed", type=integer(0), help="another one cuts the text elsewhere (default: 0)")
    add("--no-receipt", action="store_true", help="do not measure what the quantization did")
    add("--diagnose", nargs=2, metavar=("A", "B"), help="compare two models, and convert nothing")
    add("--plot", help="with --diagnose: draw the errors into a .png, .svg or .pdf")


def check_flags(args: Namespace) -> None:
    """Raises InvalidRequestError naming flags that do not go together, or that nothing would read."""
    if args.upload_repo is not None:
        raise InvalidRequestError(
            "--upload-repo: nothing is uploaded from here; convert, look at it, then `hf upload`"
        )
    if args.trust_remote_code:
        raise InvalidRequestError("--trust-remote-code: no code of a model folder is ever run here")
    given = {name for name, value in vars(args).items() if value not in (None, False)}
    if args.diagnose is not None:
        if extra := [name for name in CONVERTING if name in given]:
            raise InvalidRequestError(f"{_flag(extra[0])} does not go with --diagnose")
        return
    if args.model is None:
        raise InvalidRequestError("--model is missing: a folder, a hub id, a .gguf file, or pocket")
    for first, second in EXCLUSIVE:
        if {first, second} <= given:
            raise InvalidRequestError(f"{_flag(first)} and {_flag(second)} exclude each other")
    if args.plot is not None:
        raise InvalidRequestError("--plot needs --diagnose")
    for name in (*QUANTIZING, *SAMPLING, "no_receipt"):
        if name in given and not args.quantize:
            raise InvalidRequestError(f"{_flag(name)} needs -q")
    runs = args.method not in (None, "rtn") or given & {"target_bpw", "max_kl"}
    runs = runs or args.activations == "static"
    for name in SAMPLING:
        if name in given and args.no_receipt and not runs:
            raise InvalidRequestError(
                f"{_flag(name)}: nothing reads the text with --no-receipt and --method rtn"
            )


def _flag(name: str) -> str:
    short = {"quantize": "-q", "dequantize": "-d"}
    return short.get(name, "--" + name.replace("_", "-"))


def make_request(args: Namespace) -> "Request":
    """What the flags ask for.

    Raises: InvalidRequestError for flags that do not go together.
    """
    from mlx_edge.conversion.pipeline import Rounding
    from mlx_edge.conversion.plan import DTYPES
    from mlx_edge.conversion.request import Request, TextRequest
    from mlx_edge.quant import MODES, Packing

    mode = args.q_mode or "affine"
    bits, groups = MODES[mode]
    actions = {"quantize": args.quantize, "dequantize": args.dequantize, "realign": args.realign}
    action: Any = next((name for name, is_asked in actions.items() if is_asked), "copy")
    return Request(
        action=action,
        packing=Packing(args.q_group_size or groups[0], args.q_bits or bits[0], mode),
        recipe=args.quant_predicate,
        target_bpw=args.target_bpw,
        max_kl=args.max_kl,
        sensitivities=None if args.sensitivities is None else Path(args.sensitivities),
        dtype=None if args.dtype is None else DTYPES[args.dtype],
        method=args.method or "rtn",
        has_static_inputs=args.activations == "static",
        rounding=Rounding(args.q_scheme == "symmetric", args.q_per or "group"),
        text=TextRequest(
            args.calibration, args.num_samples or 64, args.sequence_length, args.seed or 0
        ),
        has_receipt=not args.no_receipt,
    )


def open_source(args: Namespace, stack: ExitStack) -> "Source":
    """The model that is converted; `stack` closes it."""
    from mlx_edge.conversion.source import FolderSource
    from mlx_edge.weights.hub import find_model

    if args.model.endswith(".gguf"):
        if args.revision is not None:
            raise InvalidRequestError("--revision does not go with a file")
        from mlx_edge.conversion.gguf.source import GGUFSource

        source: Source = stack.enter_context(GGUFSource(Path(args.model)))
        return source
    folder = find_model(args.model, revision=args.revision)
    return stack.enter_context(FolderSource(folder, args.model if "/" in args.model else None))


def describe(done: "Conversion") -> list[str]:
    """What was written, as lines of a table."""
    from mlx_edge.weights.report import format_bytes

    plan = done.plan
    if done.receipt is not None:
        rows = done.receipt.table()
    else:
        share = plan.num_bytes / max(1, plan.source_bytes)
        size = f"{format_bytes(plan.num_bytes)}, {share:.1%} of {format_bytes(plan.source_bytes)}"
        rows = [("Bits per weight", f"{plan.bits_per_weight:.3f}, scales counted"), ("Size", size)]
    if plan.kept:
        name, reason = next(iter(plan.kept.items()))
        others = f" and {len(plan.kept) - 1} more" if len(plan.kept) > 1 else ""
        rows.append(("Kept as floats", f"{name}{others}: {reason}"))
    rows.append(("Took", f"{done.seconds:.1f} s, peak {format_bytes(done.peak_memory_bytes)}"))
    rows.append(("Folder", str(done.folder)))
    rows.append(("Run it", f'mlx-edge generate --model {done.folder} --prompt "Hello"'))
    width = max(len(word) for word, _ in rows)
    return [f"{word:<{width}}  {value}" for word, value in rows]


def run(argv: list[str] | None) -> None:
    """Parse, convert, print."""
    args = make_parser().parse_args(argv)
    check_flags(args)
    if args.diagnose is not None:
        diagnose(args)
        return
    from mlx_edge.conversion.converter import convert
    from mlx_edge.conversion.job import check_target, find_place
    from mlx_edge.models.load import show_progress

    target = Path(args.mlx_path or DEFAULT_TARGET).expanduser()
    request = make_request(args)
    check_target(target, is_forced=args.force)  # before anything is downloaded
    try:
        with ExitStack() as stack:
            source = open_source(args, stack)
            done = convert(source, target, request, is_forced=args.force, bars=show_progress)
    except KeyboardInterrupt:
        place = find_place(target)
        if place.exists():
            print(f"\n{PROG}: stopped; the same command goes on from {place}", file=sys.stderr)
        raise
    print("\n".join(describe(done)))


def diagnose(args: Namespace) -> None:
    """Compare two models and print how far the second is from the first."""
    from mlx_edge.calibration.diagnosis import diagnose as compare
    from mlx_edge.calibration.text import BUILT_IN
    from mlx_edge.models.load import show_progress

    first, second = args.diagnose
    found = compare(
        first,
        second,
        text=args.calibration or BUILT_IN,
        num_rows=args.num_samples or 16,
        length=args.sequence_length or 256,
        plot=None if args.plot is None else Path(args.plot),
        on_progress=show_progress("Comparing", "it"),
    )
    print("\n".join(found.lines()))


def main(argv: list[str] | None = None) -> int:
    """The command; its exit code."""
    return run_command(PROG, run, argv)


if __name__ == "__main__":
    sys.exit(main())
