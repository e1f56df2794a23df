"""A conversion from its request to the finished folder: plan, calibrate, write, measure, and give it its name."""

import hashlib
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_edge.calibration.measurement import Facts
from mlx_edge.calibration.receipt import Receipt, Run, TextSource, write_receipt
from mlx_edge.calibration.text import Samples
from mlx_edge.conversion.calibrated import (
    TABLE_NAME,
    allocate_bits,
    calibrate,
    fix_inputs,
    open_model,
    read_samples,
    write_table,
)
from mlx_edge.conversion.card import CARD_NAME, make_card
from mlx_edge.conversion.experts import stack_experts
from mlx_edge.conversion.finite import check_finite
from mlx_edge.conversion.job import Job, open_job
from mlx_edge.conversion.pipeline import Stored, write_tensors
from mlx_edge.conversion.plan import (
    DTYPES,
    Packings,
    Plan,
    find_layers,
    make_copy_plan,
    make_plan,
)
from mlx_edge.conversion.quality import judge
from mlx_edge.conversion.recipes import mix
from mlx_edge.conversion.request import Bars, Request
from mlx_edge.conversion.source import FolderSource, Source, is_quantized
from mlx_edge.errors import InvalidRequestError, MLXEdgeError
from mlx_edge.profiler.memory import peak_resident_bytes
from mlx_edge.quant import Packing
from mlx_edge.runtime import own_version
from mlx_edge.weights.report import format_bytes
from mlx_edge.weights.stream_writer import StreamWriter
from mlx_edge.weights.writer import disk_errors, replacing

LAYOUT = 1  # of what a partial folder holds; another one begins anew


@dataclass(frozen=True)
class Conversion:
    """What was done."""

    folder: Path
    plan: Plan
    receipt: Receipt | None
    seconds: float
    peak_memory_bytes: int  # of the process


def convert(
    source: Source,
    target: Path,
    request: Request,
    *,
    samples: Samples | None = None,
    is_forced: bool = False,
    bars: Bars = lambda _title, _unit: lambda _done, _total: None,
) -> Conversion:
    """Write the folder `target` as the request says; it appears when it is complete.

    A run that was killed or interrupted leaves `.NAME.partial` beside it, which the same conversion takes up: shards
    that were whole are kept. `samples` are rows that calibrate and measure, in place of the request's text;
    `bars` makes a bar of progress for each step.

    Raises: MLXEdgeError for a request that does not fit the source, a broken source, a target that is there, and a disk
    that refuses.
    """
    return _Converter(source, request, samples, bars).run(target, is_forced=is_forced)


class _Converter:
    """One conversion: what was asked, and what is found out on the way."""

    def __init__(
        self, source: Source, request: Request, samples: Samples | None, bars: Bars
    ) -> None:
        self._source, self._request, self._bars = source, request, bars
        self._tensors = stack_experts(source) if request.action == "quantize" else source
        self._given = samples
        self._started = time.perf_counter()
        _refuse_action(source, request)
        self._dtype = _choose_dtype(source, request)

    def run(self, target: Path, *, is_forced: bool) -> Conversion:
        with open_job(target, self._key(), is_forced=is_forced) as job:
            samples = self._read_samples(job)
            plan = self._fix_inputs(job, self._make_plan(job, samples), samples)
            self._write(job, plan, samples)
            receipt = self._measure(job, plan, samples) if self._has_receipt else None
            job.finish()
        self._keep_table(target)
        peak = peak_resident_bytes()
        return Conversion(target, plan, receipt, time.perf_counter() - self._started, peak)

    @property
    def _has_receipt(self) -> bool:
        return self._request.has_receipt and self._request.action == "quantize"

    def _key(self) -> str:
        """What a partial folder is taken up for; files beside the model count by their content."""
        key: dict[str, Any] = {
            "layout": LAYOUT,
            "version": own_version(),
            "source": self._source.fingerprint(),
            **self._request.key(),
        }
        if self._given is not None:
            key["samples"] = (self._given.calibration.sha256, self._given.held_out.sha256)
        for file in (self._request.text.source, self._request.sensitivities):
            if file is not None and Path(file).is_file():
                with disk_errors(Path(file)):
                    key[f"sha256 of {file}"] = hashlib.sha256(Path(file).read_bytes()).hexdigest()
        return json.dumps(key, indent=1, sort_keys=True)

    def _floats(self, job: Job) -> Path:
        """A folder of floats that the model can run from: the source's own, or one that is written now."""
        if isinstance(self._source, FolderSource):
            return self._source.folder
        folder = job.scratch / "floats"
        folder.mkdir(exist_ok=True)
        plan = make_plan(self._source, {}, None)
        with StreamWriter(folder, plan.tensors) as writer:
            write_tensors(
                self._source, plan, writer, on_progress=self._bars("Unpacking the source", "B")
            )
        self._write_texts(folder, plan.config)
        return folder

    def _read_samples(self, job: Job) -> Samples | str:
        """The text as rows of tokens, or why there is none; who must have it gets the error."""
        request = self._request
        if not (self._has_receipt or request.needs_model):
            return "it was not asked for"
        if self._given is not None:
            return self._given
        try:
            return read_samples(self._floats(job), request.text)
        except MLXEdgeError as error:
            if request.needs_model or request.text.source is not None:
                raise
            return str(error)

    def _make_plan(self, job: Job, samples: Samples | str) -> Plan:
        source, request, dtype = self._source, self._request, self._dtype
        if request.action in ("realign", "copy") and (
            request.action == "realign" or is_quantized(source)
        ):
            return make_copy_plan(source, dtype)
        if request.action != "quantize":
            return make_plan(source, {}, dtype)
        return make_plan(self._tensors, self._choose_packings(job, samples), dtype, self._default)

    def _fix_inputs(self, job: Job, plan: Plan, samples: Samples | str) -> Plan:
        """The plan with the int8 steps of its quantized layers' inputs, if they were asked for."""
        if not self._request.has_static_inputs:
            return plan
        assert isinstance(samples, Samples)
        check_finite(self._source)
        with open_model(self._floats(job)) as model:
            on_progress = self._bars("Measuring the inputs", "it")
            inputs = fix_inputs(model, samples.calibration.rows, plan.packings, on_progress)
        return replace(plan, config=plan.config | inputs)

    @property
    def _default(self) -> Packing | None:
        request = self._request
        return None if request.is_measured or request.recipe else request.packing

    def _choose_packings(self, job: Job, samples: Samples | str) -> Packings:
        source, request = self._source, self._request
        layers = find_layers(self._tensors)
        if request.recipe is not None:
            num_layers = int(source.config.get("num_hidden_layers", 0))
            return mix(request.recipe, layers, num_layers, request.packing.group_size)
        if not request.is_measured:
            return dict.fromkeys(layers, request.packing)
        assert isinstance(samples, Samples) and self._dtype is not None
        check_finite(source)
        with open_model(self._floats(job)) as model:
            return allocate_bits(
                model,
                samples.calibration.rows,
                request,
                self._dtype,
                job.folder / TABLE_NAME,
                self._bars,
            )

    def _keep_table(self, folder: Path) -> None:
        """At the end: a run that is taken up must find the files that it began with."""
        wanted = self._request.sensitivities
        if wanted is not None and not wanted.exists():
            write_table(wanted, (folder / TABLE_NAME).read_text("utf-8"))

    def _write(self, job: Job, plan: Plan, samples: Samples | str) -> None:
        request = self._request
        self._write_texts(job.folder, plan.config)
        max_shard_bytes = request.max_shard_bytes
        with (
            StreamWriter(job.folder, plan.tensors, max_shard_bytes=max_shard_bytes) as writer,
            self._calibrated(job, plan, samples, writer) as stored,
        ):
            _check_space(job.folder, plan.num_bytes - writer.written_bytes)
            write_tensors(
                self._tensors,
                plan,
                writer,
                rounding=request.rounding,
                calibrated=stored,
                on_progress=self._bars("Writing", "B"),
            )

    @contextmanager
    def _calibrated(
        self, job: Job, plan: Plan, samples: Samples | str, writer: StreamWriter
    ) -> Iterator[Stored | None]:
        """What the method chooses; nothing when an earlier run has written everything."""
        is_done = all(writer.is_written(tensor.name) for tensor in plan.tensors)
        if self._request.method == "rtn" or is_done:
            yield None
            return
        assert isinstance(samples, Samples) and plan.dtype is not None
        check_finite(self._source)
        rows = samples.calibration.rows
        with open_model(self._floats(job)) as model:
            yield calibrate(model, rows, plan.packings, plan.dtype, self._request, self._bars)

    def _write_texts(self, folder: Path, config: dict[str, Any]) -> None:
        self._source.copy_text_files(folder)
        if self._request.action == "realign" and isinstance(self._source, FolderSource):
            self._source.copy_measures(
                folder
            )  # the weights stay as they are: so does what is known of them
        with replacing(folder / "config.json") as file:
            file.write((json.dumps(config, indent=4, sort_keys=True) + "\n").encode())

    def _measure(self, job: Job, plan: Plan, samples: Samples | str) -> Receipt:
        request, packings = self._request, plan.packings.values()
        sample = None if isinstance(samples, str) else samples.calibration
        facts = Facts(
            model=self._source.name,
            method=request.method,
            packing=f"{plan.default}{request.rounding.description}",
            num_exceptions=sum(packing != plan.default for packing in packings),
            weights_bytes_before=plan.source_bytes,
            calibrated_on=TextSource(sample.source, sample.sha256)
            if sample is not None and request.needs_model
            else None,
            run=Run(time.perf_counter() - self._started, peak_resident_bytes()),
        )
        floats = None if isinstance(samples, str) else self._floats(job)
        receipt = judge(floats, job.folder, plan, facts, samples, self._bars)
        card = job.folder / CARD_NAME
        with disk_errors(job.folder):
            write_receipt(job.folder, receipt)
            before = card.read_text("utf-8", errors="replace") if card.exists() else ""
            card.write_text(make_card(receipt, before, name=job.target.name), "utf-8")
        return receipt


def _check_space(folder: Path, num_bytes: int) -> None:
    """Before hours are spent: the disk may still fill up meanwhile."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise InvalidRequestError(
            f"{folder.parent}: {format_bytes(num_bytes)} are to be written, the disk has {format_bytes(free)}; "
            "free some, or give another --mlx-path"
        )


def _refuse_action(source: Source, request: Request) -> None:
    if request.action == "dequantize" and not is_quantized(source):
        raise InvalidRequestError(f"{source.name} is read as floats anyway: leave out -d")
    if request.action == "quantize" and isinstance(source, FolderSource) and is_quantized(source):
        raise InvalidRequestError(
            f"{source.name} is quantized already; take the float model, or convert with -d first and its result with -q"
        )


def _choose_dtype(source: Source, request: Request) -> mx.Dtype | None:
    """As mlx-lm chooses: what was asked for, or what config.json says; when quantizing never undecided."""
    if request.dtype is not None or request.action == "realign":
        return request.dtype
    config = source.config
    text = config.get("text_config")
    said = [config.get(key) for key in ("torch_dtype", "dtype")]
    said += [text.get("dtype")] if isinstance(text, dict) else []
    dtype = next((DTYPES[name] for name in said if isinstance(name, str) and name in DTYPES), None)
    if request.action == "copy" and is_quantized(source):
        return None
    if dtype is None and request.action == "quantize":
        floats = (source.dtype(name) for name in source.names())
        dtype = next((found for found in floats if found in DTYPES.values()), mx.bfloat16)
    return dtype
